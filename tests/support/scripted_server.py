"""A server that answers completions from a script and keeps what it was asked for: the page's API."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import chain, cycle
from typing import Any

import uvicorn
from blt_edge.runtime.vocabulary import Utf8Stream
from blt_edge.tools.server.app import page_files, page_routes
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

THRESHOLD = 2.0


@dataclass
class Script:
    """What the server does next; change it between requests."""

    answer: bytes = b"there was a king"  # again and again as far as max_tokens goes
    patch_lengths: tuple[int, ...] = (4,)  # of prompt and answer together, again and again
    pause: float = 0.0  # seconds before each new byte
    refusals: list[tuple[int, str, dict[str, str]]] = field(default_factory=list)  # before any completion
    break_after: int | None = None  # end the stream in its middle after so many bytes
    fail_after: int | None = None  # send an error as an event after so many bytes
    reason: str = "length"  # why the text ends
    key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)  # what was not refused
    looks: list[str] = field(default_factory=list)  # prompts that were only to be read
    defaults: dict[str, Any] = field(default_factory=dict)  # the checkpoint's own
    sent: int = 0  # new bytes of the last answer


class ScriptedServer:
    """The server, in a thread of its own, as a context manager."""

    def __init__(self) -> None:
        self.script = Script()
        completions = Route("/v1/completions", self._completions, methods=["POST"])
        routes = [*page_routes(page_files()), Route("/v1/models", self._models), completions]
        config = uvicorn.Config(
            Starlette(routes=routes), "127.0.0.1", 0, log_level="critical", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)

    @property
    def address(self) -> str:
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/"

    async def _models(self, request: Request) -> JSONResponse:
        told = {"threshold": THRESHOLD, "defaults": self.script.defaults}
        model = {"id": "scripted", "object": "model", "blt": told}
        return self._stranger(request) or JSONResponse({"object": "list", "data": [model]})

    async def _completions(self, request: Request) -> JSONResponse | StreamingResponse:
        script = self.script
        if refused := self._stranger(request):
            return refused
        body = await request.json()
        if body["max_tokens"] == 0:
            script.looks.append(body["prompt"])
            return StreamingResponse(self._events(body, script), media_type="text/event-stream")
        if script.refusals:
            return _error(*script.refusals.pop(0))
        script.requests.append(body)
        script.sent = 0
        return StreamingResponse(self._events(body, script), media_type="text/event-stream")

    def _stranger(self, request: Request) -> JSONResponse | None:
        borne = request.headers.get("authorization", "").removeprefix("Bearer ")
        return None if self.script.key in (None, borne) else _error(401, "the key is missing or wrong")

    async def _events(self, body: dict[str, Any], script: Script) -> AsyncIterator[bytes]:
        prompt = body["prompt"].encode()
        count = body["max_tokens"]
        data = prompt + (script.answer * (count // len(script.answer) + 1))[:count]
        details = _details(data, script.patch_lengths, len(prompt))
        blt: dict[str, Any] = {"prompt": details[: len(prompt)]}
        utf8 = Utf8Stream()
        for place in range(len(prompt), len(data)):
            if script.sent == script.break_after:
                return
            if script.sent == script.fail_after:
                yield _event({"error": {"message": "the model failed", "type": "server_error"}})
                return
            await asyncio.sleep(script.pause)
            text = utf8.push(data[place : place + 1])
            yield _event(_chunk(text, None, {**blt, "bytes": [details[place]]}))
            blt = {}
            script.sent += 1
        end = {"bytes": [], "stats": _stats(prompt, count, details), "finish_reason": script.reason}
        yield _event(_chunk("", "length", {**blt, **end}))
        yield _event({"choices": [], "usage": {"completion_tokens": count}})
        yield b"data: [DONE]\n\n"


def _details(data: bytes, lengths: tuple[int, ...], prompt: int) -> list[dict[str, Any]]:
    insides = chain.from_iterable(range(length) for length in cycle(lengths))  # places in their patches
    return [
        {
            "byte": byte,
            "position": place,
            "starts_patch": inside == 0,
            "entropy": THRESHOLD + 0.1 * (1 + place % 9) if inside == 0 else 1.4 / (1 + inside),
            "guessed": place > prompt and inside > 1,
        }
        for place, (byte, inside) in enumerate(zip(data, insides, strict=False))
    ]


def _stats(prompt: bytes, count: int, details: list[dict[str, Any]]) -> dict[str, Any]:
    patches = sum(entry["starts_patch"] for entry in details)
    seconds = {"patcher": 0.03, "encoder": 0.03, "latent": 0.05, "decoder": 0.06}
    return {
        **{"prompt_bytes": len(prompt), "new_bytes": count, "patches": patches, "stage_seconds": seconds},
        **{"first_byte_seconds": 0.012, "decode_seconds": 0.2, "bytes_per_second": count / 0.2},
        **{"drafted": 40, "accepted": 31, "rounds": 10},
    }


def _chunk(text: str, reason: str | None, blt: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}], "blt": blt}


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)
