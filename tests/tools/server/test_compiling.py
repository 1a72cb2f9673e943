"""What texts must fit is compiled before a request's turn, while others are answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import anyio
import httpx
import pytest
from blt_edge.runtime import GenerationOptions, OptionError, constraint_library, guide
from blt_edge.tools.server import compiling
from blt_edge.tools.server.compiling import _TooManyError, _Turns

pytest.importorskip("llguidance")
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Gate:
    """Compiling that waits until it is let on."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.opened = threading.Event()
        self.before = compiling.prepare

    def __call__(self, options: GenerationOptions) -> Any:
        assert options.constraint is not None
        self.began.append(options.constraint.source)
        assert self.opened.wait(30)
        return self.before(options)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    one = Gate()
    monkeypatch.setattr(compiling, "prepare", one)
    yield one
    one.opened.set()


@pytest.fixture
def behind() -> Iterator[Callable[..., Future[httpx.Response]]]:
    """`behind(server, document)` posts in a thread."""
    with ThreadPoolExecutor(24) as pool:
        yield lambda server, document: pool.submit(server.post, document)


def waiting(server: Any) -> int:
    return len(server.service.compiler._turns._waiting)


def error(answer: httpx.Response) -> tuple[int, str, str]:
    told = answer.json()["error"]
    return answer.status_code, told["code"], told["param"]


def pattern(number: int) -> str:
    return f"only here, {number}: [ab]{{3}}"


def test_others_are_answered_meanwhile(start, gate: Gate, behind) -> None:
    server = start()
    slow = [behind(server, {"guided_regex": pattern(number), "max_tokens": 60}) for number in range(3)]
    server.wait_until(lambda: len(gate.began) == 1 and waiting(server) == 2)
    assert server.post({}).status_code == 200
    assert server.post({"guided_choice": ["yes", "no"]}).json()["choices"][0]["text"] in ("yes", "no")
    assert server.get("/healthz").status_code == 200
    assert server.service.queue.idle
    gate.opened.set()
    for number, answer in enumerate(slow):
        assert answer.result().json()["choices"][0]["text"].startswith(f"only here, {number}: ")
    assert len(gate.began) == 3  # one at a time
    assert server.post({"guided_regex": pattern(0)}).status_code == 200
    assert len(gate.began) == 3  # it is compiled
    assert server.metric('blt_edge_constrained_requests_total{kind="regex"}') == 4
    assert server.metric('blt_edge_constrained_requests_total{kind="choice"}') == 1


def test_too_many_are_429_and_too_long_a_wait_is_503(start, gate: Gate, behind) -> None:
    server = start(queue=0, parallel=1, queue_timeout=0.3)
    first = behind(server, {"guided_regex": pattern(10)})
    server.wait_until(lambda: len(gate.began) == 1)
    second = behind(server, {"guided_grammar": "start: " + '"a"'})
    server.wait_until(lambda: waiting(server) == 1)
    refused = server.post({"guided_regex": pattern(12)})
    assert error(refused) == (429, "queue_full", "guided_regex")
    assert int(refused.headers["retry-after"]) >= 1
    assert error(second.result()) == (503, "queue_timeout", "guided_grammar")
    assert second.result().headers["retry-after"]
    gate.opened.set()
    assert first.result().status_code == 200
    assert len(gate.began) == 1


