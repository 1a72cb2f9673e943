"""Several texts in one pass: each gets what it gets alone, whoever joins, leaves or fails beside it."""

from __future__ import annotations

import gc
import itertools
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.export.build_ort import build_engine
from blt_edge.runtime import BltModel, BltWarning, GenerationOptions, OptionError, Sequence, generation
from blt_edge.runtime.backends import ort_packed
from blt_edge.runtime.backends.base import Done, PackedPart, PackedStage
from blt_edge.runtime.batch import Batch, Task
from blt_edge.runtime.errors import BackendError
from blt_edge.runtime.lanes import LANE, own_seconds
from blt_edge.runtime.scoring import EmptyTextError, Score
from blt_edge.runtime.vocabulary import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import write_random_model
from support.state_walks import LIMITS, WIDE, agree, loaded
from support.unreliable import Unreliable

TEXT = (Path(__file__).parents[1] / "data" / "alice.txt").read_bytes()
ROWS = (2, 4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, BltModel]]:
    """A bundle with graphs for several texts: portable ones, an engine's with fused attention, and plans on a
    (simulated) GPU."""
    folder = tmp_path_factory.mktemp("packed")
    write_random_model(WIDE, folder / "checkpoint")
    bundle = export_checkpoint(folder / "checkpoint", folder / "bundle", rows=ROWS)
    build_engine(bundle, rows=ROWS)
    with ExitStack() as stack:
        yield {
            "ring": BltModel.load(bundle, device="cpu", threads=1, portable=True, **LIMITS),
            "ordered": BltModel.load(bundle, device="cpu", threads=1, **LIMITS),
            "tensorrt": stack.enter_context(loaded(bundle, "tensorrt", folder, rows=ROWS)),
            "cuda": stack.enter_context(loaded(bundle, "cuda", folder)),
        }


@pytest.fixture(params=["ring", "ordered"])
def model(request: pytest.FixtureRequest, packed: dict[str, BltModel]) -> BltModel:
    found = packed[request.param]
    assert found.rows == ROWS
    assert (found.engine.directory is not None) == (request.param != "ring")
    return found


@pytest.fixture(params=["ring", "ordered", "tensorrt"])
def anywhere(request: pytest.FixtureRequest, packed: dict[str, BltModel]) -> BltModel:
    """On a GPU, too."""
    return packed[request.param]


def run(batch: Batch, works: list[Callable[[], None]]) -> list[Task]:
    """All of them to their ends, none of which may be an error."""
    tasks = [batch.start(work) for work in works]
    while batch.step():
        pass
    for task in tasks:
        assert task.ended
        if task.error is not None:
            raise task.error
    return tasks


# 1. What a text gets.

STEPS = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 40)),
    st.tuples(st.just("back"), st.integers(1, 20)),
    st.tuples(st.just("fork"), st.just(0)),
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 500), st.lists(STEPS, min_size=1, max_size=6)), min_size=1, max_size=7),
    st.sampled_from(["ring", "ordered", "tensorrt", "cuda"]),
    st.data(),
)
def test_texts_that_share_passes_are_as_if_alone(
    packed: dict[str, BltModel],
    texts: list[tuple[int, list[tuple[str, int]]]],
    layout: str,
    data: st.DataObject,
) -> None:
    model = packed[layout]
    batch = model.batch()
    ends: dict[int, tuple[bytes, np.ndarray, list[int]]] = {}

    def work(number: int, first: int, steps: list[tuple[str, int]]) -> Callable[[], None]:
        def go() -> None:
            assert LANE.get() is not None
            sequence, read = model.sequence(), b""
            sequence.append(encode(b""))
            for what, count in steps:
                if what == "read":
                    more = TEXT[first + len(read) : first + len(read) + count]
                    sequence.append(encode(more)[1:])
                    read += more
                elif what == "back":
                    count = min(count, len(read))
                    sequence.roll_back(count)
                    read = read[: len(read) - count]
                else:
                    sequence = sequence.fork()
            ends[number] = (read, sequence.logits.copy(), list(sequence.boundaries.starts))

        return go

    # Some begin while others are on their way.
    tasks, later = [], list(enumerate(texts))
    while later or len(batch):
        while later and (not len(batch) or data.draw(st.booleans())):
            number, (first, steps) = later.pop(0)
            tasks.append(batch.start(work(number, first, steps)))
        batch.step()
    assert [task.error for task in tasks] == [None] * len(texts)
    for read, logits, starts in ends.values():
        fresh = model.sequence()
        fresh.append(encode(read))
        agree(logits, fresh.logits)
        assert starts == list(fresh.boundaries.starts)


