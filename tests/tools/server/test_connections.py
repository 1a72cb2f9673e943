"""Clients that ask for nothing, not to the end, or without taking the answer; and too many of them."""

from __future__ import annotations

import errno
import json
import socket
import struct
import time
from contextlib import suppress

import pytest
from blt_edge.tools.server import connections, run
from blt_edge.tools.server.connections import MOST, Connections, client_of, most_connections
from blt_edge.tools.server.run import bind, run_server
from blt_edge.tools.server.service import Service
from blt_edge.tools.server.settings import ServerSettings

LONG = {"prompt": "Once", "max_tokens": 480, "temperature": 0, "draft": "none"}
HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
OK = b'{"status":"ok"}'


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.2)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "most_connections", lambda: 8)


def post(document: dict[str, object]) -> bytes:
    body = json.dumps(document).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# 1. What does not come.


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


# 2. Too many.


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("first", [b"", HEAD, HEAD + b"\r\n", post(LONG)[:-9]])
def test_who_waits_for_its_client_makes_room_for_others(start, first: bytes) -> None:
    server = start()
    many = [server.connect(first) for _ in range(60)]
    for _ in range(3):
        assert server.get("/healthz").status_code == 200
        assert server.post({}).status_code == 200
    assert sum("connections are taken" in line for line in server.lines) == 1
    assert server.errors == []
    for one in many:
        one.close()


@pytest.mark.usefixtures("few")
def test_who_is_being_answered_stays(start, slow) -> None:
    slow(0.02)
    server = start()
    with server.connect(post({**LONG, "max_tokens": 60, "stream": True})) as busy:
        first = busy.recv(4096)
        many = [server.connect() for _ in range(30)]
        assert (first + busy.recv(1 << 20)).startswith(b"HTTP/1.1 200 ")
        while not first.endswith(b"0\r\n\r\n"):
            first += busy.recv(65536)
    assert b"[DONE]" in first
    for one in many:
        one.close()


@pytest.mark.usefixtures("few")
def test_when_all_are_being_answered_a_new_one_is_told_to_come_again(start, slow) -> None:
    slow(0.02)
    server = start(parallel=1)
    busy = [server.connect(post(LONG)) for _ in range(8)]
    server.wait_busy(waiting=7)
    assert server.connect().rest().startswith(b"HTTP/1.1 503 ")
    assert "closed so far: 0, refused: 1" in server.lines[-1]
    for one in busy:
        one.close()


def test_who_is_refused_may_be_gone_already() -> None:
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        bound.connections = Connections(0, [].append)
        with socket.create_connection(bound.getsockname()) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        with pytest.raises(ConnectionAbortedError):
            bound.accept()


@pytest.mark.usefixtures("few")
def test_one_address_has_half_of_them(start, monkeypatch) -> None:
    server, addresses = start(), iter(["10.0.0.1"] + ["10.0.0.2"] * 20 + ["10.0.0.3"] * 3)
    monkeypatch.setattr(connections, "client_of", lambda address: next(addresses))
    first, *many = [server.connect(HEAD) for _ in range(21)]
    server.wait_until(lambda: server.lines)
    assert server.lines[-1].startswith("10.0.0.2 has 4 connections, the most for one address")
    others = [server.connect(HEAD) for _ in range(3)]
    for one in [first, *others, *many[-4:]]:  # of the one that has too many, the last ones stay
        one.sendall(b"\r\n")
        assert one.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert [one.rest() for one in many[:-4]] == [b""] * 16
    for one in [first, *others, *many]:
        one.close()


def test_incomplete_bodies_are_few(start, monkeypatch) -> None:
    monkeypatch.setattr(connections, "MOST_BODIES", 3)
    server = start()
    many = [server.connect(post(LONG)[:-9]) for _ in range(9)]
    assert [one.rest() for one in many[:6]] == [b""] * 6
    many[-1].sendall(post(LONG)[-9:])
    assert many[-1].recv(65536).startswith(b"HTTP/1.1 200 ")
    for one in many:
        one.close()


