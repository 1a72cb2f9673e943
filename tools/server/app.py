"""The page's files, read once from this package. Nothing else is ever read from the disk.

The routes, and what lies around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...runtime.fields import shown
from .access import Access, HostGuard, KeyGuard
from .completions import Completions
from .metrics import CONTENT_TYPE
from .requests import ApiError
from .service import Service

__all__ = ["create_app", "page_files", "page_routes"]

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


_MODEL = "/v1/models/"
_PATHS = ("/v1/completions", "/v1/models", "/healthz", "/metrics")


def create_app(service: Service, say: Callable[[str], None]) -> ASGIApp:
    """The application. say: gets a line for each request."""
    settings, page = service.settings, page_files()
    around = [Middleware(_Refusals), Middleware(HostGuard, settings=settings)]
    if settings.cors_origins:
        around.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        )
        around.append(Middleware(_Refusals))  # so that a page may read them
    if settings.api_key is not None:
        open_paths = frozenset({*page, "/healthz"})
        around.append(Middleware(KeyGuard, key=settings.api_key, open_paths=open_paths))
    app = Starlette(
        routes=[*_routes(service), *page_routes(page)],
        middleware=around,
        exception_handlers={ApiError: _refusal, HTTPException: _http_refusal, Exception: _failure},
    )
    app.router.redirect_slashes = False

    def route(path: str) -> str:
        if path in _PATHS or path in page:
            return path
        return _MODEL + "{id}" if path.startswith(_MODEL) else "other"

    return Access(app, service.metrics, say, service.report, route)


def _routes(service: Service) -> list[Route]:
    model = _model_document(service)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != model["id"]:
            message = f"there is no model {shown(name)}; this server has {model['id']!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        if service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return [
        Route("/v1/completions", Completions(service), methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route(_MODEL + "{name:path}", one_model, methods=["GET"]),
        Route("/healthz", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]


def _model_document(service: Service) -> dict[str, object]:
    manifest = service.model.manifest
    rule = manifest.patching
    simple = rule.mode == "entropy" and not rule.monotonic and rule.threshold_add is None
    return {
        "id": service.facts.name,
        "object": "model",
        "created": service.created,
        "owned_by": "blt-edge",
        "blt": {
            "source": manifest.source.name,
            "max_positions": service.model.limits.max_positions,
            "patching": rule.mode,
            "threshold": rule.threshold if simple else None,
        },
    }


# Refusals.


class _Refusals:
    """Answers the ApiError of a guard, which lies outside of the routes' exception handlers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        try:
            await self._app(scope, receive, send)
        except ApiError as error:
            await _refused(error)(scope, receive, send)


def _refused(error: ApiError) -> Response:
    return JSONResponse(error.document, error.status, error.headers)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _refused(error)


async def _http_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, shown(request.url.path)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message, code = f"{method} {path} is not allowed; allowed is {allowed}", "method_not_allowed"
    else:
        message, code = f"there is nothing at {path}; there are {', '.join(_PATHS)}", "not_found"
    return _refused(ApiError(error.status_code, message, code=code, headers=error.headers))


async def _failure(request: Request, error: Exception) -> Response:
    return _refused(ApiError(500, "the server failed", kind="server_error", code="internal_error"))
