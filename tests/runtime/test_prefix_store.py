"""A store of states: it gives the texts of a model without one, and stays within its budget."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
from blt_edge.runtime import (
    BackendError,
    BltModel,
    GenerationOptions,
    OptionError,
    PrefixStore,
    PromptTooLongError,
    Sequence,
    prefix_store,
)
from blt_edge.runtime.prefix_store import StoreFigures, default_memory
from blt_edge.runtime.prefix_tree import common_prefix
from blt_edge.runtime.state import memory_of
from blt_edge.runtime.vocabulary import byte_ids, decode, encode
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from support.model_store import altered
from support.state_walks import LAYOUTS, assert_like_fresh, export_wide, loaded
from support.unreliable import Unreliable

TEXT = b"When the lamp was lit, the boats came in: " * 7  # 294 bytes
PLENTY = 1 << 30
NONE = GenerationOptions(max_new_bytes=8, draft="none")


@pytest.fixture(autouse=True, scope="module")
def _short_distances() -> Iterator[None]:
    """Texts here have 300 bytes: what counts in hundreds happens in them, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_store, "_EVERY", 48)
        patch.setattr(prefix_store, "_FEW", 8)
        yield


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_wide(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def reference(wide: Path) -> BltModel:
    return BltModel.load(wide, "cpu", 1, portable=True)


@pytest.fixture(scope="module", params=LAYOUTS)
def any_layout(
    request: pytest.FixtureRequest, wide: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BltModel]:
    with loaded(wide, request.param, tmp_path_factory.mktemp("layout")) as model:
        yield model


class Counted:
    """A model like another, whose runs over bytes are counted."""

    def __init__(self, model: BltModel) -> None:
        self.model = altered(model)
        self.rows = 0
        self.model.observer = self._observe

    def _observe(self, stage: str, began: float, seconds: float, rows: int) -> None:
        self.rows += rows if stage == "encoder" else 0

    def read(self) -> int:
        """Positions read since the last time."""
        rows, self.rows = self.rows, 0
        return rows


def states(store: PrefixStore) -> dict[bytes, Sequence]:
    return {key: kept.sequence for key, kept in store._order.items()}


def taken(store: PrefixStore) -> int:
    """Memory of a store, counted from its states."""
    return memory_of(sequence.state for sequence in states(store).values())


# 1. The same texts.


class Requests(RuleBasedStateMachine):
    """Requests of all kinds to one store, each against the same model without."""

    model: ClassVar[BltModel]
    reference: ClassVar[BltModel]
    wanted: ClassVar[dict[tuple[bytes, GenerationOptions], bytes]] = {}
    memory = st.sampled_from([0, 100_000, 700_000, 2_000_000, PLENTY])

    def __init__(self) -> None:
        super().__init__()
        self.texts = [b"", TEXT[:100], b"\x00" * 60]
        self.store = PrefixStore(self.model, 700_000)

    @rule(memory=memory)
    def another_budget(self, memory: int) -> None:
        self.store = PrefixStore(self.model, memory)

    def prompt(self, which: int, cut: int, more: bytes) -> bytes:
        text = self.texts[which % len(self.texts)]
        return (text[: len(text) - cut % (len(text) + 1)] + more)[:280]

    def expect(self, prompt: bytes, options: GenerationOptions) -> bytes:
        if (prompt, options) not in self.wanted:
            self.wanted[prompt, options] = self.reference.generate(prompt, options).data
        return self.wanted[prompt, options]

    prompts: ClassVar[dict[str, Any]] = {
        "which": st.integers(0, 30),
        "cut": st.one_of(st.just(0), st.integers(0, 12), st.integers(0, 200)),
        "more": st.one_of(
            st.just(b""),
            st.binary(max_size=9),
            st.sampled_from([b" the", TEXT[:40], b"a" * 30, TEXT[50:150]]),
        ),
    }
    sampling: ClassVar[Any] = st.builds(
        lambda count, seed, draft, stop: GenerationOptions(
            max_new_bytes=count,
            temperature=0.0 if seed is None else 0.9,
            seed=seed,
            draft=draft,
            draft_length=None if draft == "none" else 4,
            stop=stop,
        ),
        st.integers(0, 14),
        st.one_of(st.none(), st.integers(0, 3)),
        st.sampled_from(["none", "decoder", "patcher", "lookup"]),
        st.sampled_from([(), (b"e", b"\x00\x00")]),
    )

    @rule(**prompts, options=sampling)
    def ask(self, which: int, cut: int, more: bytes, options: GenerationOptions) -> None:
        prompt = self.prompt(which, cut, more)
        made = self.store.generate(prompt, options)
        assert made.data == self.expect(prompt, options)
        assert made.stats.prompt_bytes == len(prompt)
        assert 0 <= made.stats.reused_bytes <= len(prompt)
        self.texts.append(prompt + made.data)

    @rule(**prompts, options=sampling, after=st.integers(0, 6))
    def leave(self, which: int, cut: int, more: bytes, options: GenerationOptions, after: int) -> None:
        prompt = self.prompt(which, cut, more)
        with closing(self.store.stream(prompt, options)) as chunks:
            begun = b"".join(chunk.data for chunk in islice(chunks, after))
        assert self.expect(prompt, options).startswith(begun)

    @rule(**prompts, options=sampling, rounds=st.integers(1, 9))
    def cancel(self, which: int, cut: int, more: bytes, options: GenerationOptions, rounds: int) -> None:
        prompt = self.prompt(which, cut, more)
        made = self.store.generate(prompt, options, cancel=Countdown(rounds))
        assert self.expect(prompt, options).startswith(made.data)

    @rule(**prompts, options=sampling, n=st.integers(2, 3))
    def choose(self, which: int, cut: int, more: bytes, options: GenerationOptions, n: int) -> None:
        prompt = self.prompt(which, cut, more)
        made = [b""] * n
        for number, chunk in self.store.stream_choices(prompt, options, n=n, marks=[len(prompt) // 2]):
            made[number] += chunk.data
        assert made == [self.expect(prompt, one) for one in seeded(options, n)]

    @invariant()
    def it_stays_within_its_budget(self) -> None:
        figures = self.store.figures
        assert taken(self.store) <= figures.bytes <= max(self.store.memory, 0)
        assert figures.states == len(states(self.store)) == len(self.store._tree)

    def teardown(self) -> None:
        for key, sequence in states(self.store).items():  # whatever was made of them, they are what they were
            assert_like_fresh(self.reference, sequence.fork(), key)


class Countdown(threading.Event):
    """Set once it was asked so often."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def seeded(options: GenerationOptions, n: int) -> list[GenerationOptions]:
    return [
        options if options.seed is None else replace(options, seed=options.seed + number)
        for number in range(n)
    ]


def test_any_requests_get_the_texts_of_a_model_without_a_store(
    any_layout: BltModel, reference: BltModel
) -> None:
    machine = type("Machine", (Requests,), {"model": any_layout, "reference": reference})
    run_state_machine_as_test(
        machine, settings=settings(deadline=None, max_examples=4, stateful_step_count=8)
    )


def test_a_state_is_found_that_has_most_in_common(tight: BltModel) -> None:
    """Against every kept state, one after the other."""
    store = PrefixStore(tight, PLENTY)
    texts = [b"", b"a", b"ab" * 40, TEXT, TEXT[:130], TEXT[:130] + b"x" * 30, TEXT[:60] + b"yz", b"a\x00"]
    for text in texts:
        store.generate(text, NONE)
    rollback = tight.limits.rollback
    for text in texts:
        for prompt in (text, text[:-3], text[:-14], text + b"q", TEXT[:137], b"zzz"):
            wanted = 0
            for key, sequence in states(store).items():
                common = common_prefix(key, prompt)
                if len(key) - common <= rollback and sequence.state.can_roll_back(1 + common):
                    wanted = max(wanted, common)
            sequence, length = store.find(prompt) or (tight.sequence(), -1)
            assert length == (wanted if wanted or not prompt else -1)
            if length < 0:
                continue
            assert_like_fresh(tight, sequence, prompt[:length])


# 2. Nothing twice.


def test_a_conversation_that_sends_everything_again_reads_every_byte_once(tight: BltModel) -> None:
    counted = Counted(tight)
    store, text = PrefixStore(counted.model, PLENTY), b""
    for turn in range(12):
        text += b"%d: go on\n" % turn
        text += store.generate(text, NONE).data
    assert len(text) > 12 * 10
    # BOS is one, and the last byte was chosen, but nobody has asked for what follows it.
    assert counted.read() in (len(text), len(text) + 1)
    assert store.figures.misses == 1
    assert store.figures.hits == 11


def test_the_same_prompt_is_not_read_and_its_choices_read_it_once(tight: BltModel) -> None:
    counted = Counted(tight)
    store = PrefixStore(counted.model, PLENTY)
    first = store.generate(TEXT, max_new_bytes=1)
    assert counted.read() == 1 + len(TEXT)
    assert first.stats.reused_bytes == 0
    second = store.generate(TEXT, max_new_bytes=1)
    assert counted.read() == 0
    assert second.stats.reused_bytes == second.stats.prompt_bytes == len(TEXT)
    assert second.data == first.data
    assert second.stats.patches == first.stats.patches
    for source in (counted.model, PrefixStore(counted.model, 0), PrefixStore(counted.model, 20_000)):
        made = dict(source.stream_choices(TEXT, n=3, temperature=1, seed=5, max_new_bytes=1))
        assert counted.read() == 1 + len(TEXT)
        alone = [
            counted.model.generate(TEXT, temperature=1, seed=seed, max_new_bytes=1) for seed in (5, 6, 7)
        ]
        assert [one.data for one in made.values()] == [b""] * 3  # the last pieces
        counted.read()
        texts = [one.data for one in counted.model.choices(TEXT, n=3, temperature=1, seed=5, max_new_bytes=1)]
        assert texts == [one.data for one in alone]
        counted.read()


@pytest.mark.parametrize("new", [1, 20])
def test_every_choice_can_be_gone_on_with(tight: BltModel, new: int) -> None:
    counted = Counted(tight)
    store = PrefixStore(counted.model, PLENTY)
    asked = GenerationOptions(max_new_bytes=new, temperature=1, seed=3, draft="none")
    pieces: dict[int, bytes] = {}
    for number, chunk in store.stream_choices(TEXT, asked, n=3):
        pieces[number] = pieces.get(number, b"") + chunk.data
    assert pieces == {number: one.data for number, one in enumerate(tight.choices(TEXT, asked, n=3))}
    counted.read()
    for data in pieces.values():
        answer = store.generate(TEXT + data + b"!", NONE)
        assert answer.stats.reused_bytes >= len(TEXT + data) - 1
        assert answer.data == tight.generate(TEXT + data + b"!", NONE).data


def test_ends_of_choices_leave_half_of_the_memory_to_others(tight: BltModel) -> None:
    whole = PrefixStore(tight, PLENTY)
    asked = GenerationOptions(max_new_bytes=20, temperature=1, seed=3, draft="none")
    list(whole.stream_choices(TEXT, asked, n=1))
    cost = whole.figures.bytes // whole.figures.states  # at least: states of one text share
    store = PrefixStore(tight, 16 * cost)
    other = b"Of another text the end is kept. "
    store.generate(other, max_new_bytes=0)
    list(store.stream_choices(b"One. ", asked, n=40))
    assert 2 < store.figures.states < 20
    assert store.find(other) is not None
    assert store.find(other)[1] == len(other)
    assert not store.figures.evicted


def test_a_state_is_kept_where_prompts_part(tight: BltModel) -> None:
    counted = Counted(tight)
    store = PrefixStore(counted.model, PLENTY)
    common = TEXT[:130]
    store.generate(common + b"1" * 60, max_new_bytes=0)
    counted.read()
    store.generate(common + b"2" * 60, max_new_bytes=0)
    assert counted.read() <= 60 + 130 - 95  # from the last state on the way
    store.generate(common + b"3" * 60, max_new_bytes=0)
    assert counted.read() == 60
    # Where it is known before, the second one reads nothing twice.
    store.clear()
    for number in b"12":
        list(store.stream_choices(common + bytes([number]) * 60, max_new_bytes=0, marks=[130]))
    assert counted.read() == 1 + 130 + 120


def test_what_was_begun_and_given_up_is_not_read_again(tight: BltModel) -> None:
    counted = Counted(tight)
    store = PrefixStore(counted.model, PLENTY)
    assert store.generate(TEXT, NONE, cancel=Countdown(3)).finish_reason == "cancelled"
    begun = counted.read()
    assert 0 < begun < len(TEXT)
    store.generate(TEXT, max_new_bytes=0)
    assert begun + counted.read() == 1 + len(TEXT)


def test_prompt_details_are_those_of_a_prompt_that_is_read(tight: BltModel) -> None:
    counted = Counted(tight)
    store = PrefixStore(counted.model, PLENTY)
    asked = GenerationOptions(max_new_bytes=4, logprobs=2, prompt_details=True, temperature=1, seed=1)
    store.generate(TEXT, asked)
    counted.read()
    again = store.generate(TEXT, asked)
    fresh = tight.generate(TEXT, asked)
    assert counted.read() >= 1 + len(TEXT)
    assert len(again.prompt_details) == len(TEXT)
    assert again.stats.reused_bytes == 0
    for one, other in zip(again.prompt_details, fresh.prompt_details, strict=True):
        assert (one.byte, one.position, one.starts_patch) == (other.byte, other.position, other.starts_patch)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    # What was read for it is kept, and so is the answer's end.
    counted.read()
    store.generate(TEXT + again.data + b"!", max_new_bytes=0)
    assert counted.read() == 2  # the last byte of an answer has not been read
    # All choices tell of it, and the others go on from what it left.
    many = counted.model.choices(TEXT, asked, n=3)
    assert len({one.prompt_details for one in many}) == 1
    assert len(many[2].prompt_details) == len(TEXT)
    # Details of new bytes need nothing of the prompt.
    counted.read()
    told = store.generate(TEXT, max_new_bytes=1, logprobs=1, temperature=0)
    assert counted.read() == 0
    assert told.details[0].position == len(TEXT)
    assert told.details[0].entropy == pytest.approx(
        tight.generate(TEXT, max_new_bytes=1, details=True).details[0].entropy, abs=1e-4
    )


# 3. Budget and order.


def test_the_empty_prompt_is_kept_too(tight: BltModel) -> None:
    counted = Counted(tight)
    store = PrefixStore(counted.model, PLENTY)
    first = store.generate(b"", max_new_bytes=1)
    assert counted.read() == 1
    assert store.generate(b"", max_new_bytes=1).data == first.data
    assert counted.read() == 0
    assert store.figures == StoreFigures(1, store.figures.bytes, PLENTY, 1, 1, 0, 0)


def test_what_was_used_least_recently_goes_first(tight: BltModel) -> None:
    store = PrefixStore(tight, PLENTY)
    for text in (b"one", b"two", b"six"):
        store.generate(text, max_new_bytes=0)
    size = store.figures.bytes
    assert list(states(store)) == [b"one", b"two", b"six"]
    store = PrefixStore(tight, size + 1000)
    for text in (b"one", b"two", b"six", b"one", b"and"):
        store.generate(text, max_new_bytes=0)
    assert list(states(store)) == [b"six", b"one", b"and"]
    assert store.figures.evicted == 1


def test_no_memory_keeps_nothing_and_a_state_that_does_not_fit_costs_no_other(tight: BltModel) -> None:
    off = PrefixStore(tight, 0)
    assert off.generate(TEXT, NONE).data == off.generate(TEXT, NONE).data
    assert off.figures == StoreFigures()
    small = PrefixStore(tight, PLENTY)
    small.generate(b"small", max_new_bytes=0)
    store = PrefixStore(tight, small.figures.bytes)
    store.generate(b"small", max_new_bytes=0)
    store.generate(TEXT, max_new_bytes=0)
    assert list(states(store)) == [b"small"]
    assert store.figures.evicted == 0


def test_states_inside_a_prompt_leave_room_for_those_of_others(tight: BltModel) -> None:
    roomy = PrefixStore(tight, PLENTY)
    roomy.generate(TEXT, max_new_bytes=0)
    assert [len(key) + 1 for key in states(roomy)] == [48, 96, 144, 192, 240, 288, 295]
    store = PrefixStore(tight, roomy.figures.bytes)
    store.generate(b"other", max_new_bytes=0)
    store.generate(TEXT, max_new_bytes=0)
    assert b"other" in states(store)
    assert 2 <= len(states(store)) < 7


def test_memory_is_counted_as_it_is(tight: BltModel) -> None:
    store = PrefixStore(tight, PLENTY)
    for text in (TEXT, TEXT[:200] + b"!", b"x"):
        store.generate(text, NONE)
    extra = store.figures.bytes - taken(store)
    assert 0 < extra < 20_000 * store.figures.states
    store.clear()
    assert store.figures.bytes == store.figures.states == 0
    assert not store._holders


def test_nothing_is_held_that_is_not_counted(tight: BltModel) -> None:
    """As Python's allocator sees it, arrays and all; much of this model's state is room for long chunks."""
    tight = altered(tight, prefill_chunk=390)
    filler = PrefixStore(tight, PLENTY)
    filler.generate(TEXT, NONE)  # what is made once
    filler.clear()
    gc.collect()
    tracemalloc.start()
    try:
        store = PrefixStore(tight, PLENTY)
        for number in range(12):
            store.generate(b"%d" % number + TEXT[: 20 * number], NONE)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    figures = store.figures
    assert 0.5 * figures.bytes < held < 1.1 * figures.bytes


def test_the_default_is_a_share_of_what_is_free(tight: BltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, wanted in ((8_000_000, 2_000_000), (1 << 40, 2_000_000_000), (None, 256_000_000), (0, 0)):
        monkeypatch.setattr("blt_edge.runtime.backends.base.available_memory", lambda free=free: free)
        assert PrefixStore(tight).memory == default_memory(tight) == wanted


def test_a_lookup_takes_microseconds_and_a_fork(tight: BltModel) -> None:
    store = PrefixStore(tight, PLENTY)
    store.generate(TEXT, NONE)
    started = time.perf_counter()
    for _ in range(100):
        store.find(TEXT)
    assert (
        time.perf_counter() - started < 0.5
    )  # on a machine that is busy with much else; a tenth of it alone


# 4. What goes wrong.


def broken(model: BltModel, after: int, error: BaseException, **others: Any) -> BltModel:
    backends: dict[str, Any] = dict(model._backends)
    backends["decoder"] = Unreliable(backends["decoder"], after, error)
    return BltModel(model.manifest, backends, model._table, model.limits, model.path, model.engine, **others)


@pytest.mark.parametrize("error", [BackendError("it broke"), KeyboardInterrupt(), RuntimeError("bug")])
def test_of_a_text_that_failed_only_what_was_whole_is_kept(tight: BltModel, error: BaseException) -> None:
    """294 bytes are 19 passes; the seventh fails."""
    store = PrefixStore(broken(tight, 7, error), PLENTY)
    with pytest.raises((type(error), BackendError)):
        store.generate(TEXT, NONE)
    assert [len(key) + 1 for key in states(store)] == [48, 96]
    for key, sequence in states(store).items():
        assert_like_fresh(tight, other_engine(sequence, tight), key)


def other_engine(sequence: Sequence, model: BltModel) -> Sequence:
    fork = sequence.fork()
    fork._backends = dict(model._backends)
    fork._go_on_with(fork.state)
    return fork


@pytest.mark.filterwarnings("ignore::blt_edge.runtime.BltWarning")
def test_states_of_an_engine_that_failed_are_dropped(tight: BltModel) -> None:
    def portable() -> Any:
        return dict(tight._backends), replace(tight.engine, reason="another")

    model = broken(tight, 40, BackendError("it broke"), portable=portable)
    store = PrefixStore(model, PLENTY)
    first = store.generate(TEXT, NONE).data
    assert store.figures.states
    while model.engine is tight.engine:
        assert store.generate(TEXT[:200], NONE).data == tight.generate(TEXT[:200], NONE).data
    assert store.generate(TEXT, NONE).data == first
    assert all(
        sequence._backends["decoder"] is tight._backends["decoder"] for sequence in states(store).values()
    )


def test_where_memory_is_short_what_is_kept_makes_room(
    tight: BltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrefixStore(tight, PLENTY)
    wanted = store.generate(TEXT, NONE).data
    before = Sequence.fork

    def short(sequence: Sequence, **asked: Any) -> Sequence:
        if sequence in store.sequences():
            raise MemoryError
        return before(sequence, **asked)

    monkeypatch.setattr(Sequence, "fork", short)
    again = store.generate(TEXT, NONE)
    assert (again.data, again.stats.reused_bytes) == (wanted, 0)
    monkeypatch.undo()
    assert store.generate(TEXT, NONE).stats.reused_bytes == len(TEXT)


def test_a_text_that_gets_no_memory_leaves_the_next_one_what_was_kept(tight: BltModel) -> None:
    for error, left in ((BackendError("it broke"), 1), (MemoryError(), 0)):
        model = broken(tight, 1, error)
        store = PrefixStore(model, PLENTY)
        store.generate(b"abc", max_new_bytes=0)
        with pytest.raises(BackendError):
            store.generate(b"xyz", NONE)
        assert len(states(store)) == left


@pytest.mark.filterwarnings("ignore::blt_edge.runtime.BltWarning")
def test_nothing_is_kept_on_an_engine_that_failed_in_another_text(tight: BltModel) -> None:
    def portable() -> Any:
        return dict(tight._backends), replace(tight.engine, reason="another")

    model = broken(tight, 1, BackendError("it broke"), portable=portable)
    store, before = PrefixStore(model, PLENTY), model.sequence()
    before.append(encode(b"before"))
    assert store.generate(b"abc", NONE).data == tight.generate(b"abc", NONE).data
    assert store.keep(before) == 0
    before.append(byte_ids(b"!"))  # which takes it to the other engine
    assert store.keep(before) > 0
    assert_like_fresh(tight, store.find(b"before!")[0], b"before!")


def test_what_is_wrong_is_said_before_anything_is_read(tight: BltModel) -> None:
    counted = Counted(tight)
    store = PrefixStore(counted.model, PLENTY)
    with pytest.raises(PromptTooLongError, match="401 positions"):
        store.generate(b"x" * 400)
    with pytest.raises(OptionError, match="prompt"):
        store.stream(3)
    with pytest.raises(OptionError, match="there is no option 'colour'"):
        store.stream(b"", colour=1)
    with pytest.raises(OptionError, match="n is 0; allowed"):
        store.stream_choices(b"", n=0)
    with pytest.raises(OptionError, match="cancel"):
        store.stream(b"", cancel=1)
    with pytest.raises(OptionError, match=r"model is 'demo-bundle'; allowed is what BltModel\.load gives"):
        PrefixStore("demo-bundle")
    with pytest.raises(OptionError, match="memory is -1; allowed"):
        PrefixStore(counted.model, -1)
    with pytest.raises(OptionError, match="what sequence\\(\\) of this model gave"):
        store.keep(altered(tight, tight.manifest.patching).sequence())
    store.keep(counted.model.sequence())  # of nothing that was read there is nothing to keep
    for ids in ([1, 70, 2, 71], [70, 71]):
        special = counted.model.sequence()
        special.append(ids)
        store.keep(special)
    assert store.figures == StoreFigures(memory=PLENTY)


def test_threads_share_a_store(any_layout: BltModel, reference: BltModel) -> None:
    assert default_memory(any_layout) > 0
    store = PrefixStore(any_layout, 2_000_000)
    prompts = [TEXT[: 40 * (1 + number % 5)] + b"%d" % (number % 3) for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda prompt: store.generate(prompt, NONE).data, prompts))
    assert made == [reference.generate(prompt, NONE).data for prompt in prompts]
    assert taken(store) <= store.figures.bytes <= store.memory
    for key, sequence in states(store).items():
        assert decode(sequence.ids) == key
        assert sequence.ids.tolist() == encode(key).tolist()
        assert_like_fresh(reference, sequence.fork(), key)
