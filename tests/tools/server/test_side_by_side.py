"""Several requests at work at a time: each is answered as if alone, whatever becomes of the others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.export.build_ort import build_engine
from blt_edge.runtime import BltModel, Constraint, GenerationOptions
from blt_edge.runtime.errors import BackendError, OutOfMemoryError
from blt_edge.runtime.prefix_store import StoredChoices
from blt_edge.tools.server import completions, service
from support.random_models import write_random_model
from support.state_walks import LIMITS, WIDE
from support.unreliable import Unreliable

from .conftest import Running, running

TEXT = (Path(__file__).parents[2] / "data" / "alice.txt").read_text("utf-8")
ROWS = (2, 4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an engine whose graphs take up to four texts."""
    folder = tmp_path_factory.mktemp("packed")
    write_random_model(WIDE, folder / "checkpoint")
    made = export_checkpoint(folder / "checkpoint", folder / "bundle")
    build_engine(made, rows=ROWS)
    return made


@pytest.fixture(scope="module")
def packed(bundle: Path) -> BltModel:
    model = BltModel.load(bundle, device="cpu", threads=1, **LIMITS)
    assert model.rows == ROWS
    return model


@pytest.fixture
def start(bundle: Path) -> Iterator[Callable[..., Running]]:
    """`start(parallel=4, model=...)` -> a server of the bundle, until the test ends."""
    with ExitStack() as stack:

        def begin(model: BltModel | None = None, **settings: Any) -> Running:
            model = model or BltModel.load(bundle, device="cpu", threads=1, **LIMITS)
            return stack.enter_context(running(model, **settings))

        yield begin