@pytest.mark.parametrize("draft", ["none", "lookup", "patcher", "decoder", "auto"])
@pytest.mark.parametrize("seed", [None, 7])
def test_many_prompts_are_continued_as_each_alone(anywhere: BltModel, draft: str, seed: int | None) -> None:
    prompts = [b"", TEXT[:1], TEXT[100:140], bytes(range(256))[:90], TEXT[500:533], TEXT[100:140], b"\0" * 50]
    options = GenerationOptions(
        max_new_bytes=24, draft=draft, temperature=0.0 if seed is None else 0.9, seed=seed
    )
    alone = [anywhere.generate(prompt, options) for prompt in prompts]
    many = anywhere.generate_many(prompts, options)
    assert [one.data for one in many] == [one.data for one in alone]
    assert [one.finish_reason for one in many] == [one.finish_reason for one in alone]
    for one, reference in zip(many, alone, strict=True):
        assert one.stats.new_bytes == reference.stats.new_bytes
        assert one.stats.patches == reference.stats.patches
        assert one.stats.stage_calls["decoder"] > 0


@pytest.mark.parametrize("layout", ["ring", "ordered", "tensorrt", "cuda"])
def test_passes_take_as_many_texts_as_there_are_graphs_for(packed: dict[str, BltModel], layout: str) -> None:
    model = packed[layout]
    batch, most = model.batch(), dict.fromkeys(model.manifest.stages, 0)

    def see(stage: str, texts: int, seconds: float) -> None:
        most[stage] = max(most[stage], texts)
        assert seconds > 0

    batch.observer = see
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(batch, [lambda: model.generate(TEXT[:20], max_new_bytes=30) and None] * 6)
    assert most == dict.fromkeys(most, 4)


def test_what_a_run_costs_alone_is_what_the_engine_says(model: BltModel) -> None:
    """On a GPU a run is queued, and what it takes is known later: not what queueing it took."""
    batch = Batch(1, 256)
    batch.attention = True
    waiting = []

    class Queued:
        def run(self, done: Done) -> None:
            waiting.append(done)

    class OfOne:
        rows, packed_positions = (), None

    def work() -> None:
        lane = LANE.get()
        assert isinstance(lane, Task)
        told: list[float] = []
        stage = SimpleNamespace(name="encoder", backend=OfOne(), cache=None, shared={})
        lane.run(stage, Queued(), 3, told.append)
        waiting.pop()(0.25)
        assert told == [0.25]

    run(batch, [work, work])
    assert batch._chooser.costs.seconds("encoder", 3) == pytest.approx(0.25)


def test_more_texts_than_rows_and_fewer(model: BltModel) -> None:
    prompts = [TEXT[40 * number : 40 * number + 30] for number in range(9)]
    wanted = [model.generate(prompt, max_new_bytes=10).data for prompt in prompts]
    for rows in (1, 2, 3, 9, 64):
        assert [one.data for one in model.generate_many(prompts, max_new_bytes=10, rows=rows)] == wanted


def test_a_batch_is_right_with_and_without_packed_graphs_on_any_device(any_layout: BltModel) -> None:
    prompts = [TEXT[40 * number : 40 * number + 30] for number in range(3)]
    wanted = [any_layout.generate(prompt, max_new_bytes=10).data for prompt in prompts]
    assert [one.data for one in any_layout.generate_many(prompts, max_new_bytes=10, rows=3)] == wanted


