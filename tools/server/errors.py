"""Refusals as OpenAI's clients read them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ApiError", "ClientGoneError", "invalid", "retry_after"]

_LONGEST_PARAM = 100


class ApiError(Exception):
    """What a client is told instead of an answer: what was got, what is allowed, what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """kind: the document's `type`. param: the parameter at fault. code: a word for programs."""
        super().__init__(message)
        if param is not None:  # a client's own key may be long, and have what UTF-8 has no bytes for
            param = param[:_LONGEST_PARAM].encode("utf-8", "backslashreplace").decode("utf-8")
        self.status, self.headers = status, dict(headers or {})
        self._fields = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def document(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {"error": dict(self._fields)}


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is told anything."""


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again: whole seconds, 1 to 60 (clients ignore more)."""
    return {"Retry-After": str(max(1, min(60, round(seconds))))}
