"""Both layouts against a plain list of every position ever written."""

from __future__ import annotations

import numpy as np
import pytest
from blt_edge.runtime.cache import OrderedCache, RingCache
from hypothesis import given, settings
from hypothesis import strategies as st

Cache = RingCache | OrderedCache
LAYOUTS = (RingCache, OrderedCache)
NAMES = ["past.0.key", "past.0.value", "past.1.key", "past.1.value"]


def new(layout: type[Cache], window: int | None, rollback: int, limit: int, chunk: int) -> Cache:
    more = {"chunk": chunk} if layout is OrderedCache else {}
    return layout(2, 2, 3, window=window, rollback=rollback, limit=limit, **more)


def entries(first: int, count: int) -> np.ndarray:
    """New keys and values of two layers that tell position, layer and head."""
    planes = np.arange(4).reshape(4, 1, 1, 1, 1) * 100_000
    heads = np.arange(2).reshape(1, 1, 2, 1, 1) * 10_000
    positions = np.arange(first, first + count).reshape(1, 1, 1, count, 1)
    return (planes + heads + positions + np.zeros(3)).astype(np.float32)


def told(cache: OrderedCache, count: int) -> int:
    """Slots that a graph is told will be full after `count` new positions."""
    inputs = {"past_length": np.zeros(1, np.int32), "total_length": np.zeros((), np.int32)}
    cache.prepare(inputs, count)
    total = int(inputs["total_length"])
    assert inputs["past_length"].tolist() == [total - 1]
    return total


SALT = np.float32(0.125)


def read(cache: Cache, count: int, salt: int = 0) -> None:
    """One call over `count` new positions, as a stage makes it; salt: of whose text they are."""
    cache.reserve(count)
    found = entries(cache.length, count) + salt * SALT
    if isinstance(cache, OrderedCache):
        # A graph with fused attention writes new entries behind the old ones itself.
        total, outputs = told(cache, count), cache.outputs()
        for name, plane in zip(NAMES, found, strict=True):
            outputs[name.replace("past", "present")][:, :, total - count : total] = plane
        cache.advance({}, count)
    else:
        assert cache.outputs() == {}
        cache.prepare({}, count)
        cache.advance({"new_kv": found}, count)


def slots_of(cache: Cache) -> np.ndarray:
    """The slot of each position up to the cache's length, -1 where it has none: as a graph finds it."""
    slots = np.full(cache.length, -1)
    if isinstance(cache, RingCache):
        (held,) = cache.inputs()["past_positions"]
        assert held.max(initial=-1) < cache.length
        full = np.flatnonzero(held >= 0)
        assert len(np.unique(held[full])) == len(full)
        slots[held[full]] = full
    else:
        end = told(cache, 5) - 5
        slots[cache.length - end :] = np.arange(end)
    return slots


def present(cache: Cache) -> np.ndarray:
    """Whether each position up to the cache's length is in it with its own keys and values."""
    inputs, slots = cache.inputs(), slots_of(cache)
    assert [name for name in inputs if name != "past_positions"] == NAMES
    found = np.stack([inputs[name] for name in NAMES])[:, :, :, slots]
    right = (found == entries(0, cache.length)).all(axis=(0, 1, 2, 4))
    return np.asarray(right & (slots >= 0))


def check_claims(cache: Cache, window: int | None, furthest: int, rollback: int) -> None:
    """Everything that an earlier length would see is there where the cache says so, and only there.

    What was written furthest on counts, however many steps back were taken since.
    """
    missing = np.concatenate([[0], np.cumsum(~present(cache))])
    for length in range(cache.length + 1):
        first = 0 if window is None else max(0, length - window + 1)
        whole, claimed = missing[length] == missing[first], cache.can_roll_back(length)
        assert whole or not claimed
        assert claimed or not whole or first == length  # there is nothing to be there
        assert claimed or furthest - length > rollback


