"""The ring against a plain list of every position ever written."""

from __future__ import annotations

import numpy as np
import pytest
from blt_edge.runtime.cache import KvCache
from hypothesis import given
from hypothesis import strategies as st


def entries(first: int, count: int) -> np.ndarray:
    """New keys and values of two layers that tell position, layer and head."""
    planes = np.arange(4).reshape(4, 1, 1, 1, 1) * 100_000
    heads = np.arange(2).reshape(1, 1, 2, 1, 1) * 10_000
    positions = np.arange(first, first + count).reshape(1, 1, 1, count, 1)
    return (planes + heads + positions + np.zeros(3)).astype(np.float32)


def check(cache: KvCache, length: int, window: int | None) -> None:
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
    cache = KvCache(2, 2, 3, window=window, rollback=rollback, limit=500)
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
    cache = KvCache(1, 1, 2, window=window, rollback=rollback, limit=500)
    for position in range(length):
        cache.reserve(1)
        cache.append(np.full((2, 1, 1, 1, 2), position, np.float32))
    assert all(cache.can_roll_back(max(0, length - back)) for back in range(rollback + 1))


def test_windowed_memory_stops_growing_and_keeps_its_buffers() -> None:
    cache = KvCache(1, 1, 2, window=100, rollback=28, limit=10**6)
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
    assert KvCache(1, 1, 2, window=512, rollback=64, limit=limit).capacity == limit
