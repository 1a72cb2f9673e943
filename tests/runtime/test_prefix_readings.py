"""Texts of one batch that begin alike: one reads for all, and nobody waits for what never comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel, GenerationOptions, PrefixStore
from blt_edge.runtime.batch import Batch
from blt_edge.runtime.prefix_readings import Readings
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import export_random_model
from support.state_walks import LIMITS, WIDE

TEXT = (Path(__file__).parents[1] / "data" / "alice.txt").read_bytes()
GREEDY = GenerationOptions(6, draft="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BltModel:
    bundle = export_random_model(WIDE, tmp_path_factory.mktemp("wide"))
    return BltModel.load(bundle, "cpu", 1, portable=True, **LIMITS)


class Texts:
    """Texts of a store in one batch."""

    def __init__(self, model: BltModel, memory: int = 1 << 30) -> None:
        self.store, self.batch = PrefixStore(model, memory), model.batch()
        self.made: dict[str, bytes] = {}
        self.read: dict[str, int] = {}
        """Bytes of each one's prompt that were not there."""

    def begin(self, name: str, prompt: bytes, cancel: threading.Event | None = None) -> None:
        self.batch.start(partial(self._make, name, prompt, cancel))

    def _make(self, name: str, prompt: bytes, cancel: threading.Event | None) -> None:
        made = b""
        with closing(self.store.choices(prompt, GREEDY, cancel=cancel).stream(0)) as pieces:
            for chunk in pieces:
                made += chunk.data
                if chunk.stats:
                    self.read[name] = len(prompt) - chunk.stats.reused_bytes
        self.made[name] = made

    def run(self) -> None:
        while self.batch.step():
            pass
        assert not len(self.batch)


def test_the_same_prompt_is_read_once(model: BltModel) -> None:
    texts = Texts(model)
    for name in "abc":
        texts.begin(name, TEXT[:200])
    texts.run()
    assert texts.read == {"a": 200, "b": 0, "c": 0}
    assert set(texts.made.values()) == {model.generate(TEXT[:200], GREEDY).data}


def test_what_two_have_in_common_is_read_once_wherever_they_part(model: BltModel) -> None:
    for common in (70, 100, 150, 195, 200):
        texts = Texts(model)
        other = TEXT[:common] + TEXT[1000:1100]
        texts.begin("a", TEXT[:200])
        texts.begin("b", other)
        texts.run()
        assert texts.read == {"a": 200, "b": len(other) - common}
        assert texts.made["b"] == model.generate(other, GREEDY).data


def test_who_comes_while_it_is_read_waits_for_the_rest(model: BltModel) -> None:
    texts = Texts(model)
    texts.begin("a", TEXT[:300])
    texts.batch.attention = True
    for _ in range(20):
        texts.batch.step()
        texts.batch.attention = True
    texts.begin("b", TEXT[:300])
    texts.run()
    assert texts.read == {"a": 300, "b": 0}


def test_little_in_common_is_not_waited_for(model: BltModel) -> None:
    texts = Texts(model)
    texts.begin("a", TEXT[:200])
    texts.begin("b", TEXT[:40] + TEXT[900:960])
    texts.run()
    assert texts.read == {"a": 200, "b": 100}


def test_without_memory_nobody_waits(model: BltModel) -> None:
    texts = Texts(model, memory=0)
    for name in "ab":
        texts.begin(name, TEXT[:200])
    texts.run()
    assert texts.read == {"a": 200, "b": 200}
    assert texts.made["a"] == texts.made["b"]


def test_when_the_reader_ends_the_next_one_reads(model: BltModel) -> None:
    """Cancelled in the midst: what it has read is there, and nobody waits any longer."""
    texts, cancel = Texts(model), threading.Event()
    texts.begin("a", TEXT[:300], cancel)
    texts.begin("b", TEXT[:300])
    for _ in range(12):
        texts.batch.step()
    cancel.set()
    texts.run()
    assert texts.made["b"] == model.generate(TEXT[:300], GREEDY).data
    assert texts.made["a"] == b""
    assert 0 < texts.read["b"] < 300


def test_one_that_waits_can_be_cancelled(model: BltModel) -> None:
    texts, cancel = Texts(model), threading.Event()
    texts.begin("a", TEXT[:300])
    texts.begin("b", TEXT[:300], cancel)
    texts.batch.step()
    cancel.set()
    while "b" not in texts.made:
        texts.batch.step()
    assert "a" not in texts.made
    texts.run()
    assert texts.made == {"a": model.generate(TEXT[:300], GREEDY).data, "b": b""}


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 220), st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=5),
    st.sampled_from([1 << 30, 300_000, 0]),
)
def test_whatever_begins_alike_gets_its_own_text(
    model: BltModel, prompts: list[tuple[int, int, int]], memory: int
) -> None:
    texts, asked = Texts(model, memory), {}
    for number, (common, own, steps) in enumerate(prompts):
        asked[str(number)] = TEXT[:common] + TEXT[500 + 70 * number :][:own]
        texts.begin(str(number), asked[str(number)])
        for _ in range(steps):
            texts.batch.attention = True
            texts.batch.step()
    texts.run()
    assert texts.made == {name: model.generate(prompt, GREEDY).data for name, prompt in asked.items()}


