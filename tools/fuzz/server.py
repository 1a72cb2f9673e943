"""Attacks on the server: bodies of requests, and bytes on its socket."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from random import Random

from ...runtime import BltModel, GenerationOptions
from .bundles import export_tiny
from .mutate import spoil_bytes, spoil_json
from .targets import VALID, Files, Target

_TEMPLATE = """{% for message in messages %}
{{ message.role }}{{ message.name | tojson if 'name' in message }}:
{{ message.content | trim }}{{ eos_token }}
{% endfor %}"""
_BODY = json.dumps(VALID["request"]).encode()
_HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n"
)
_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_WORDS = (
    b"Transfer-Encoding: chunked\r\n|Content-Length: 3\r\n|Expect: 100-continue\r\n|\r\n\r\n|Host: \xff\r\n"
    b"|\0|\x1b[2J|GET /v1/models/%00%ff/../.. HTTP/1.1\r\n|ffffffffffffffff\r\n|0\r\n\r\n|Upgrade: h2c\r\n"
    b"| HTTP/9.9|%e2%80%ae|Content-Encoding: gzip\r\n"
    b"|Authorization: Bearer \xe9\r\n|Origin: null\r\n|Range: bytes=0-\r\n"
).split(b"|")


class Requests(Target):
    """Bodies of completions, up to what the model would be asked."""

    name = "requests"
    fitting = 0.5
    """Share of those that ask for a text that must fit."""

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        from ..server import body, requests
        from ..server.refusals import ApiError

        self._body, self._requests = body, requests
        self._refusal, self.refusals = ApiError, (ApiError,)
        self._facts = requests.ModelFacts("tiny", 512, GenerationOptions(temperature=1.0))
        self.valid = {"body": _BODY}

    def make(self, random: Random) -> Files:
        asked = (
            {**VALID["request"], **VALID["fitting"]} if random.random() < self.fitting else VALID["request"]
        )
        return {"body": spoil_json(random, asked, keys=VALID["request_keys"].split())}

    def attack(self, files: Files) -> None:
        try:
            document = self._body.parse_json(files["body"])
            if isinstance(document, dict):  # as `read_json` asks
                self._requests.parse_completion(document, self._facts)
        except self._refusal as error:
            json.loads(bytes(error.response.body))
            raise


class Chats(Requests):
    """Bodies of chats, up to the prompt that a template makes of them."""

    name = "chats"

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        from ...runtime.chat_render import render
        from ..server import chat_requests

        self._chats, self._render = chat_requests, render
        self.valid = {"body": json.dumps(VALID["chat"]).encode()}

    def make(self, random: Random) -> Files:
        asked = VALID["chat"] | (VALID["fitting"] if random.random() < self.fitting else {})
        return {"body": spoil_json(random, asked, keys=VALID["chat_keys"].split())}

    def attack(self, files: Files) -> None:
        try:
            document = self._body.parse_json(files["body"])
            if not isinstance(document, dict):  # as `read_json` asks
                return
            asked = self._chats.parse_chat(document, self._facts)
            request = {"template": _TEMPLATE, "messages": list(asked.messages), "eos_token": "<end>"}
            asked.with_prompt(self._render(request)["text"].encode(), self._facts)
        except self._refusal as error:
            json.loads(bytes(error.response.body))
            raise


class Connections(Requests):
    """Bytes that a running server gets, whole requests and pieces of them; then it has to answer another."""

    name = "connections"
    count, quick, seconds, sockets = 10_000, 60, 10.0, True
    processes = True  # what must fit is tried in one

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        from ..server.run import bind, run_server
        from ..server.service import Service
        from ..server.settings import ServerSettings

        export_tiny(folder)
        bound, listening = bind("127.0.0.1", 0), threading.Event()
        self._address = bound.getsockname()
        self._reports, self._lines = list[Exception](), list[str]()
        model = BltModel.load(folder, "cpu", 1)
        service = Service(model, ServerSettings("tiny", timeout=5.0), self._reports.append)
        say = {"say": self._lines.append, "started": listening.set}
        threading.Thread(target=run_server, args=(service, bound), kwargs=say, daemon=True).start()
        assert listening.wait(30)
        self.valid = {"request": _HEAD % len(_BODY) + _BODY}

    def make(self, random: Random) -> Files:
        body = super().make(random)["body"] if random.random() < 0.7 else _BODY
        head = _HEAD % len(body)
        return {"request": (spoil_bytes(random, head, _WORDS) if random.random() < 0.6 else head) + body}

    def attack(self, files: Files) -> None:
        answer = self._answer(files["request"])
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:300]
        assert b" 500 " not in answer[:20], answer[:300]
        assert b" 200 OK" in self._answer(_HEALTH), "it answers no more"
        told = [*map(repr, self._reports), *(line for line in self._lines if not line.isprintable())]
        self._lines.clear()
        self._reports.clear()
        assert not told, told

    def _answer(self, request: bytes) -> bytes:
        with socket.create_connection(self._address, 5) as connection:
            connection.settimeout(1)  # what is incomplete waits for the rest
            with contextlib.suppress(OSError):
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: connection.recv(65536), b""))
        return b""
