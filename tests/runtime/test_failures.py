"""Engines that fail while they run, memory that ends, Ctrl-C: what is said, and what goes on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import (
    BackendError,
    BltModel,
    BltWarning,
    GenerationOptions,
    OptionError,
    OutOfMemoryError,
    Sequence,
)
from blt_edge.runtime.cache import OrderedCache, RingCache
from blt_edge.runtime.engines import PORTABLE, Engine
from blt_edge.runtime.errors import first_line
from blt_edge.runtime.names import STAGES
from blt_edge.runtime.vocabulary import encode
from support.unreliable import Unreliable

TEXT = b"the streets of the old town, and the streets of the new one; 7 boats, 7 lamps"
BROKEN = RuntimeError("[ONNXRuntimeError] : 6 : Non-zero status code\x1b[2J while running MatMul\nmore")
ENGINE = Engine("engines/onnxruntime-0123", directory=Path("engines/onnxruntime-0123"))

Failing = Callable[..., BltModel]


@pytest.fixture
def failing(tight: BltModel) -> Failing:
    """`failing(stage, run, error)`: the model on an engine whose stage fails at that run; portable graphs are
    there, unless portable=False."""

    def made(stage: str, run: int = 0, error: BaseException = BROKEN, portable: bool = True) -> BltModel:
        backends = dict(tight._backends)
        backends[stage] = Unreliable(backends[stage], run, error)
        others = (
            {"portable": lambda: (dict(tight._backends), Engine("portable graphs", threads=1))}
            if portable
            else {}
        )
        return BltModel(
            tight.manifest, backends, tight._table, tight.limits, Path("bundle"), ENGINE, **others
        )

    return made


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (BROKEN, BackendError, r"Non-zero status code\\x1b\[2J while running MatMul; blt-edge validate"),
        (RuntimeError("std::bad_alloc"), OutOfMemoryError, r"std::bad_alloc; .*prefill chunk.*quantize"),
        (MemoryError("Unable to allocate 3 GiB"), OutOfMemoryError, "Unable to allocate 3 GiB; close"),
        (BackendError("CUDA: cudaMalloc: out of memory"), OutOfMemoryError, "CUDA: cudaMalloc: out of"),
        (
            BackendError("CUDA: cudaLaunch: illegal address"),
            BackendError,
            "CUDA: cudaLaunch: illegal address",
        ),
        (ValueError(""), BackendError, "ValueError; blt-edge validate"),
    ],
    ids=["failed", "bad_alloc", "numpy", "device memory", "device", "silent"],
)
def test_a_failed_run_says_where_what_and_what_to_do(
    failing: Failing, stage: str, error: Exception, kind: type[BackendError], told: str
) -> None:
    model = failing(stage, 1, error, portable=False)
    sequence = model.sequence()
    said = rf"^{stage}: (its graph failed at position \d+: )?.*{told}"
    with pytest.raises(kind, match=said) as caught:
        bytewise(sequence, TEXT)
    assert str(caught.value).isprintable()
    assert type(caught.value) is kind
    with pytest.raises(BackendError, match="begin a new sequence"):
        sequence.append(encode(TEXT))


def test_errors_that_are_no_engines_pass_as_they_are(failing: Failing) -> None:
    for error in (OptionError("of what listens"), AssertionError("of ours")):
        with pytest.raises(type(error), match=r"^of "):
            failing("latent", 0, error).logits(TEXT)


def bytewise(sequence: Sequence, text: bytes) -> None:
    for number in encode(text):
        sequence.append(np.array([number]))


def test_what_an_engine_says_is_short() -> None:
    said = first_line(RuntimeError("a kernel in " + "/very/long/path" * 100 + " failed: bad_alloc"))
    assert len(said) < 260
    assert (said[:11], said[-18:]) == ("a kernel in", " failed: bad_alloc")


def test_an_observer_is_told_of_the_runs_that_were(failing: Failing) -> None:
    model = failing("decoder", 1)
    seen: list[str] = []
    model.observer = lambda stage, *figures: seen.append(stage)
    with pytest.warns(BltWarning):
        model.generate(TEXT, GenerationOptions(max_new_bytes=3, draft="none"))
    assert seen.count("decoder") >= 3


def test_an_error_of_an_observer_is_no_engines(failing: Failing) -> None:
    model = failing("decoder", 1000)

    def broken(*_: object) -> None:
        raise ValueError("of the observer")

    model.observer = broken
    with pytest.raises(ValueError, match="of the observer"):
        model.logits(TEXT)
    assert model.engine == ENGINE


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("run", [1, 8])
@pytest.mark.parametrize("draft", ["none", "patcher", "decoder", "lookup"])
def test_the_portable_graphs_go_on_with_the_same_text(
    failing: Failing, tight: BltModel, stage: str, run: int, draft: str
) -> None:
    options = GenerationOptions(max_new_bytes=40, draft=draft, temperature=0.7, seed=3, logprobs=0)
    wanted = tight.generate(TEXT, options)
    model = failing(stage, run)
    sequence = model.sequence()
    with pytest.warns(BltWarning) as caught:
        found = model.generate(TEXT, options, sequence=sequence)
    assert len(caught) == 1
    told = str(caught[0].message)
    assert told.startswith(
        "engines/onnxruntime-0123 failed, the portable graphs go on in its place; blt-edge"
    )
    assert re.search(rf"\({stage}: its graph failed at positions? .* while running MatMul\)$", told)
    assert found.data == wanted.data
    logprobs = [[detail.logprob for detail in each.details] for each in (found, wanted)]
    assert np.allclose(*logprobs, atol=1e-4)
    assert [detail.starts_patch for detail in found.details] == [
        detail.starts_patch for detail in wanted.details
    ]
    assert (model.engine.directory, model.engine.name, model.engine.threads) == (None, "portable graphs", 1)
    # The state is that of a text which only the portable graphs have read.
    assert sequence.ids.tolist() == encode(TEXT + wanted.data).tolist()
    assert np.allclose(sequence.logits, tight.logits(TEXT + wanted.data)[-1], atol=1e-4)
    sequence.roll_back(30)
    sequence.append(encode(b"?")[1:])
    text = (TEXT + wanted.data)[:-30] + b"?"
    assert np.allclose(sequence.logits, tight.logits(text)[-1], atol=1e-4)


def test_one_failure_is_told_once_and_is_everybodys(failing: Failing, tight: BltModel) -> None:
    model = failing("latent", 2)
    first, second = model.sequence(), model.sequence()
    with warnings.catch_warnings(record=True) as caught:
        for sequence in (first, second):  # both began on the engine
            sequence.append(encode(TEXT))
        model.generate(TEXT, GenerationOptions(max_new_bytes=5))
    assert [each.category for each in caught] == [BltWarning]
    for sequence in (first, second):
        assert np.allclose(sequence.logits, tight.logits(TEXT)[-1], atol=1e-4)


@pytest.mark.parametrize("run", [0, 1, 3])
@pytest.mark.filterwarnings("ignore::blt_edge.runtime.errors.BltWarning")
def test_whatever_reads_a_text_goes_on(failing: Failing, tight: BltModel, run: int) -> None:
    assert np.array_equal(failing("patcher", run).entropies(TEXT), tight.entropies(TEXT))
    assert failing("patcher", run).patch_lengths(TEXT) == tight.patch_lengths(TEXT)
    for stage in STAGES:
        assert np.allclose(failing(stage, run).logits(TEXT), tight.logits(TEXT), atol=1e-4)
        score = failing(stage, run).score(TEXT, context=30).bits_per_byte
        assert score == pytest.approx(tight.score(TEXT, context=30).bits_per_byte, abs=1e-5)


def test_without_memory_nothing_larger_is_loaded(failing: Failing) -> None:
    model = failing("encoder", 1, MemoryError("std::bad_alloc"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OutOfMemoryError, match=r"^encoder: .*std::bad_alloc"):
            model.generate(TEXT)
    assert model.engine is ENGINE


def test_portable_graphs_that_fail_too_end_it(failing: Failing, tight: BltModel) -> None:
    model = failing("encoder", 1)
    broken = {**tight._backends, "decoder": Unreliable(tight._backends["decoder"], 0, BROKEN)}
    model._portable = lambda: (broken, PORTABLE)
    with pytest.warns(BltWarning), pytest.raises(BackendError, match=r"^decoder: its graph failed"):
        model.generate(TEXT)

    def gone() -> Any:
        raise OSError(2, "No such file", "decoder.onnx")

    model = failing("encoder", 1)
    model._portable = gone
    with pytest.raises(BackendError, match=r"^encoder: .*the portable graphs can't be loaded instead: .*2"):
        model.generate(TEXT)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", ["before", "after", "inside"])
def test_ctrl_c_in_a_run_leaves_no_text_that_is_wrong(
    tight: BltModel, monkeypatch: pytest.MonkeyPatch, stage: str, place: str
) -> None:
    """Between a run and the moment when all of the cache is moved on."""
    sequence = tight.sequence()
    sequence.append(encode(TEXT))
    cache = sequence._stages[stage].cache
    advance = cache.advance

    def interrupted(outputs: Any, count: int) -> None:
        if place == "inside":
            cache.positions[0, (cache.length + count - 1) % cache.capacity] = cache.length + count - 1
        elif place == "after":
            advance(outputs, count)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sequence.append(encode(b" and a patch ends. And another one, and more")[1:])
    with pytest.raises(BackendError, match="begin a new sequence"):
        sequence.append(encode(b"x")[1:])
    assert np.array_equal(tight.logits(TEXT), tight.logits(TEXT))


def test_ctrl_c_while_a_text_is_read_again(tight: BltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = tight.sequence()
    sequence.append(encode(TEXT))
    whole = type(sequence)._read
    runs: list[int] = []

    def interrupted(self: Any, draft: Any) -> Any:
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return whole(self, draft)

    with monkeypatch.context() as patched:
        patched.setattr(type(sequence), "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sequence.roll_back(20)
    with pytest.raises(BackendError, match="begin a new sequence"):
        sequence.append(encode(b"x")[1:])


@pytest.mark.parametrize("number", [1, 2])
def test_a_cache_that_gets_no_memory_stays_as_it_was(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of a ring's two buffers neither is taken alone; a graph never writes past an ordered one."""
    ring = RingCache(1, 1, 4, window=None, rollback=4, limit=1000, first_capacity=8)
    ordered = OrderedCache(1, 1, 4, window=None, rollback=4, limit=1000, chunk=8)
    kept = np.random.default_rng(0).random((2, 1, 1, 8, 4), np.float32)
    ring.append(kept)
    for cache in (ring, ordered):
        before = cache.buffer, cache.capacity, cache.generation
        calls: list[str] = []

        def scarce(make: Any, calls: list[str] = calls, failing: int = number if cache is ring else 1) -> Any:
            def made(*arguments: Any, **named: Any) -> Any:
                calls.append("")
                if len(calls) == failing:
                    raise MemoryError
                return make(*arguments, **named)

            return made

        with monkeypatch.context() as patched:
            for name in ("zeros", "full"):
                patched.setattr(np, name, scarce(getattr(np, name)))
            with pytest.raises(MemoryError):
                cache.reserve(200)
        assert cache.buffer is before[0]
        assert (cache.capacity, cache.generation) == before[1:]
        assert cache.buffer.shape[3] == cache.capacity
    assert ring.positions[0].tolist() == list(range(8))
    ring.reserve(100)
    assert np.array_equal(ring.buffer[:, :, :, :8], kept)