def test_no_file_for_a_connection(start, monkeypatch) -> None:
    server, before, failures = start(), socket.socket.accept, [errno.EMFILE] * 5 + [errno.ENFILE] * 5

    def accept(self: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise OSError(failures.pop(), "no more files")
        return before(self)

    with server.connect():
        monkeypatch.setattr(socket.socket, "accept", accept)
        assert server.get("/healthz").status_code == 200
    assert (failures, server.errors) == ([], [])
    assert sum("no more files can be opened" in line for line in server.lines) == 1


def test_how_many_there_may_be(monkeypatch) -> None:
    resource = pytest.importorskip("resource", reason="not of this system")
    for allowed, most in ((1024, 928), (100, 50), (64, 32), (10**6, MOST), (resource.RLIM_INFINITY, MOST)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, allowed=allowed: (allowed, allowed))
        assert most_connections() == most


def test_whose_a_connection_is() -> None:
    clients = {
        **{"10.0.0.1": "10.0.0.1", "::ffff:10.0.0.1": "10.0.0.1", "127.0.0.9": None, "::1": None},
        **{"2001:db8:0:1::7": "2001:db8:0:1::/64", "fe80::1%eth0": "fe80::/64", "::ffff:127.0.0.1": None},
    }
    assert {address: client_of((address, 1)) for address in clients} == clients


# 3. Who does not take the answer, and who has said all it will say.


def slow_reader(server, asked: bytes, held: int = 4096) -> socket.socket:
    connection = server.connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, held)
    connection.sendall(asked)
    return connection


PAGES = b"GET /page.css HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.usefixtures("impatient")
def test_who_takes_nothing_is_cut_off_and_holds_little(start) -> None:
    server = start()
    with slow_reader(server, post({**LONG, "n": 9, "logprobs": 20, "stream": True})):
        server.wait_until(lambda: any(" 499 " in line for line in server.lines))
    server.wait_idle()
    with slow_reader(server, 50 * PAGES) as connection:
        time.sleep(0.8)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # the rest quickly
        with suppress(ConnectionError):
            connection.rest()
    assert 0 < sum("/page.css" in line for line in server.lines) < 25  # 13 KB each


def test_who_takes_it_slowly_is_not(start, monkeypatch) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 1.0)  # for 20 KB
    pieces: list[bytes] = []
    last = PAGES.replace(b"Host", b"Connection: close\r\nHost")
    with slow_reader(start(), 499 * PAGES + last, 16384) as connection:
        for _ in range(50):
            time.sleep(0.05)
            pieces.append(connection.recv(16384))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # the rest quickly
        pieces.append(connection.rest())
    assert b"".join(pieces).count(b"HTTP/1.1 200 OK") == 500


@pytest.mark.parametrize(
    ("asked", "end"),
    [
        (HEAD + b"\r\n", OK),
        (post({**LONG, "max_tokens": 40}), b"}}"),
        (post({**LONG, "max_tokens": 40, "stream": True}), b"[DONE]\n\n\r\n0\r\n\r\n"),
        (post({**LONG, "max_tokens": 40}).replace(b"HTTP/1.1", b"HTTP/1.0"), b"}}"),
        ((HEAD + b"\r\n") * 2 + post({**LONG, "max_tokens": 9}), b"}}"),
    ],
)
def test_who_has_ended_its_half_is_answered(start, slow, asked: bytes, end: bytes) -> None:
    slow(0.02)
    connection = start().connect(asked)
    connection.shutdown(socket.SHUT_WR)
    answer = connection.rest()
    assert answer.endswith(end)
    assert answer.count(b"HTTP/1.1 200 OK") == asked.count(b"HTTP/1.")


def test_who_ended_its_half_in_the_middle_is_not_waited_for(start) -> None:
    server = start()
    for asked in (b"", HEAD, post(LONG)[:-1]):
        connection = server.connect(asked)
        connection.shutdown(socket.SHUT_WR)
        assert connection.rest() == b""


@pytest.mark.parametrize("stream", [False, True])
def test_who_went_altogether_is_not_taken_for_one_that_listens(start, slow, stream: bool) -> None:
    slow(0.01)
    server = start()
    with server.connect(post({**LONG, "stream": stream})):
        server.wait_busy()
    server.wait_idle()
    assert server.metric("blt_edge_generated_bytes_total") < 200
    server.wait_until(lambda: any(" 499 " in line for line in server.lines))


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
