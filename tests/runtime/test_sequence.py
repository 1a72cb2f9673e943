"""Whatever happened before, a sequence's state is that of a fresh run on its bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import BltModel, OptionError, PromptTooLongError, Sequence
from blt_edge.runtime.backends.memory import HOST
from blt_edge.runtime.sequence import _ByteStates, _patch_group
from blt_edge.runtime.vocabulary import encode
from hypothesis import given, settings
from hypothesis import strategies as st

ROLLBACK = 12


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> BltModel:
    return BltModel.load(tiny_bundle, threads=1, prefill_chunk=16, rollback=ROLLBACK)


def assert_like_fresh(model: BltModel, sequence: Sequence, data: bytes) -> None:
    fresh = model.sequence()
    fresh.append(encode(data))
    assert sequence.length == fresh.length == 1 + len(data)
    assert sequence.ids.tolist() == fresh.ids.tolist()
    assert sequence.boundaries.starts == fresh.boundaries.starts
    assert sequence.patches_closed == fresh.patches_closed
    np.testing.assert_allclose(sequence.logits, fresh.logits, rtol=0, atol=2e-5)
    # What comes next reads every cache: it must agree too.
    for step in (b"a", b" next words \xff"):
        ids = encode(step)[1:]
        ours = np.concatenate([result.logits.copy() for result in sequence.extend(ids)])
        theirs = np.concatenate([result.logits.copy() for result in fresh.extend(ids)])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("read"), st.sampled_from([b"e", b" ", b"the ", b"\x00" * 30, b"aaaaaaaaaaaa"])),
        st.tuples(st.just("back"), st.integers(0, ROLLBACK)),
        st.tuples(st.just("back"), st.integers(0, 80)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(steps=steps)
def test_any_walk_ends_where_a_fresh_run_does(model: BltModel, steps: list[tuple[str, bytes | int]]) -> None:
    sequence = model.sequence()
    sequence.append(encode(b""))
    data = b""
    for _kind, value in steps:
        if isinstance(value, bytes):
            value = value[: 300 - len(data)]
            sequence.append(encode(value)[1:])
            data += value
        else:
            value = min(value, len(data))
            sequence.roll_back(value)
            data = data[: len(data) - value]
    assert_like_fresh(model, sequence, data)


def test_roll_back_within_the_limit_computes_nothing(model: BltModel) -> None:
    sequence = model.sequence()
    data = bytes(range(60, 120)) * 3
    sequence.append(encode(data))
    calls = {name: spent.calls for name, spent in sequence.times.items()}
    sequence.roll_back(ROLLBACK)
    assert {name: spent.calls for name, spent in sequence.times.items()} == calls
    assert_like_fresh(model, sequence, data[:-ROLLBACK])


def test_roll_back_far_beyond_the_limit_reads_again(model: BltModel) -> None:
    sequence = model.sequence()
    data = b"It was a dark and stormy night; the rain fell in torrents. " * 4
    sequence.append(encode(data))
    sequence.roll_back(200)
    assert_like_fresh(model, sequence, data[:-200])


@pytest.mark.parametrize("count", [-1, 5, 10**9])
def test_roll_back_out_of_range_is_refused(model: BltModel, count: int) -> None:
    sequence = model.sequence()
    sequence.append(encode(b"abcd"))
    with pytest.raises(OptionError, match="0 to 4"):
        sequence.roll_back(count)
    assert_like_fresh(model, sequence, b"abcd")


def test_a_text_that_does_not_fit_changes_nothing(model: BltModel) -> None:
    sequence = model.sequence()
    sequence.append(encode(b"x" * 390))
    with pytest.raises(PromptTooLongError, match=r"401 positions.*400"):
        sequence.append(np.full(10, 70, np.int64))
    assert sequence.length == 391
    sequence.append(np.full(9, 70, np.int64))
    assert sequence.length == 400


def test_memory_does_not_grow_with_the_text_but_for_the_global_cache(tiny_bundle: Path) -> None:
    model = BltModel.load(tiny_bundle, threads=1, prefill_chunk=16, rollback=4)
    sequence = model.sequence()
    data = bytes(np.random.default_rng(0).integers(32, 127, 380, dtype=np.uint8))
    sequence.append(encode(data[:200]))
    before = sequence._encoder.cache.bytes, sequence._decoder.cache.bytes
    sequence.append(encode(data[200:])[1:])
    assert (sequence._encoder.cache.bytes, sequence._decoder.cache.bytes) == before


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), budget=st.integers(1, 600))
def test_patch_groups_cover_all_patches_within_the_budget(lengths: list[int], budget: int) -> None:
    starts = [0, *np.cumsum(lengths).tolist()]
    done = 0
    while done < len(lengths):
        group = _patch_group(starts, done, len(lengths), budget)
        assert group >= 1
        padded = 1 << (max(lengths[done : done + group]) - 1).bit_length()
        assert group == 1 or group * padded <= budget
        done += group
    assert done == len(lengths)


@given(steps=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60), st.integers(0, 30)), max_size=25))
def test_byte_states_are_slices_of_all_states(steps: list[tuple[int, int, int]]) -> None:
    store, truth = _ByteStates(HOST, 2), np.zeros((0, 2), np.float32)
    for count, dropped, back in steps:
        new = np.arange(len(truth), len(truth) + count, dtype=np.float32)[:, None].repeat(2, 1)
        store.append(len(truth), new)
        truth = np.concatenate([truth, new])
        store.drop_before(min(dropped, len(truth)))
        length = max(store.base, len(truth) - back)
        store.roll_back(length)
        truth = truth[:length]
        np.testing.assert_array_equal(store.get(store.base, length), truth[store.base :])