def test_pieces_come_as_they_are_made(model: BltModel) -> None:
    prompts = [TEXT[:30], TEXT[50:90]]
    numbers = [number for number, _ in model.stream_many(prompts, max_new_bytes=12, draft="none")]
    assert numbers != sorted(numbers)


def test_a_piece_is_handed_out_before_the_next_pass(model: BltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    before, made = Batch._run, generation._Generation._chunk
    monkeypatch.setattr(Batch, "_run", lambda *given: (told.append("pass"), before(*given))[1])
    monkeypatch.setattr(
        generation._Generation, "_chunk", lambda *given: (told.append("made"), made(*given))[1]
    )
    for _ in model.stream_many([TEXT[:30], TEXT[50:90]], max_new_bytes=12, draft="none"):
        told.append("out")
    order = "".join(one[0] for one in told)
    assert "o" in order
    assert re.fullmatch(r"(p+(m+o+)+)+", order)  # of all that are made between two passes


def test_prompts_are_asked_for_when_their_turn_comes(model: BltModel) -> None:
    asked = []

    def prompts() -> Iterator[bytes]:
        for number in range(6):
            asked.append(number)
            yield TEXT[30 * number : 30 * number + 20]

    pieces = model.stream_many(prompts(), max_new_bytes=8, rows=2)
    next(pieces)
    assert len(asked) <= 3
    assert len({number for number, _ in pieces}) == 6


def test_batches_in_several_threads_do_not_mix(model: BltModel) -> None:
    prompts = [TEXT[31 * number : 31 * number + 20 + 7 * number] for number in range(6)]
    wanted = [model.generate(prompt, max_new_bytes=30).data for prompt in prompts]
    with ThreadPoolExecutor(3) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [pool.submit(model.generate_many, prompts, max_new_bytes=30) for _ in range(6)]
        assert [[one.data for one in many.result()] for many in found] == [wanted] * 6


# 2. Who leaves, fails, or is alone.


def test_what_one_raises_is_its_own(anywhere: BltModel) -> None:
    ends = []

    def good() -> None:
        ends.append(anywhere.generate(TEXT[:40], max_new_bytes=20).data)

    def bad() -> None:
        anywhere.generate(TEXT[:40], max_new_bytes=3)
        raise ValueError("mine")

    batch = anywhere.batch()
    tasks = [batch.start(work) for work in (good, bad, good)]
    while batch.step():
        pass
    assert [type(task.error) for task in tasks] == [type(None), ValueError, type(None)]
    assert ends == [anywhere.generate(TEXT[:40], max_new_bytes=20).data] * 2


def test_cancelling_ends_all_that_go_on_and_begins_no_other(model: BltModel) -> None:
    cancel, seen = threading.Event(), {}
    prompts = [TEXT[30 * number : 30 * number + 20] for number in range(8)]
    for number, chunk in model.stream_many(prompts, max_new_bytes=100, rows=2, cancel=cancel):
        cancel.set()
        if chunk.finish_reason is not None:
            seen[number] = chunk.finish_reason
    assert seen == {0: "cancelled", 1: "cancelled"}


def test_closing_the_stream_closes_what_is_open(model: BltModel) -> None:
    pieces = model.stream_many([TEXT[:30], TEXT[50:80]], max_new_bytes=100)
    next(pieces)
    pieces.close()
    assert model.generate(TEXT[:30], max_new_bytes=5).stats.new_bytes == 5


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_stream_that_another_thread_goes_on_with_or_drops_is_closed(model: BltModel) -> None:
    made: list[weakref.ref[Sequence]] = []
    before = model.sequence

    def counted() -> Sequence:
        sequence = before()
        made.append(weakref.ref(sequence))
        return sequence

    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "sequence", counted)
        streams = [model.stream_many([TEXT[:30], TEXT[50:80]], max_new_bytes=100) for _ in range(2)]
        for pieces in streams:
            next(pieces)
        with pytest.raises(OptionError, match="in the thread that began"):
            pool.submit(next, streams.pop()).result()
        pool.submit(streams.clear).result()
    del pieces
    run(model.batch(), [lambda: None])  # where they were begun
    gc.collect()
    assert [one() for one in made] == [None] * 4


