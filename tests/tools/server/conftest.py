"""A server of the tiny model, in a thread of this process, and clients of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs starlette: pip install 'blt-edge[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'blt-edge[serve]'")

import httpx
from blt_edge.runtime import BltModel, generation
from blt_edge.tools.server.run import bind, run_server
from blt_edge.tools.server.service import Service
from blt_edge.tools.server.settings import ServerSettings
from support.chat_bundles import chat_bundle

Slow = Callable[[float], None]


class Connection(socket.socket):
    def rest(self) -> bytes:
        """What comes until the server closes it."""
        with self:
            return b"".join(iter(lambda: self.recv(65536), b""))


@dataclass
class Running:
    url: str
    service: Service
    lines: list[str]
    errors: list[Exception]
    ended: threading.Event = field(default_factory=threading.Event)

    def post(self, document: Any = None, **options: Any) -> httpx.Response:
        """POST a completion; a document of its own prompt and length where none is given."""
        if document is not None:
            options["json"] = {"prompt": "Once", "max_tokens": 4, **document}
        return httpx.post(f"{self.url}/v1/completions", timeout=60, **options)

    def chat(self, document: Any) -> httpx.Response:
        """POST a chat; of a conversation and a length of its own where none is given."""
        asked = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 4, **document}
        return httpx.post(f"{self.url}/v1/chat/completions", timeout=60, json=asked)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def metric(self, name: str) -> float:
        return float(self.service.metrics.text().decode().split(f"\n{name} ")[1].split()[0])

    def wait_until(self, reached: Callable[[], bool]) -> None:
        for _ in range(3000):
            if reached():
                return
            time.sleep(0.01)
        raise AssertionError("it did not happen within 30 s")

    def wait_busy(self, waiting: int = 0) -> None:
        queue = self.service.queue
        self.wait_until(lambda: not queue.idle and queue.waiting == waiting)

    def wait_idle(self) -> None:
        self.wait_until(lambda: self.service.queue.idle and not self.service.exchanges)

    def connect(self, first: bytes = b"") -> Connection:
        """A connection of its own, on which `first` has been sent; close it."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        connection = Connection()
        connection.settimeout(30)
        connection.connect((host, int(port)))
        connection.sendall(first)
        return connection


@contextmanager
def running(model: BltModel, **settings: Any) -> Iterator[Running]:
    """A server on a free port, until the block ends."""
    host = settings.pop("host", "127.0.0.1")
    bound = bind(host, 0)
    address, port = bound.getsockname()[:2]
    errors: list[Exception] = []
    asked = ServerSettings(**{"name": "tiny", "grace": 0.0, "host": address, "port": port, **settings})
    service = Service(model, asked, errors.append)
    server, listening = Running(asked.url, service, [], errors), threading.Event()

    def serve() -> None:
        run_server(service, bound, say=server.lines.append, started=listening.set)
        server.ended.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert listening.wait(30)
    try:
        yield server
    finally:
        service.stop()
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """`serve(model, queue=1, ...)` -> a server of it with these settings, until the test ends."""
    with ExitStack() as stack:
        yield lambda model, **settings: stack.enter_context(running(model, **settings))


@pytest.fixture
def start(serve: Callable[..., Running], model: BltModel) -> Callable[..., Running]:
    """The same of the tiny model."""
    return partial(serve, model)


@pytest.fixture(scope="session")
def chat_model(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> BltModel:
    """The tiny model with a chat template, whose turns begin with what has become of their role."""
    pytest.importorskip("jinja2", reason="needs jinja2: pip install 'blt-edge[serve]'")
    return BltModel.load(
        chat_bundle(tiny_model.bundle, tmp_path_factory.mktemp("chat") / "bundle"), threads=1
    )


@pytest.fixture(scope="module")
def chats(chat_model: BltModel) -> Iterator[Running]:
    """A server of that, shared by a module's tests."""
    with running(chat_model) as one:
        yield one
        assert one.errors == []


@pytest.fixture(scope="module")
def server(model: BltModel) -> Iterator[Running]:
    """A server with the usual settings, shared by a module's tests; no error may be left unforeseen."""
    with running(model) as one:
        yield one
        assert one.errors == []


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """`slow(0.01)` makes every round of generated bytes wait so many seconds."""
    before = generation._Generation._reason_to_end

    def set_pace(seconds: float) -> None:
        monkeypatch.setattr(
            generation._Generation, "_reason_to_end", lambda *given: (time.sleep(seconds), before(*given))[1]
        )

    return set_pace
