"""What is too much, too slow or not wanted any more."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import anyio
import httpx
import pytest
from blt_edge.runtime import BltError, GenerationOptions
from blt_edge.runtime.prefix_store import StoredChoices
from blt_edge.tools.server import body, completions, service

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"prompt": "Once", "max_tokens": 480, "temperature": 0, "draft": "none"}


@pytest.fixture
def behind() -> Iterator[Callable[..., Future[httpx.Response]]]:
    """`behind(server, document)` posts in a thread."""
    with ThreadPoolExecutor(24) as pool:
        yield lambda server, document: pool.submit(server.post, document)


@pytest.fixture
def busy(start, slow, behind) -> Callable[..., tuple[Any, Future[httpx.Response]]]:
    """`busy(60, queue=1, ...)` -> a slow server with these settings, and its answer of so many bytes.

    It has one text at work at a time, unless told otherwise.
    """

    def running(max_tokens: int = 100, pace: float = 0.01, **settings: Any) -> tuple[Any, Any]:
        slow(pace)
        server = start(**{"parallel": 1, **settings})
        answer = behind(server, {**LONG, "max_tokens": max_tokens})
        server.wait_busy()
        return server, answer

    return running


def codes(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def events(answer: httpx.Response) -> list[str]:
    return [line for line in answer.text.splitlines() if line]


def last_code(answer: httpx.Response) -> str:
    """The error that a stream ends with."""
    return str(json.loads(events(answer)[-1][6:])["error"]["code"])


def test_a_full_queue_is_429_and_the_rest_is_answered_in_order(busy, behind) -> None:
    server, running = busy(60, queue=1)
    waiting = behind(server, {"temperature": 0})
    server.wait_busy(waiting=1)
    assert server.metric("blt_edge_queue_length") == 1
    refused = server.post({})
    assert codes(refused) == (429, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert waiting.result().status_code == 200
    assert running.done()
    assert running.result().status_code == 200


def test_nothing_may_wait_but_one_may_run(busy) -> None:
    server, running = busy(60, queue=0)
    assert codes(server.post({})) == (429, "queue_full")
    assert running.result().status_code == 200


def test_a_turn_that_does_not_come_is_503(busy) -> None:
    server, running = busy(queue_timeout=0.2)
    late = server.post({})
    assert codes(late) == (503, "queue_timeout")
    assert "retry-after" in late.headers
    assert running.result().status_code == 200  # the limit is for waiting only


def test_a_request_that_takes_too_long(start, slow) -> None:
    slow(0.02)
    server = start(timeout=0.5)
    late = server.post(LONG)
    assert codes(late) == (504, "timeout")
    assert late.headers["x-should-retry"] == "false"
    streamed = server.post({**LONG, "stream": True})
    assert (streamed.status_code, last_code(streamed)) == (200, "timeout")
    assert len(events(streamed)) > 3
    assert "[DONE]" not in streamed.text
    server.wait_idle()
    assert server.lines[-1].startswith("POST /v1/completions 504 ")
    assert server.metric("blt_edge_generated_bytes_total") < 2 * 480


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_text(start, slow, stream: bool) -> None:
    slow(0.01)
    server = start()
    options = {"json": {**LONG, "stream": stream}, "timeout": 0.4}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{server.url}/v1/completions", **options) as answer,
    ):
        next(answer.iter_lines())
    server.wait_idle()
    assert server.metric("blt_edge_generated_bytes_total") < 400
    server.wait_until(lambda: any(" 499 " in line for line in server.lines))
    assert server.post({}).status_code == 200


def test_a_client_that_leaves_the_queue_is_forgotten(busy) -> None:
    server, running = busy()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.2)
    server.wait_busy(waiting=0)
    assert running.result().status_code == 200
    server.wait_idle()
    assert server.metric("blt_edge_generated_bytes_total") == 100  # nothing of the one that left


def test_bodies_that_are_too_long(start) -> None:
    server = start(max_body=1000)
    kind = {"Content-Type": "application/json"}
    for content in (b"x" * 1001, b"x" * 20_000, iter([b"x" * 100] * 20)):
        assert codes(server.post(content=content, headers=kind)) == (413, "body_too_large")
    exact = json.dumps({"prompt": "a", "max_tokens": 1}).encode().ljust(1000)
    assert server.post(content=exact, headers=kind).status_code == 200
    unasked = HEAD + b"Content-Length: 99999\r\nExpect: 100-continue\r\n\r\n"
    assert server.connect(unasked).rest().startswith(b"HTTP/1.1 413 ")  # and nothing of it asked for


def test_a_body_that_does_not_come(start) -> None:
    answer = start(timeout=0.3).connect(HEAD + b'Content-Length: 99\r\n\r\n{"prompt": ').rest()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"timeout"' in answer


def test_a_body_that_stops_coming(start, monkeypatch) -> None:
    monkeypatch.setattr(body, "BODY_SECONDS", 0.2)
    begun = HEAD + b'Content-Length: 60\r\n\r\n{"prompt": "a", '
    answer = start().connect(begun).rest()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 0.2 s" in answer
    with start().connect(begun) as connection:
        for _ in range(6):  # as long as something comes, it is waited for
            time.sleep(0.1)
            connection.sendall(b" ")
        connection.sendall(b'"max_tokens": 1}'.rjust(60 - 22))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_the_model_waits_for_a_client_that_does_not_keep_up(start, monkeypatch) -> None:
    """Of a text of 1,920 bytes no more is made than may be unsent, and what the system holds."""
    monkeypatch.setattr(service, "MOST_UNSENT", 20)
    monkeypatch.setattr(completions._Answer, "_send_part", lambda *given: anyio.sleep(0.3))
    server = start()
    body = json.dumps({**LONG, "n": 4, "stream": True}).encode()
    with server.connect(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body):
        server.wait_busy()
        for _ in range(20):
            time.sleep(0.02)
            assert all(exchange._unsent < 60 for exchange in server.service.exchanges)
            assert all(exchange._arrivals.qsize() < 60 for exchange in server.service.exchanges)
        assert not server.service.queue.idle
    server.wait_idle()  # it has left: the thread is not held
    monkeypatch.undo()
    assert server.post({}).status_code == 200


def test_a_client_that_does_not_read_is_cut_off(start) -> None:
    server = start(timeout=1.0)
    body = json.dumps({**LONG, "n": 128, "logprobs": 20, "blt_details": True, "stream": True}).encode()
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_until(lambda: any(" 504 " in line for line in server.lines))
    server.wait_idle()
    assert server.post({}).status_code == 200


def test_what_was_accepted_is_finished_and_what_is_new_refused(busy, behind) -> None:
    server, running = busy(grace=30.0)
    waiting = behind(server, {"temperature": 0})
    server.wait_busy(waiting=1)
    server.service.stop()
    assert codes(server.post({})) == (503, "stopping")
    assert server.get("/healthz").status_code == 503
    assert running.result().json()["usage"]["completion_tokens"] == 100
    assert waiting.result().status_code == 200
    assert server.ended.wait(30)
    assert any(line.startswith("stopping:") for line in server.lines)


def test_after_the_grace_what_runs_is_cut_off_and_told_why(busy, behind) -> None:
    server, running = busy(480, pace=0.02, grace=0.2)
    streamed = behind(server, {**LONG, "stream": True})
    server.wait_busy(waiting=1)
    server.service.stop()
    assert codes(running.result()) == codes(streamed.result()) == (503, "stopping")
    assert server.ended.wait(30)


def test_a_stream_that_has_begun_is_told_why_it_ends(start, slow, behind) -> None:
    slow(0.02)
    server = start(grace=0.2)
    streamed = behind(server, {**LONG, "stream": True})
    server.wait_until(lambda: server.service.metrics.first_byte._sum.get() > 0)
    server.service.stop()
    assert last_code(streamed.result()) == "stopping"


@pytest.mark.parametrize(
    ("error", "code"), [(BltError("broken"), "model_error"), (RuntimeError("secret"), "internal_error")]
)
def test_a_model_that_fails(start, monkeypatch, error: Exception, code: str) -> None:
    server = start()

    def fail(*given: object, **named: object) -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(StoredChoices, "stream", fail)
    for stream in (False, True):
        answer = server.post({"stream": stream})
        assert codes(answer) == (500, code)
        assert ("broken" in answer.text, "secret" in answer.text) == (code == "model_error", False)
    assert len(server.errors) == (2 if code == "internal_error" else 0)
    monkeypatch.undo()
    assert server.post({}).status_code == 200


def test_an_error_in_the_middle_of_a_stream(start, monkeypatch) -> None:
    server = start()
    before = StoredChoices.stream

    def fail(self, *given: object, **named: object) -> Iterator[object]:
        for count, chunk in enumerate(before(self, *given, **named)):
            if count == 2:
                time.sleep(0.2)  # so that the stream has begun
                raise BltError("the logits are broken")
            yield chunk

    monkeypatch.setattr(StoredChoices, "stream", fail)
    answer = server.post({**LONG, "stream": True})
    assert len(events(answer)) >= 2
    assert last_code(answer) == "model_error"


def test_many_at_once_are_all_answered_right(start, model, behind) -> None:
    server = start(queue=100)
    asked = [{"prompt": f"{seed}", "max_tokens": 12, "temperature": 1, "seed": seed} for seed in range(24)]
    answers = [behind(server, one) for one in asked]
    for seed, answer in enumerate(answers):
        expected = model.generate(f"{seed}", GenerationOptions(12, temperature=1.0, seed=seed))
        assert answer.result().json()["choices"][0]["text"] == expected.text