@pytest.mark.parametrize("compiles", [True, False])
def test_of_a_client_that_leaves_nothing_is_left(start, gate: Gate, behind, compiles: bool) -> None:
    server = start()
    if not compiles:
        other = behind(server, {"guided_regex": pattern(20)})
        server.wait_until(lambda: len(gate.began) == 1)
    body = b'{"prompt": "a", "guided_regex": "left behind, %d: [ab]{3}"}' % compiles
    connection = server.connect(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    server.wait_until(lambda: len(gate.began) == 1 and waiting(server) == (not compiles))
    connection.close()
    scopes = server.service.compiler._scopes
    server.wait_until(
        lambda: any(scope.cancel_called for scope in [*scopes]) or waiting(server) < 1 - compiles
    )
    gate.opened.set()
    server.wait_until(lambda: any(" 499 " in line for line in server.lines))
    server.wait_idle()
    assert len(gate.began) == 1
    if not compiles:
        assert other.result().status_code == 200
    assert server.metric("blt_edge_prompt_bytes_total") == (0 if compiles else 4)
    assert server.post({"guided_regex": pattern(21)}).status_code == 200  # the turn was passed on


def test_a_server_that_stops_says_so(start, gate: Gate, behind) -> None:
    server = start()
    asked = [behind(server, {"guided_regex": pattern(number)}) for number in (30, 31)]
    server.wait_until(lambda: len(gate.began) == 1 and waiting(server) == 1)
    server.service.stop()
    compiles = gate.began[0] != pattern(30)
    assert error(asked[not compiles].result()) == (503, "stopping", None)
    gate.opened.set()
    assert error(asked[compiles].result()) == (503, "stopping", None)


def test_what_is_compiled_stays_so_until_its_texts_have_begun(start, slow, behind) -> None:
    server = start(parallel=1)
    slow(0.01)
    first = behind(server, {"max_tokens": 100, "draft": "none"})
    server.wait_busy()
    later = behind(server, {"guided_regex": pattern(40), "max_tokens": 40})
    server.wait_busy(waiting=1)
    for number in range(40):  # more than are kept
        guide.new_guide(GenerationOptions(constraint=compiling.Constraint.regex(f"others{number}")))
    assert first.result().status_code == 200
    assert later.result().json()["choices"][0]["text"].startswith("only here, 40: ")


def test_what_its_texts_filled_goes_with_them(start, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each text of a constraint would be nearer to the library's limits than the one before."""
    monkeypatch.setattr(constraint_library, "_MOST_TAKEN", 30)
    gate.opened.set()
    server, asked = start(), {"guided_regex": "only here, 60: [ab]{40}", "max_tokens": 60}
    for number in range(1, 4):
        assert server.post(asked).status_code == 200
        server.wait_idle()
        assert len(gate.began) == number
        assert compiling.Constraint.regex(asked["guided_regex"]) not in constraint_library._in_use


def test_what_broke_is_compiled_anew_before_a_turn(start, gate: Gate, monkeypatch) -> None:
    """As it does where its texts have reached a limit of the library's; else the queue's thread compiles."""
    gate.opened.set()
    server, asked = start(), {"guided_regex": "only here, 61: [ab]{4}", "max_tokens": 60}
    assert server.post(asked).status_code == 200
    with monkeypatch.context() as patched:
        patched.setattr(constraint_library.LibraryRule, "allowed", lambda rule: rule.advance(0))
        assert error(server.post(asked)) == (400, "invalid_value", "guided_regex")
    for _ in range(2):
        assert server.post(asked).status_code == 200
        assert len(gate.began) == 2


def test_without_the_library(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_LIBRARY", "a library that is not there")
    server = start()
    refused = server.post({"response_format": {"type": "json_object"}})
    assert error(refused) == (501, "not_installed", "response_format")
    assert "install the extra guide" in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert server.post({"guided_choice": ["yes"]}).json()["choices"][0]["text"] == "yes"
    assert server.post({"response_format": {"type": "text"}, "utf8": True}).status_code == 200


def test_a_failure_that_nobody_foresaw_leaves_the_turn_to_others(start, monkeypatch) -> None:
    before = compiling.prepare

    def fail(options: GenerationOptions) -> Any:
        if options.constraint is not None and "fails" in options.constraint.source:
            raise ZeroDivisionError
        return before(options)

    monkeypatch.setattr(compiling, "prepare", fail)
    server = start()
    assert server.post({"guided_regex": "fails"}).status_code == 500
    assert [type(one) for one in server.errors] == [ZeroDivisionError]
    assert server.post({"guided_regex": pattern(50)}).status_code == 200


def test_clients_take_turns() -> None:
    order: list[str] = []

    async def take(turns: _Turns, client: str) -> None:
        async with turns.turn(client[0]):
            order.append(client)
            await anyio.sleep(0)

    async def all_at_once() -> None:
        turns = _Turns(8)
        async with anyio.create_task_group() as group:
            for client in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
                group.start_soon(take, turns, client)
        assert not turns._taken
        assert not turns._waiting
        assert not turns._last

    anyio.run(all_at_once)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_clients_that_come_again_and_again_keep_nobody_from_a_turn() -> None:
    order: list[str] = []

    async def take(turns: _Turns, client: str, times: int) -> None:
        for _ in range(times):
            async with turns.turn(client):
                order.append(client)
                await anyio.sleep(0)

    async def all_at_once() -> None:
        turns = _Turns(8)
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(take, turns, "many", 1)
            for client in ("one", "other"):
                group.start_soon(take, turns, client, 20)
        assert not turns._last

    anyio.run(all_at_once)
    assert len(order) == 43
    assert [order.index("many", at) for at in (0, 1, 4)] == [0, 3, 6]


def test_a_turn_that_comes_as_one_leaves_is_passed_on() -> None:
    async def leave() -> None:
        turns, had = _Turns(8), list[str]()

        async def take(name: str) -> None:
            async with turns.turn(name):
                had.append(name)

        async with turns.turn("first"):
            leaving, staying = (asyncio.create_task(take(name)) for name in ("leaves", "stays"))
            await asyncio.sleep(0.01)
        leaving.cancel()  # its turn has come, and it does not know yet
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await staying
        assert had == ["stays"]
        assert not turns._taken

    anyio.run(leave)


def test_a_refusal_names_the_parameter(start) -> None:
    server = start()
    for field, value in (
        ("guided_regex", "[a"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "what"}}}),
        ("grammar", "root ::= other"),
        ("structured_outputs", {"json": {"type": "string", "format": "zip"}}),
    ):
        for stream in (False, True):
            refused = server.post({field: value, "stream": stream})
            assert error(refused) == (400, "invalid_value", field)
            message = refused.json()["error"]["message"]
            assert message.startswith(f"{field}: the ")
            assert "\n" not in message
    assert server.errors == []


def test_what_can_t_be_followed_further_names_it_too(start, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(guide: Any) -> Any:
        raise OptionError("constraint: the regex can't be followed further: it is told so")

    server = start()
    monkeypatch.setattr(guide.Guide, "mask", stuck)
    refused = server.post({"guided_regex": "[ab]{9}"})
    assert error(refused) == (400, "invalid_value", "guided_regex")
    assert server.post({}).status_code == 200


def test_the_number_that_wait_is_bounded() -> None:
    async def crowd() -> None:
        turns = _Turns(0)
        async with turns.turn("a"):
            with pytest.raises(_TooManyError):
                async with turns.turn("b"):
                    pass

    anyio.run(crowd)
