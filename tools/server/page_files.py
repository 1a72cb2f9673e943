"""The page's files, read once from this package. Nothing else is ever read from the disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["page_files", "page_routes"]

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAME = re.compile(r"[a-z_]+\.(css|js|svg)")
_INDEX = "index.html"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MISSING = b"The page is not installed. The API is at /v1/completions.\n"


def page_files() -> dict[str, bytes]:
    """What is at each path: `/`, and each style sheet, script and picture; without a page, a note."""
    folder = resources.files(__package__).joinpath("page")
    if not folder.joinpath(_INDEX).is_file():
        return {"/": _MISSING}
    files = {
        f"/{file.name}": file.read_bytes()
        for file in folder.iterdir()
        if _NAME.fullmatch(file.name) and file.is_file()
    }
    return {"/": folder.joinpath(_INDEX).read_bytes(), **files}


def page_routes(files: Mapping[str, bytes]) -> list[Route]:
    """One route for each of `page_files`."""
    return [_route(path, content) for path, content in files.items()]


def _route(path: str, content: bytes) -> Route:
    kind = _KINDS["html" if path == "/" else path.rpartition(".")[2]]
    if content is _MISSING:
        kind = "text/plain; charset=utf-8"

    async def answer(request: Request) -> Response:
        return Response(content, 200, _HEADERS, kind)

    return Route(path, answer, methods=["GET"])
