"""Clients that connect and ask for nothing, or not to the end."""

from __future__ import annotations

import socket

import pytest
from blt_edge.tools.server import run
from blt_edge.tools.server.run import bind, run_server
from blt_edge.tools.server.service import Service
from blt_edge.tools.server.settings import ServerSettings

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
OK = b'{"status":"ok"}'


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEAD_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("first", [b"", b"GET /heal", HEAD, HEAD + b"X-Long: "])
def test_a_head_that_does_not_come_ends_the_connection(start, first: bytes) -> None:
    server = start()
    many = [server.connect(first) for _ in range(20)]
    assert [one.rest() for one in many] == [b""] * 20
    assert server.get("/healthz").status_code == 200


@pytest.mark.usefixtures("impatient")
def test_a_byte_now_and_then_does_not_help(start) -> None:
    with start().connect(HEAD + b"X: ") as connection:
        connection.settimeout(0.01)
        for _ in range(3000):
            try:
                connection.sendall(b"a")
                if connection.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    raise AssertionError("the connection stayed open")


@pytest.mark.usefixtures("impatient")
def test_an_answer_may_take_longer(start, slow) -> None:
    slow(0.05)
    answer = start().post({"max_tokens": 8, "temperature": 0, "draft": "none"})
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() > 0.2


@pytest.mark.usefixtures("impatient")
def test_the_next_request_of_a_connection_has_its_own_time(start) -> None:
    connection = start().connect(HEAD)
    for part in (b"\r\n", HEAD + b"\r\n"):
        connection.sendall(part)
        answer = b""
        while not answer.endswith(OK):
            answer += connection.recv(65536)
    connection.sendall(b"GET /")
    assert connection.rest() == b""


def test_an_upgrade_is_not_taken_and_no_package_advised(start) -> None:
    server = start()
    asked = HEAD + b"Connection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    assert server.connect(asked).rest().endswith(OK)
    assert not any("pip install" in line for line in server.lines)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="not of this system")
def test_who_takes_no_bytes_is_left_to_the_system(model) -> None:
    service, found = Service(model, ServerSettings("tiny", timeout=7.5), [].append), []
    with bind("127.0.0.1", 0) as bound:

        def started() -> None:
            found.append(bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
            service.stop()

        run_server(service, bound, say=[].append, started=started)
    assert found == [7500]
