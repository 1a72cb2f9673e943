"""The body of a request: read within a limit of size and time, as JSON without surprises.

What it does not know: what the JSON says.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

import anyio
from starlette.requests import ClientDisconnect, Request

from ...runtime.fields import shown
from .refusals import ApiError, ClientGoneError, invalid, late_body

BODY_SECONDS = 20.0
"""For the next bytes of a request's body."""

# A client that hears of a refusal only after it has sent everything gets it more surely than one whose
# connection breaks: so much, in bodies and in seconds, is read and thrown away.
_PATIENCE_BODIES = 4
_PATIENCE_SECONDS = 2.0


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The body's JSON object, of at most `most` bytes. Raises ApiError, ClientGoneError."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        got = shown(kind) if kind else "missing"
        raise invalid(f"the content type is {got}; allowed is application/json", code="invalid_content_type")
    try:
        document = parse_json(await _read(request, most))
    except ClientDisconnect:
        raise ClientGoneError from None
    if not isinstance(document, dict):
        raise invalid(f"the body is {shown(document)}; allowed is a JSON object", code="invalid_json")
    return document


async def _read(request: Request, most: int) -> bytes:
    too_large = ApiError(
        413,
        f"the body is longer than {most} bytes; send less, or raise the server's --max-body",
        "body_too_large",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:18]) > most and "expect" in request.headers:
        raise too_large  # it waits to be told to send anything
    body, size = bytearray(), 0
    with anyio.CancelScope(deadline=anyio.current_time() + BODY_SECONDS) as scope:
        async for piece in request.stream():
            size += len(piece)
            if size <= most:
                body += piece
                scope.deadline = anyio.current_time() + BODY_SECONDS
                continue
            body.clear()
            scope.deadline = min(scope.deadline, anyio.current_time() + _PATIENCE_SECONDS)
            if size > _PATIENCE_BODIES * most:
                break
    if scope.cancelled_caught and size <= most:
        raise late_body(BODY_SECONDS)
    if size > most:
        raise too_large
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no key twice, no depth or number that Python refuses. Raises ApiError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique)
    except RecursionError:
        raise invalid("the body's JSON is nested too deep", code="invalid_json") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise invalid(f"the body is no JSON: {error.msg} at {place}", code="invalid_json") from None
    except ValueError:  # more digits than Python turns into a number
        raise invalid("the body has a number of too many digits", code="invalid_json") from None


def _no_number(word: str) -> NoReturn:
    raise invalid(f"the body has {word}, which JSON has no number for", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key, count in times.items() if count > 1)
        raise invalid(f"the body has {shown(twice)} twice", param=twice, code="invalid_json")
    return found
