"""What a client is told instead of an answer: a status and `{"error": {message, type, param, code}}`.

The form is OpenAI's. What it does not know: what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from ...runtime.fields import shown

_LONGEST_PARAM = 100
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told instead of an answer: what was got, what is allowed, what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """code: a word for programs. param: the parameter at fault."""
        super().__init__(message)
        if param is not None:  # a client's own key may be long, and have what UTF-8 has no bytes for
            param = param[:_LONGEST_PARAM].encode("utf-8", "backslashreplace").decode("utf-8")
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status, self.headers = status, dict(headers or {})
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.document, self.status, self.headers)


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is told anything."""


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400: the request itself is wrong."""
    return ApiError(400, message, code, param=param)


def unknown_model(name: object, known: str) -> ApiError:
    """A 404: this server's model has another name."""
    message = f"there is no model {shown(name)}; this server has {known!r}"
    return ApiError(404, message, "model_not_found", param="model")


def late_body(seconds: float) -> ApiError:
    """A 408: the client did not go on."""
    message = f"the body did not arrive within {seconds:g} s"
    return ApiError(408, message, "timeout", headers={"Connection": "close"})


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again: whole seconds, 1 to 60 (clients ignore more)."""
    return {"Retry-After": str(max(1, min(60, round(seconds))))}


def server_stops() -> ApiError:
    """A 503: nothing is begun any more."""
    headers = {**retry_after(5), "Connection": "close"}
    return ApiError(503, "the server is stopping", "stopping", headers=headers)