def test_the_memory_of_texts_that_have_ended_is_free(anywhere: BltModel) -> None:
    batch = anywhere.batch()
    caches: list[weakref.ref[object]] = []

    def work(count: int) -> Callable[[], None]:
        def go() -> None:
            sequence = anywhere.sequence()
            sequence.append(encode(TEXT[:count]))
            state = sequence.state
            caches.extend(weakref.ref(cache) for cache in state.caches.values())
            # What holds the memory: on a device not the array.
            buffers = (cache.buffer for cache in state.caches.values())
            caches.extend(weakref.ref(getattr(buffer, "_owner", buffer)) for buffer in buffers)

        return go

    run(batch, [work(count) for count in (10, 20, 30, 40)])
    gc.collect()
    assert [one() for one in caches] == [None] * len(caches)


def test_of_passes_over_chunks_only_the_last_ones_buffers_stay(
    model: BltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_packed, "_SMALL", 20_000)
    made: list[weakref.ref[object]] = []
    before = ort_packed._Value.__init__

    def counted(self: ort_packed._Value, array: np.ndarray) -> None:
        before(self, array)
        if array.ndim == 3 and array.nbytes > 20_000:  # [1, positions, width], no cache's plane
            made.append(weakref.ref(array))

    monkeypatch.setattr(ort_packed._Value, "__init__", counted)
    model = BltModel.load(model.path, threads=1, portable=model.engine.directory is None)

    def work(first: int, size: int) -> Callable[[], None]:
        return lambda: model.sequence().append(encode(TEXT[first : first + size])) and None

    for size in range(80, 200, 10):
        run(model.batch(2), [work(0, size), work(300, 40)])
    assert len(made) > 30
    assert sum(one() is not None for one in made) <= 2 * len(model._backends)


def test_what_is_no_number_in_one_text_gets_into_no_other(model: BltModel) -> None:
    packed = model._backends["latent"].packed(2)

    def part(padded: int, length: int, value: float) -> PackedPart:
        stage = model.sequence()._latent
        width = model.manifest.model.width
        call = stage.prepare(1, {"patch_bytes": (1, 1, padded, width), "patch_lengths": (1, 1)})
        call.inputs["patch_bytes"][...], call.inputs["patch_lengths"][0] = value, length
        return PackedPart(call, stage.cache, stage.shared, 1)

    short, long, broken = part(4, 3, 0.5), part(16, 9, 0.25), part(16, 16, np.nan)
    packed.run([short, long])
    expected = short.call.outputs["patch_values"].copy()
    packed.run([broken, long])
    packed.run([short, long])
    agree(short.call.outputs["patch_values"], expected)


