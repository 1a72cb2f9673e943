"""The routes of the server, the page's files, and who may ask.

The page's files are read once, from this package; nothing else is ever read from the disk.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...runtime.fields import shown
from .chat import begin_chat
from .completions import CompletionsEndpoint
from .metrics import CONTENT_TYPE, accounted
from .refusals import ApiError, unknown_model
from .service import Service, server_failed
from .settings import KEY_NUMBER, ServerSettings, is_loopback

_MODEL = "/v1/models/"
_HEALTH = ("/healthz", "/health")
_CHATS = "/v1/chat/completions"
_PATHS = ("/v1/completions", "/v1/models", *_HEALTH, "/metrics")
_CHAT = re.compile(r"/(chat/completions|responses|messages|chat)/?$")
_COMPLETIONS = re.compile(r"/(completions?|generate)/?$")

# 1. The page.

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAME = re.compile(r"[a-z_]+\.(css|js|svg)")
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
    index = folder.joinpath("index.html")
    if not index.is_file():
        return {"/": _MISSING}
    files = [file for file in folder.iterdir() if _NAME.fullmatch(file.name) and file.is_file()]
    return {"/": index.read_bytes(), **{f"/{file.name}": file.read_bytes() for file in files}}


def page_routes(files: Mapping[str, bytes]) -> list[Route]:
    return [_page_route(path, content) for path, content in files.items()]


def _page_route(path: str, content: bytes) -> Route:
    kind = _KINDS["html" if path == "/" else path.rpartition(".")[2]]
    if content is _MISSING:
        kind = "text/plain; charset=utf-8"

    async def answer(request: Request) -> Response:
        return Response(content, 200, _HEADERS, kind)

    return Route(path, answer, methods=["GET"])


# 2. The application.


def create_app(service: Service, say: Callable[[str], None]) -> ASGIApp:
    """The application. say: gets a line for each request."""
    settings, page = service.settings, page_files()
    paths = _paths(service)
    around = [Middleware(_host_guard, settings=settings)]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        around.append(cors)
    if settings.api_keys:
        around.append(Middleware(_key_guard, keys=settings.api_keys, open_paths={*page, *_HEALTH}))
    app = Starlette(
        routes=[*_routes(service), *page_routes(page)],
        middleware=around,
        exception_handlers={
            ApiError: _refused,
            HTTPException: partial(_not_routed, paths),
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False

    def route(path: str) -> str:
        if path in paths or path in page:
            return path
        return _MODEL + "{id}" if path.startswith(_MODEL) else "other"

    return accounted(app, service.metrics, say, service.report, route)


def _paths(service: Service) -> tuple[str, ...]:
    """Those of the API, chats only where there are any."""
    return (*_PATHS[:1], *[_CHATS] * (service.chat is not None), *_PATHS[1:])


def _routes(service: Service) -> list[Route]:
    model = _model_document(service)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.facts.name:
            raise unknown_model(name, service.facts.name)
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        if service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    chats = Route(_CHATS, CompletionsEndpoint(service, begin_chat), methods=["POST"])
    return [
        Route("/v1/completions", CompletionsEndpoint(service), methods=["POST"]),
        *[chats] * (service.chat is not None),
        Route("/v1/models", models, methods=["GET"]),
        Route(_MODEL + "{name:path}", one_model, methods=["GET"]),
        *(Route(path, health, methods=["GET"]) for path in _HEALTH),
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
            "chat": service.chat is not None,
            "patching": rule.mode,
            "threshold": rule.threshold if simple else None,
            "defaults": {
                "max_tokens" if name == "max_new_bytes" else name: value
                for name, value in manifest.generation.options.items()
            },
        },
    }


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _not_routed(paths: Sequence[str], request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, shown(request.url.path)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message, code = f"{method} {path} is not allowed; allowed is {allowed}", "method_not_allowed"
    else:
        message, code = f"there is nothing at {path}; {_instead(request.url.path, paths)}", "not_found"
    return ApiError(error.status_code, message, code, headers=error.headers).response


def _instead(path: str, paths: Sequence[str]) -> str:
    """What to ask for by who asked for the path in vain. paths: those that there are."""
    if _CHAT.search(path) and _CHATS in paths:
        return f"chats are at {_CHATS}: OpenAI's clients want a base URL that ends in /v1"
    if path == _CHATS:
        return (
            "this model's bundle has no chat template: send a text as prompt to /v1/completions "
            "(completions.create in OpenAI's clients, a completion model in other tools), or give the bundle "
            "the template that the model was trained with: blt-edge export --chat-template FILE"
        )
    if _CHAT.search(path):
        return (
            "this model continues a text and knows no chat: send the text as prompt to /v1/completions "
            "(completions.create in OpenAI's clients, a completion model in other tools)"
        )
    if _COMPLETIONS.search(path):
        return "completions are at /v1/completions: OpenAI's clients want a base URL that ends in /v1"
    return f"there are {', '.join(paths)}"


async def _failed(request: Request, error: Exception) -> Response:
    return server_failed().response


# 3. Who may ask.


def _host_guard(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """On a loopback address, answers only to loopback names and those that are allowed.

    A web page whose name was made to point to this machine is of the same origin as the server for a
    browser; the Host header gives it away. On other addresses names are not known, and all are let through.
    HTTP/1.0 without the header is no browser.
    """
    if not is_loopback(settings.host):
        return app
    allowed = {name.lower() for name in settings.allowed_hosts}
    refusal = ApiError(
        403,
        "the Host header is no name of this server; call it by 127.0.0.1 or localhost, or allow the name "
        "with --allow-host",
        "host_not_allowed",
    )

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        header = Headers(scope=scope).get("host")
        name = None if header is None else host_name(header)
        known = name is None or is_loopback(name) or name in allowed
        await (app if known else refusal.response)(scope, receive, send)

    return answer


def host_name(header: str) -> str:
    """The name in a Host header, in lower case, without port and brackets; "" for what is none."""
    name = header.strip().lower()
    if name.startswith("["):
        inside, _, rest = name[1:].partition("]")
        return inside if not rest or rest.startswith(":") else ""
    return name.rpartition(":")[0] if ":" in name else name


def _key_guard(app: ASGIApp, keys: tuple[str, ...], open_paths: set[str]) -> ASGIApp:
    """Asks for `Authorization: Bearer` and one of the keys but on the open paths, and notes which."""
    expected = [key.encode("utf-8") for key in keys]
    refusal = ApiError(
        401,
        "the key is missing or wrong; send Authorization: Bearer and a key that the server has by --api-key",
        "invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        sent = given.strip().encode("latin-1")
        right = [
            hmac.compare_digest(sent, key) for key in expected
        ]  # all of them, so that time tells nothing
        if any(right):
            scope[KEY_NUMBER] = right.index(True)
        known = scope["path"] in open_paths or (scheme.lower() == "bearer" and any(right))
        await (app if known else refusal.response)(scope, receive, send)

    return answer