@pytest.mark.parametrize("n", [2, 5])
def test_choices_side_by_side_are_those_in_turn(model: BltModel, n: int) -> None:
    store, batch, options = (
        PrefixStore(model, 1 << 30),
        model.batch(),
        GenerationOptions(12, temperature=1.0, seed=7),
    )
    made, ready = [b""] * n, []
    choices = store.choices(TEXT[:90], options, n=n, when_ready=lambda: ready.append(choices.ready))

    def work(number: int) -> None:
        for chunk in choices.stream(number):
            made[number] += chunk.data

    batch.start(partial(work, 0))
    while not choices.ready:
        batch.attention = True
        batch.step()
    for number in range(1, n):
        batch.start(partial(work, number))
    while batch.step():
        pass
    assert ready == [True]
    assert made == [one.data for one in model.choices(TEXT[:90], options, n=n)]
    # The prompt's state is kept, and the ends of all of them.
    assert store.figures.states == 1 + n
    following = TEXT[:90] + made[n - 1] + b"and"
    assert store.generate(following, GREEDY).stats.reused_bytes >= len(following) - 4


@pytest.mark.parametrize("prompt", [b"", TEXT[:20]])
@pytest.mark.parametrize("prompt_details", [False, True])
def test_that_others_may_begin_is_told_once_with_the_first_piece(
    model: BltModel, prompt: bytes, prompt_details: bool
) -> None:
    told: list[bool] = []
    options = GenerationOptions(9, prompt_details=prompt_details)
    choices = PrefixStore(model, 1 << 30).choices(prompt, options, n=2, when_ready=lambda: told.append(True))
    with closing(choices.stream(0)) as pieces:
        next(pieces)
        assert told == [True]
        assert choices.ready
        assert [*pieces]
    assert told == [True]


def test_what_goes_on_from_a_kept_state_tells_its_costs_where_it_goes_on(model: BltModel) -> None:
    """A state of another thread's, or from a file: automatic guesses need to know what passes cost here."""
    texts = Texts(model)
    texts.store.generate(TEXT[:100], GREEDY)
    assert not texts.batch.costs.known("decoder")
    texts.begin("a", TEXT[:120])
    texts.run()
    assert texts.read == {"a": 20}
    assert texts.batch.costs.known("decoder")


@dataclass
class Reader:
    length: int = 1


def test_who_is_worth_waiting_for() -> None:
    readings, reader, stops = Readings(few=10, rollback=4), Reader(), {51}
    data = bytes(range(100))
    assert readings.ahead(data, 0) is None
    with readings.begin(data, stops, reader) as reading:
        assert readings.ahead(b"x" + data, 0) is None
        assert readings.ahead(data[:9], 0) is None
        assert readings.ahead(data, 95) is None
        until = readings.ahead(data[:30] + b"x", 0)
        assert 31 in stops
        reading.reached = 64  # a pass to there has begun
        assert readings.ahead(data[:40] + b"x", 0) is None  # no state will be kept there
        assert readings.ahead(data[:50] + b"x", 0) is not None  # there it will
        assert readings.ahead(data[:97] + b"x", 0) is not None  # rolled back from the end
        assert 98 not in stops
        assert not until()
        reader.length = 31
        assert until()
        elsewhere: list[object] = []
        thread = threading.Thread(target=lambda: elsewhere.append(readings.ahead(data, 0)))
        thread.start()
        thread.join()
        assert elsewhere == [None]  # nobody would ask again there
        last = readings.ahead(data, 0)
        assert not last()
    assert last()
    assert readings.ahead(data, 0) is None


def test_a_text_alone_stops_when_another_thread_wants_it_to(model: BltModel) -> None:
    batch, wanted = Batch(4, 16), [False]
    batch.wanted = lambda: wanted[0]
    pieces: list[bytes] = []

    def work() -> Iterator[None]:
        for chunk in model.stream(TEXT[:20], GREEDY):
            pieces.append(chunk.data)
            wanted[0] = True

    batch.start(work)
    assert batch.step()
    assert 0 < len(pieces) < 6
    wanted[0] = False
    batch.step()
    while batch.step():
        wanted[0] = False
    assert b"".join(pieces) == model.generate(TEXT[:20], GREEDY).data
