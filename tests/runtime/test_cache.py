"""Both layouts against a plain list of every position ever written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blt_edge.runtime.cache import OrderedCache, RingCache
from hypothesis import given
from hypothesis import strategies as st


def entries(first: int, count: int) -> np.ndarray:
    """New keys and values of two layers that tell position, layer and head."""
    planes = np.arange(4).reshape(4, 1, 1, 1, 1) * 100_000
    heads = np.arange(2).reshape(1, 1, 2, 1, 1) * 10_000
    positions = np.arange(first, first + count).reshape(1, 1, 1, count, 1)
    return (planes + heads + positions + np.zeros(3)).astype(np.float32)


def check(cache: RingCache, length: int, window: int | None) -> None:
    """Every position that the next byte may see is in the ring once, with its own contents."""
    assert cache.length == length
    first = 0 if window is None else max(0, length - window + 1)
    held = cache.positions[0]
    for position in range(first, length):
        (slot,) = np.flatnonzero(held == position)
        np.testing.assert_array_equal(cache.buffer[:, :, :, slot], entries(position, 1)[:, :, :, 0])
    assert held.max(initial=-1) < length


@given(
    window=st.one_of(st.none(), st.integers(1, 40)),
    rollback=st.integers(0, 20),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 90)), max_size=30),
)
def test_ring_holds_what_the_window_sees(
    window: int | None, rollback: int, steps: list[tuple[bool, int]]
) -> None:
    cache = RingCache(2, 2, 3, window=window, rollback=rollback, limit=500)
    length = furthest = 0
    for forward, count in steps:
        if forward:
            count = min(count, 500 - length)
            if count:
                cache.reserve(count)
                cache.append(entries(length, count))
                length += count
                furthest = max(furthest, length)
        elif cache.can_roll_back(max(0, length - count)):
            length = max(0, length - count)
            cache.roll_back(length)
        else:
            # What was written furthest on counts, however many steps back were taken since.
            assert furthest - max(0, length - count) > rollback
        check(cache, length, window)


@given(window=st.integers(1, 40), rollback=st.integers(0, 20), length=st.integers(0, 300))
def test_the_promised_roll_back_is_always_possible(window: int, rollback: int, length: int) -> None:
    cache = RingCache(1, 1, 2, window=window, rollback=rollback, limit=500)
    for position in range(length):
        cache.reserve(1)
        cache.append(np.full((2, 1, 1, 1, 2), position, np.float32))
    assert all(cache.can_roll_back(max(0, length - back)) for back in range(rollback + 1))


def test_windowed_memory_stops_growing_and_keeps_its_buffers() -> None:
    cache = RingCache(1, 1, 2, window=100, rollback=28, limit=10**6)
    sizes = []
    for position in range(2000):
        cache.reserve(1)
        cache.append(np.zeros((2, 1, 1, 1, 2), np.float32))
        if position in (400, 1999):
            sizes.append((cache.bytes, cache.generation, cache.buffer.ctypes.data))
    assert sizes[0] == sizes[1]
    assert cache.capacity == 127


@pytest.mark.parametrize("limit", [1, 3])
def test_a_model_of_few_positions_needs_few_slots(limit: int) -> None:
    assert RingCache(1, 1, 2, window=512, rollback=64, limit=limit).capacity == limit


def write(cache: OrderedCache, count: int) -> None:
    """What a graph with fused attention does: new entries behind the old ones."""
    cache.reserve(count)
    told = {"past_length": np.zeros(1, np.int32), "total_length": np.zeros((), np.int32)}
    cache.prepare(told, count)
    total = int(told["total_length"])
    assert told["past_length"].tolist() == [total - 1]
    new = entries(cache.length, count)
    for plane in range(len(new)):
        name = f"present.{plane // 2}.{'value' if plane % 2 else 'key'}"
        cache.outputs()[name][:, :, total - count : total] = new[plane]
    cache.advance({}, count)


@given(
    window=st.one_of(st.none(), st.integers(1, 40)),
    rollback=st.integers(0, 20),
    chunk=st.integers(1, 90),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 90)), max_size=40),
)
def test_ordered_positions_hold_what_the_window_sees(
    window: int | None, rollback: int, chunk: int, steps: list[tuple[bool, int]]
) -> None:
    cache = OrderedCache(2, 2, 3, window=window, rollback=rollback, limit=500, chunk=chunk)
    length = furthest = 0
    for forward, count in steps:
        if forward:
            count = min(count, chunk, 500 - length)
            if count:
                write(cache, count)
                length += count
                furthest = max(furthest, length)
        elif cache.can_roll_back(max(0, length - count)):
            length = max(0, length - count)
            cache.roll_back(length)
        else:
            assert furthest - max(0, length - count) > rollback
        assert cache.length == length
        # What the next byte may see lies in order right before its own slot.
        told = {"past_length": np.zeros(1, np.int32), "total_length": np.zeros((), np.int32)}
        cache.prepare(told, 1)
        end = int(told["total_length"]) - 1
        seen = length if window is None else min(length, window - 1)
        if seen:
            held = np.stack(list(cache.inputs().values()))[:, :, :, end - seen : end]
            np.testing.assert_array_equal(held, entries(length - seen, seen))


def test_an_ordered_window_stops_growing_and_keeps_its_buffer() -> None:
    cache = OrderedCache(1, 1, 2, window=100, rollback=28, limit=10**6, chunk=16)
    for _ in range(400):
        write_small(cache)
    before = (cache.bytes, cache.generation, cache.buffer.ctypes.data)
    for _ in range(1600):
        write_small(cache)
    assert (cache.bytes, cache.generation, cache.buffer.ctypes.data) == before
    assert cache.capacity <= 100 - 1 + 28 + 64
    assert all(cache.can_roll_back(cache.length - back) for back in range(29))


def write_small(cache: OrderedCache) -> None:
    cache.reserve(1)
    cache.advance({}, 1)


@given(
    ordered=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 40)),
    rollback=st.integers(0, 20),
    first=st.integers(0, 60),
    held=st.integers(1, 150),
    steps=st.lists(st.integers(1, 50), max_size=6),
)
def test_a_cache_goes_on_from_where_it_is_placed(
    ordered: bool, window: int | None, rollback: int, first: int, held: int, steps: list[int]
) -> None:
    if window is None:
        first = 0  # without a window everything is seen, so nothing may be missing
    limits: dict[str, Any] = {"window": window, "rollback": rollback, "limit": 600}
    cache = OrderedCache(2, 2, 3, chunk=50, **limits) if ordered else RingCache(2, 2, 3, **limits)
    generation = cache.generation
    used, before = entries(0, 5), cache.inputs()["past.0.key"]
    cache.reserve(5)
    run(cache, used)
    cache.place(first, entries(first, held))
    assert cache.generation > generation or cache.inputs()["past.0.key"].shape == before.shape
    length = first + held
    for count in (0, *steps):
        if count:
            cache.reserve(count)
            run(cache, entries(length, count))
            length += count
        oldest = max(first, 0 if window is None else length - window + 1)
        assert cache.length == length
        for position in range(oldest, length):
            np.testing.assert_array_equal(held_at(cache, position), entries(position, 1)[:, :, :, 0])
        if window is not None and length - first >= window - 1:
            assert cache.can_roll_back(length)
        assert not cache.can_roll_back(first) or window == 1 or first == 0 or held > 1


def run(cache: OrderedCache | RingCache, new: np.ndarray) -> None:
    """As a run of the graph does."""
    count = new.shape[3]
    if isinstance(cache, OrderedCache):
        start = cache.length - cache._base
        cache.buffer[:, :, :, start : start + count] = new
    cache.advance({"new_kv": new}, count)


def held_at(cache: OrderedCache | RingCache, position: int) -> np.ndarray:
    """Keys and values of a position."""
    if isinstance(cache, OrderedCache):
        return cache.buffer[:, :, :, position - cache._base]
    (slot,) = np.flatnonzero(cache.positions[0] == position)
    return cache.buffer[:, :, :, slot]