@pytest.fixture
def behind() -> Iterator[Callable[..., Future[httpx.Response]]]:
    """`behind(server, document)` posts in a thread."""
    with ThreadPoolExecutor(24) as pool:
        yield lambda server, document: pool.submit(server.post, document)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Texts of at least 100 bytes wait at their 50th until the event is set; others go on."""
    gate, before = threading.Event(), StoredChoices.stream

    def stream(self: StoredChoices, number: int) -> Iterator[Any]:
        made = 0
        for chunk in before(self, number):
            made += len(chunk.data)
            if made >= 50 and self._options.max_new_bytes >= 100:
                service.pause(lambda: gate.is_set() or self._cancel.is_set())
            yield chunk

    monkeypatch.setattr(StoredChoices, "stream", stream)
    return gate


def ask(number: int, most: int = 24, **fields: Any) -> dict[str, Any]:
    at = 31 * number
    prompt = TEXT[at : at + 20 + 13 * (number % 5)]
    return {"prompt": prompt, "max_tokens": most, "temperature": 1, "seed": number, **fields}


def right(model: BltModel, asked: dict[str, Any], choice: int = 0, prompt: str | None = None) -> str:
    """What `generate` makes of it."""
    seed = asked.get("seed")
    options = GenerationOptions(
        asked["max_tokens"],
        temperature=float(asked["temperature"]),
        seed=None if seed is None else seed + choice,
        draft=asked.get("draft", "auto"),
    )
    return model.generate(asked["prompt"] if prompt is None else prompt, options).text


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


@pytest.mark.parametrize("draft", ["auto", "none"])
@pytest.mark.parametrize("memory", [None, 0])
def test_many_at_once_are_answered_as_each_alone(
    start, packed, behind, draft: str, memory: int | None
) -> None:
    server = start(cache_memory=memory)
    assert server.service.parallel == 4
    asked = [ask(number, draft=draft) for number in range(10)]
    answers = [behind(server, one) for one in asked]
    for one, answer in zip(asked, answers, strict=True):
        assert texts(answer.result()) == [right(packed, one)]
    passes = server.service.metrics.text().decode()
    assert 'blt_edge_pass_texts_bucket{le="1.0",stage="decoder"}' in passes
    counts = {
        name: server.metric(f'blt_edge_pass_texts_{name}{{stage="decoder"}}') for name in ("count", "sum")
    }
    assert counts["sum"] > counts["count"]  # some took several
    assert server.metric("blt_edge_queue_seconds_count") == 10
    assert server.metric("blt_edge_texts_at_work") == 0
    assert server.errors == []


@pytest.mark.parametrize("memory", [None, 0])
def test_choices_and_prompts_go_side_by_side(start, packed, memory: int | None) -> None:
    server = start(cache_memory=memory)
    prompts = [TEXT[:160], TEXT[:145] + "x", TEXT[200:240]]
    asked = ask(40, prompt=prompts, n=3)
    for stream in (False, True):
        answer = server.post(
            {**asked, "stream": stream, "stream_options": {"include_usage": True} if stream else None}
        )
        expected = [right(packed, asked, choice, prompt) for prompt in prompts for choice in range(3)]
        if stream:
            found = [""] * 9
            *events, last = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            for one in events:
                found[one["choices"][0]["index"]] += one["choices"][0]["text"]
            usage = last["usage"]
        else:
            found, usage = texts(answer), answer.json()["usage"]
        assert found == expected
        assert usage["prompt_tokens"] == sum(map(len, prompts))
        assert usage["completion_tokens"] == 9 * 24
    # Each prompt is read once; of the second, what it begins with like the first is not.
    if memory is None:
        most = sum(map(len, prompts)) - 100
        assert server.metric("blt_edge_prompt_bytes_total") <= most
    assert server.metric('blt_edge_pass_texts_count{stage="decoder"}') < 9 * 24


def test_each_of_several_fits_what_it_was_asked_to(start, packed, behind) -> None:
    pytest.importorskip("llguidance")
    server = start()
    kinds: list[tuple[dict[str, Any], Constraint | None]] = [
        ({"guided_regex": "[ab]{40}"}, Constraint.regex("[ab]{40}")),
        ({"guided_regex": "[0-9]{40}"}, Constraint.regex("[0-9]{40}")),
        ({"guided_choice": ["x" * 40, "x" * 39 + "y"]}, Constraint.choice(["x" * 40, "x" * 39 + "y"])),
        ({}, None),
    ]
    asked = [ask(number, 48, **kinds[number % 4][0]) for number in range(8)]
    answers = [behind(server, one) for one in asked]
    for number, answer in enumerate(answers):
        options = GenerationOptions(48, temperature=1.0, seed=number, constraint=kinds[number % 4][1])
        assert texts(answer.result()) == [packed.generate(asked[number]["prompt"], options).text]
    counts = [server.metric(f'blt_edge_pass_texts_{name}{{stage="decoder"}}') for name in ("count", "sum")]
    assert counts[1] > counts[0]  # some passes took several
    assert server.errors == []


def test_a_prompt_that_another_one_reads_just_now_is_waited_for(start, packed, behind) -> None:
    server = start()
    prompt = TEXT[:300]
    asked = [ask(number, prompt=prompt + TEXT[400 : 400 + 9 * number]) for number in range(4)]
    answers = [behind(server, one) for one in asked]
    for one, answer in zip(asked, answers, strict=True):
        assert texts(answer.result()) == [right(packed, one)]
    assert server.metric("blt_edge_prompt_bytes_total") < 300 + 4 * 64


def test_a_short_one_is_not_stuck_behind_long_ones(start, packed, behind, patient) -> None:
    server = start(parallel=3)
    long = [behind(server, ask(number, 200)) for number in (1, 2)]
    server.wait_until(lambda: server.service.queue.at_work == 2)
    assert texts(server.post(ask(3))) == [right(packed, ask(3))]
    assert not any(one.done() for one in long)
    patient.set()
    server.service.queue.look()
    for number, answer in zip((1, 2), long, strict=True):
        assert texts(answer.result()) == [right(packed, ask(number, 200))]


def test_many_choices_starve_nobody(start, packed, behind, patient) -> None:
    server = start(parallel=2)
    many = behind(server, ask(1, 100, n=8))
    server.wait_until(lambda: server.service.queue.at_work == 2)
    for number in (2, 3, 4):
        assert texts(server.post(ask(number))) == [right(packed, ask(number))]
    assert not many.done()
    patient.set()
    server.service.queue.look()
    assert texts(many.result()) == [right(packed, ask(1, 100), choice) for choice in range(8)]


def test_a_client_that_does_not_take_its_text_holds_nobody(start, packed, monkeypatch) -> None:
    monkeypatch.setattr(service, "MOST_UNSENT", 20)
    server, before, hold = start(parallel=2), completions._Answer._send_part, threading.Event()

    async def send(self: Any, body: bytes) -> None:
        while not hold.is_set():
            await service.asyncio.sleep(0.01)
        await before(self, body)

    monkeypatch.setattr(completions._Answer, "_send_part", send)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(server.post, ask(1, 200, stream=True))
        server.wait_until(lambda: any(one._is_behind() for one in server.service.exchanges))
        for number in (2, 3):
            assert texts(server.post(ask(number))) == [right(packed, ask(number))]
        assert server.service.queue.at_work == 1
        assert all(exchange._unsent < 60 for exchange in server.service.exchanges)
        hold.set()
        whole = "".join(
            json.loads(line[6:])["choices"][0]["text"] for line in slow.result().text.split("\n\n")[:-2]
        )
    assert whole == right(packed, ask(1, 200))


def test_who_leaves_or_fails_takes_nobody_along(start, packed, behind, patient, monkeypatch) -> None:
    """Of eight at work two leave, one has an error of ours, one a bug; the others are answered right."""
    before = StoredChoices.stream

    def stream(self: StoredChoices, number: int) -> Iterator[Any]:
        for made, chunk in enumerate(before(self, number)):
            yield chunk
            if made == 3 and self._prompt in (b"broken", b"bug"):
                raise (
                    BackendError("the logits are broken") if self._prompt == b"broken" else RuntimeError("no")
                )

    monkeypatch.setattr(StoredChoices, "stream", stream)
    server = start(parallel=8)
    good = [behind(server, ask(number, 120)) for number in range(4)]
    bad = [behind(server, ask(9, 120, prompt=prompt)) for prompt in ("broken", "bug")]
    for number in (1, 2):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=ask(number, 120), timeout=0.3)
    codes = [answer.result().json()["error"]["code"] for answer in bad]
    assert codes == ["model_error", "internal_error"]
    server.wait_until(lambda: server.service.queue.at_work == sum(not one.done() for one in good))
    patient.set()
    server.service.queue.look()
    for number, answer in enumerate(good):
        assert texts(answer.result()) == [right(packed, ask(number, 120))]
    server.wait_idle()
    assert [str(error) for error in server.errors] == ["no"]


def test_an_engine_that_fails_among_eight_texts(start, bundle, packed, behind) -> None:
    """They go on with the portable graphs, and so does what comes later."""
    model = BltModel.load(bundle, device="auto", threads=1, **LIMITS)
    failing = Unreliable(model._backends["decoder"], 60, BackendError("the device is gone"))
    model._backends["decoder"] = failing
    server = start(model, parallel=8)
    asked = [ask(number, 40) for number in range(8)]
    with pytest.warns(match="the portable graphs go on in its place"):
        found = [texts(answer.result()) for answer in [behind(server, one) for one in asked]]
    assert found == [[right(packed, one)] for one in asked]
    assert failing.left < 0
    assert texts(server.post(ask(9))) == [right(packed, ask(9))]


def test_memory_that_is_short_for_one_is_nothing_to_the_others(start, packed, behind, monkeypatch) -> None:
    before = StoredChoices.stream

    def stream(self: StoredChoices, number: int) -> Iterator[Any]:
        for made, chunk in enumerate(before(self, number)):
            yield chunk
            if made == 3 and self._prompt == b"large":
                raise OutOfMemoryError("decoder: no memory for 9 GB")

    server = start(parallel=4)
    monkeypatch.setattr(StoredChoices, "stream", stream)
    asked = [ask(1, 60), ask(2, 60, prompt="large"), ask(3, 60)]
    answers = [behind(server, one) for one in asked]
    assert answers[1].result().json()["error"]["message"] == "decoder: no memory for 9 GB"
    for number in (0, 2):
        assert texts(answers[number].result()) == [right(packed, asked[number])]


def test_one_that_takes_too_long_ends_alone(start, packed, behind, patient) -> None:
    server = start(parallel=4, timeout=1.0)
    late = behind(server, ask(1, 200))
    assert texts(server.post(ask(2))) == [right(packed, ask(2))]
    assert late.result().status_code == 504
    server.wait_idle()


def test_all_that_are_at_work_have_the_grace(start, packed, behind, patient) -> None:
    server = start(parallel=3, grace=30.0)
    answers = [behind(server, ask(number, 120)) for number in range(4)]
    server.wait_until(lambda: server.service.queue.at_work == 3 and server.service.queue.waiting == 1)
    server.service.stop()
    assert server.post(ask(9)).status_code == 503
    patient.set()
    server.service.queue.look()
    for number, answer in enumerate(answers):
        assert texts(answer.result()) == [right(packed, ask(number, 120))]
    assert server.ended.wait(30)


def test_after_the_grace_all_are_told(start, behind, patient) -> None:
    server = start(parallel=2, grace=0.2)
    answers = [behind(server, ask(number, 120)) for number in range(3)]
    server.wait_until(lambda: server.service.queue.at_work == 2)
    time.sleep(0.1)
    server.service.stop()
    assert {answer.result().json()["error"]["code"] for answer in answers} == {"stopping"}
    assert server.ended.wait(30)