def test_a_row_that_could_not_be_bound_writes_to_no_text(
    model: BltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = model._backends["patcher"].packed(2)
    sequences = [model.sequence() for _ in range(3)]

    def part(number: int) -> PackedPart:
        stage = sequences[number].patcher.stage
        call = stage.prepare(1, {"byte_ids": (1, 1)})
        return PackedPart(call, stage.cache, stage.shared, 1)

    for sequence in sequences:
        sequence.append(encode(TEXT[:20]))
    packed.run([part(0), part(1)])
    before = sequences[0].patcher.stage.cache.buffer.copy()
    with monkeypatch.context() as patch:
        patch.setattr(ort_packed, "_of_cache", lambda cache: (_ for _ in ()).throw(MemoryError()))
        parts = [part(2), part(1)]
        with pytest.raises(MemoryError):
            packed.run(parts)
    packed.run([part(1)])
    assert np.array_equal(sequences[0].patcher.stage.cache.buffer, before)


def test_an_engine_that_fails_is_replaced_for_all(
    packed: dict[str, BltModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [TEXT[30 * number : 30 * number + 20] for number in range(4)]
    wanted = [packed["ring"].generate(prompt, max_new_bytes=20).data for prompt in prompts]
    model = BltModel.load(packed["ordered"].path, device="auto", threads=1, **LIMITS)
    stages = dict(model._backends)
    stages["decoder"] = Unreliable(stages["decoder"], 9, RuntimeError("lost"))
    model._backends = stages
    with pytest.warns(BltWarning, match="the portable graphs go on in its place"):
        many = model.generate_many(prompts, max_new_bytes=20, rows=4)
    assert [one.data for one in many] == wanted


def test_a_packed_graph_that_fails_leaves_texts_to_go_on_one_by_one(
    packed: dict[str, BltModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed["ordered"]
    prompts = [TEXT[30 * number : 30 * number + 20] for number in range(4)]
    wanted = [model.generate(prompt, max_new_bytes=20).data for prompt in prompts]
    stage = model._backends["decoder"].packed(4)

    def fail(parts: object) -> float:
        raise BackendError("no such luck")

    monkeypatch.setattr(stage, "run", fail)
    with pytest.warns(BltWarning, match="decoder: a pass over several texts failed.*no such luck"):
        many = model.generate_many(prompts, max_new_bytes=20)
    assert [one.data for one in many] == wanted


@pytest.mark.parametrize("error", [BackendError("no such luck"), MemoryError("no memory for it")])
def test_a_packed_graph_that_cannot_be_loaded_is_not_asked_for_again(
    packed: dict[str, BltModel], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model, asked = packed["ordered"], []
    prompts = [TEXT[30 * number : 30 * number + 20] for number in range(4)]
    wanted = [model.generate(prompt, max_new_bytes=20).data for prompt in prompts]

    def fail(texts: int) -> PackedStage:
        asked.append(texts)
        raise error

    monkeypatch.setattr(model._backends["decoder"], "packed", fail)
    with pytest.warns(BltWarning, match="decoder: a pass over several texts failed.*no ") as warned:
        many = model.generate_many(prompts, max_new_bytes=20)
    assert [one.data for one in many] == wanted
    assert len(asked) == len(warned) == 1


def test_who_has_more_positions_than_a_packed_graph_takes_runs_alone(
    packed: dict[str, BltModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, most, seen = packed["ring"], 3, []
    prompts = [TEXT[30 * number : 30 * number + size] for number, size in enumerate((1, 2, 3, 4) * 2)]
    wanted = [model.generate(prompt, max_new_bytes=20).data for prompt in prompts]
    for stage in model._backends.values():
        monkeypatch.setattr(type(stage), "packed_positions", most)
    for one in [stage.packed(rows) for stage in model._backends.values() for rows in ROWS]:
        run_all = one.run
        monkeypatch.setattr(
            one, "run", lambda parts, run=run_all: seen.extend(part.count for part in parts) or run(parts)
        )
    assert [one.data for one in model.generate_many(prompts, max_new_bytes=20)] == wanted
    assert {1, most} <= set(seen)
    assert max(seen) == most


def test_an_interrupted_pass_is_run_again(model: BltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [TEXT[30 * number : 30 * number + 20] for number in range(4)]
    wanted = [model.generate(prompt, max_new_bytes=10).data for prompt in prompts]
    found: dict[int, bytes] = {}

    def work(number: int) -> Callable[[], None]:
        return lambda: (
            found.setdefault(number, model.generate(prompts[number], max_new_bytes=10).data) and None
        )

    before, passes = ort_packed.OrtPackedStage.run, itertools.count()

    def interrupted(stage: ort_packed.OrtPackedStage, parts: list[PackedPart]) -> float:
        if next(passes) % 7 == 3:
            raise KeyboardInterrupt
        return before(stage, parts)

    batch, going_on = model.batch(), True
    for number in range(4):
        batch.start(work(number))
    monkeypatch.setattr(ort_packed.OrtPackedStage, "run", interrupted)
    while going_on:
        with suppress(KeyboardInterrupt):
            going_on = batch.step()
    assert [found[number] for number in range(4)] == wanted
    assert next(passes) > 20


def test_one_text_alone_runs_its_stages_itself(model: BltModel) -> None:
    batch = model.batch()
    passes: list[tuple[str, int, float]] = []
    batch.observer = lambda *told: passes.append(told)
    run(batch, [lambda: model.generate(TEXT[:20], max_new_bytes=30) and None])
    assert batch.passes == 0  # that were chosen
    assert {texts for _, texts, _ in passes} == {1}
    run(batch, [lambda: model.generate(TEXT[:20], max_new_bytes=30) and None] * 2)
    assert max(texts for _, texts, _ in passes) == 2


def test_a_text_that_waits_lets_the_others_go_on(model: BltModel) -> None:
    batch = model.batch()
    told: list[str] = []
    gate: list[bool] = []

    def waits() -> None:
        lane = LANE.get()
        assert isinstance(lane, Task)
        lane.wait(lambda: bool(gate))
        told.append("waited")

    def works() -> None:
        model.generate(TEXT[:20], max_new_bytes=10)
        told.append("worked")

    tasks = [batch.start(waits), batch.start(works)]
    while batch.step():
        pass
    assert told == ["worked"]
    assert not batch.step()
    gate.append(True)
    while batch.step():
        pass
    assert told == ["worked", "waited"]
    assert all(task.ended for task in tasks)


def test_a_texts_clock_stands_still_while_others_run(model: BltModel) -> None:
    spent: list[float] = []

    def work() -> None:
        before = own_seconds()
        model.generate(TEXT[:20], max_new_bytes=30)
        spent.append(own_seconds() - before)

    began = own_seconds()
    run(model.batch(), [work] * 4)
    assert 0 < sum(spent) <= 1.01 * (own_seconds() - began)


def test_rows_are_whole_numbers(model: BltModel) -> None:
    for rows in (0, -1, 65, 2.0, True, "2"):
        with pytest.raises(OptionError, match="rows"):
            model.generate_many([b"a"], rows=rows)  # type: ignore[arg-type]


def test_a_sequence_goes_from_a_batch_to_plain_calls_and_back(anywhere: BltModel) -> None:
    sequences = [anywhere.sequence() for _ in range(3)]

    def read(sequence: Sequence, first: int, count: int) -> Callable[[], None]:
        return lambda: sequence.append(encode(TEXT[first : first + count])[0 if first == 0 else 1 :]) and None

    for first in (0, 30, 60):
        works = [read(sequence, first, 30) for sequence in sequences]
        if first == 30:
            for work in works:
                work()
        else:
            run(anywhere.batch(), works)
    fresh = anywhere.sequence()
    fresh.append(encode(TEXT[:90]))
    for sequence in sequences:
        agree(sequence.logits, fresh.logits)


def test_many_texts_are_scored_together_as_each_alone(model: BltModel) -> None:
    texts = [TEXT[30 * number : 30 * number + size] for number, size in enumerate((1, 9, 90, 0, 33, 200, 12))]
    found = dict(model.score_many(texts, context=64))
    assert sorted(found) == list(range(7))
    assert isinstance(found.pop(3), EmptyTextError)
    for number, one in found.items():
        alone = model.score(texts[number], context=64)
        assert isinstance(one, Score)
        assert one.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)
        assert (one.bytes, one.patches, one.windows) == (alone.bytes, alone.patches, alone.windows)
    one_by_one = dict(model.score_many(texts, context=64, rows=1))
    assert list(one_by_one) == list(range(7))  # in order


def test_texts_of_weights_that_are_rounded_are_scored_one_by_one(
    packed: dict[str, BltModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed["ordered"]
    for precision, shared in (("fp32", True), ("int4", False)):
        stages = {name: replace(stage, precision=precision) for name, stage in model.manifest.stages.items()}
        monkeypatch.setattr(model, "manifest", replace(model.manifest, stages=stages))
        batches = []
        monkeypatch.setattr(model, "batch", lambda rows, seen=batches: seen.append(rows) or Batch(rows, 16))
        list(model.score_many(iter(())))
        assert bool(batches) == shared
        monkeypatch.undo()