@settings(max_examples=200)
@given(
    layout=st.sampled_from(LAYOUTS),
    window=st.one_of(st.integers(1, 12), st.integers(100, 300), st.none()),
    rollback=st.integers(0, 20),
    chunk=st.one_of(st.integers(1, 20), st.integers(90, 300)),
    limit=st.sampled_from([700, 1500, 1, 3, 64, 65]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["read a chunk", "read", "back", "back as far as possible"]), st.integers(1, 30)
        ),
        min_size=4,
        max_size=25,
    ),
)
def test_a_cache_holds_what_it_says_and_says_what_it_holds(
    layout: type[Cache],
    window: int | None,
    rollback: int,
    chunk: int,
    limit: int,
    steps: list[tuple[str, int]],
) -> None:
    cache = new(layout, window, rollback, limit, chunk)
    length = furthest = 0
    for step, count in steps:
        generation, buffers = cache.generation, cache.inputs()
        cache.binding = binding = object()
        if step.startswith("read"):
            count = min(chunk if step == "read a chunk" else count, chunk, limit - length)
            if count:
                read(cache, count)
            length += count
            furthest = max(furthest, length)
        elif step == "back":
            length = max(0, length - count)
            if not cache.can_roll_back(length):
                length = cache.length
            cache.roll_back(length)
        else:
            length = next(back for back in range(length + 1) if cache.can_roll_back(back))
            cache.roll_back(length)
        # 1. Whoever bound the buffers binds anew when they are others, and only then.
        pairs = zip(cache.inputs().values(), buffers.values(), strict=True)
        same = all(now.ctypes.data == before.ctypes.data for now, before in pairs)
        assert same == (cache.generation == generation) == (cache.binding is binding)
        # 2. It takes the memory that its buffers have, and no more than a full window needs.
        assert cache.length == length
        assert cache.bytes == sum(buffer.nbytes for buffer in cache.inputs().values())
        assert cache.capacity == cache.inputs()["past.0.key"].shape[2]
        assert 0 < cache.capacity <= limit
        if window is not None:
            spare = max(64, chunk) if layout is OrderedCache else 0
            assert cache.capacity <= max(1, window - 1 + rollback + spare)
        # 3. What every earlier length would see is there exactly if it says so.
        check_claims(cache, window, furthest, rollback)


@pytest.mark.parametrize("growth", [None, 1.5, 1.1, 3.0])
def test_an_endless_cache_grows_by_its_factor(growth: float | None) -> None:
    sizes = {"window": None, "rollback": 0, "limit": 1000}
    cache: Cache = OrderedCache(2, 2, 3, chunk=1, **sizes)  # type: ignore[arg-type]
    if growth is not None:
        cache = RingCache(2, 2, 3, first_capacity=10, growth=growth, **sizes)  # type: ignore[arg-type]
    capacities = [cache.capacity]
    assert capacities[0] == (64 if growth is None else 10)
    for position in range(1000):
        read(cache, 1)
        if cache.capacity != capacities[-1]:
            # Not before it has to, and once it does by enough that copying costs little in all.
            assert position == capacities[-1]
            assert cache.capacity == min(1000, max(position + 1, int((growth or 1.5) * capacities[-1])))
            capacities.append(cache.capacity)
    assert capacities[-1] == 1000
    assert cache.generation == len(capacities) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_room_for_many_positions_is_made_at_once(layout: type[Cache]) -> None:
    cache = new(layout, None, 0, 2000, chunk=700)
    for _ in range(2):
        # What nothing was written to is masked, and times 0 it must be 0.
        assert not any(cache.inputs()[name].any() for name in NAMES)
        cache.reserve(700)
        assert (cache.capacity, cache.generation, cache.length) == (700, 1, 0)


@pytest.mark.parametrize("chunk", [16, 300])
def test_an_ordered_window_moves_when_reading_past_costs_as_much(chunk: int) -> None:
    cache = OrderedCache(2, 2, 3, window=100, rollback=20, limit=10**6, chunk=chunk)
    moved = []
    for _ in range(1000):
        before = slots_of(cache)
        read(cache, 1)
        if len(before) and slots_of(cache)[len(before) - 1] != before[-1]:
            moved.append(cache.length - 1)
            assert (slots_of(cache)[:-1] >= 0).sum() == 119
    # 119 kept positions and 64 more.
    assert moved == list(range(119 + 64, 1000, 64))


@pytest.mark.parametrize("before", [10, 11, 50, 72])
def test_a_call_that_does_not_fit_moves_an_ordered_window(before: int) -> None:
    # 9 positions stay, so 10 and 100 are one too many for 9 + 100.
    cache = OrderedCache(2, 2, 3, window=10, rollback=0, limit=10**6, chunk=100)
    read(cache, before)
    for count in (100, 1, 100, 99, 100):
        read(cache, count)
        assert cache.capacity <= 109
        check_claims(cache, 10, cache.length, 0)


def test_a_ring_for_a_window_of_one_has_a_slot() -> None:
    cache = RingCache(2, 2, 3, window=1, rollback=0, limit=100, first_capacity=0)
    for count in (1, 3, 1):
        read(cache, count)
        assert cache.capacity == 1
    assert slots_of(cache).tolist() == [-1, -1, -1, -1, 0]


@given(
    layout=st.sampled_from(LAYOUTS),
    window=st.one_of(st.none(), st.integers(1, 40)),
    rollback=st.integers(0, 20),
    first=st.integers(0, 60),
    held=st.integers(1, 150),
    steps=st.lists(st.integers(1, 50), max_size=6),
    in_place=st.booleans(),
)
def test_a_cache_goes_on_from_where_it_is_placed(
    layout: type[Cache],
    window: int | None,
    rollback: int,
    first: int,
    held: int,
    steps: list[int],
    in_place: bool,
) -> None:
    if window is None:
        first = 0  # without a window everything is seen, so nothing may be missing
    cache = new(layout, window, rollback, 600, chunk=50)
    generation, before = cache.generation, cache.inputs()["past.0.key"]
    read(cache, 5)
    others = cache.fork()
    room = cache.room(first, held) if in_place else None
    if room is None:
        assert cache.length == 5
        cache.place(first, entries(first, held))
    else:
        room[...] = entries(first, held)[:, 0]
    check_claims(others, window, 5, rollback)
    del others
    # Whoever bound the old buffers is told of new ones.
    assert cache.generation > generation or cache.inputs()["past.0.key"].base is before.base
    length = first + held
    for count in (0, *steps):
        if count:
            read(cache, count)
        length += count
        assert cache.length == length
        seen = first if window is None else max(first, length - window + 1)
        assert present(cache)[seen:].all()
        assert not present(cache)[:first].any()
    if window is not None and held >= window - 1 + rollback:
        cache.place(first, entries(first, held))
        assert cache.can_roll_back(first + held - rollback)


@settings(max_examples=80)
@given(
    layout=st.sampled_from(LAYOUTS),
    window=st.one_of(st.integers(1, 12), st.integers(60, 120), st.none()),
    rollback=st.integers(0, 20),
    placed=st.sampled_from([0, 0, 1, 65, 100, 150]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["read", "read", "fork", "back", "drop"]), st.integers(0, 5), st.integers(1, 40)
        ),
        min_size=4,
        max_size=30,
    ),
)
def test_forks_hold_their_own_positions_whatever_the_others_do(
    layout: type[Cache], window: int | None, rollback: int, placed: int, steps: list[tuple[str, int, int]]
) -> None:
    cache = new(layout, window, rollback, 900, 40)
    if placed:
        cache.place(0, entries(0, placed))
    held: list[tuple[Cache, list[int]]] = [(cache, [0] * placed)]
    del cache
    for number, (step, which, count) in enumerate(steps):
        cache, texts = held[which % len(held)]
        if step == "read":
            read(cache, count, salt=number)
            texts += [number] * count
        elif step == "fork":
            held.append((cache.fork(), list(texts)))
        elif step == "back":
            length = max(0, cache.length - count)
            if cache.can_roll_back(length):
                cache.roll_back(length)
                del texts[length:]
        elif len(held) > 1:
            del held[which % len(held)]
        del cache, texts
        check_forks(held, window)


def check_forks(held: list[tuple[Cache, list[int]]], window: int | None) -> None:
    for cache, texts in held:
        assert cache.length == len(texts)
        slots, first = slots_of(cache), 0 if window is None else max(0, len(texts) - window + 1)
        assert (slots[first:] >= 0).all()
        found = np.stack([cache.inputs()[name] for name in NAMES])[:, :, :, slots[first:]]
        salts = np.array(texts[first:], np.float32).reshape(1, 1, 1, -1, 1) * SALT
        assert (found == entries(first, len(texts) - first) + salts).all()
        assert cache.lease.alone == (sum(other.buffer is cache.buffer for other, _ in held) == 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 300])
def test_a_text_whose_length_is_known_grows_once(layout: type[Cache], window: int | None) -> None:
    cache = new(layout, window, 10, 2000, 100)
    cache.expected = 700
    capacities = []
    for _ in range(7):
        read(cache, 100)
        capacities.append(cache.capacity)
    most = 700 if window is None else 309 + (100 if layout is OrderedCache else 0)
    assert capacities == [most] * 7
    assert cache.generation == 1
    cache.expected = 10**9  # never more than there are positions
    read(cache, 1)
    assert cache.capacity <= 2000


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("first", [0, 1])
def test_who_forks_a_placed_cache_keeps_what_it_had(
    layout: type[Cache], window: int | None, first: int
) -> None:
    cache = new(layout, window, 10, 900, 40)
    cache.place(0, entries(0, 150))
    held = [(cache, [0] * 150), (cache.fork(), [0] * 150)]
    for index in (first, 1 - first):
        read(held[index][0], 20, salt=index + 1)
        held[index][1].extend([index + 1] * 20)
        check_forks(held, window)
