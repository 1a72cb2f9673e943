"""A cache that is float32 for chunks and 8 bits for steps, beside what was written to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import BundleError
from blt_edge.runtime.narrow_cache import (
    STEP_POSITIONS,
    NarrowCache,
    narrowed,
    read_scales,
    write_scales,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.profiles import demo_manifest

LAYERS, HEADS, WIDTH = 2, 3, 4
SCALES = np.random.default_rng(0).uniform(0.01, 0.1, (2 * LAYERS, HEADS, WIDTH)).astype(np.float32)
EACH = SCALES[:, np.newaxis, :, np.newaxis]
MOST = 127
CHUNK = 60


def new(window: int | None, rollback: int = 5, limit: int = 400) -> NarrowCache:
    return NarrowCache(
        LAYERS, HEADS, WIDTH, SCALES, window=window, rollback=rollback, limit=limit, chunk=CHUNK
    )


def entries(first: int, count: int) -> np.ndarray:
    """Keys and values of positions, each its own, up to what 8 bits can hold."""
    numbers = [np.random.default_rng(first + i).uniform(-1, 1, EACH.shape) for i in range(count)]
    values = np.concatenate(numbers, axis=3) if count else np.zeros((*EACH.shape[:3], 0, WIDTH))
    return (values * MOST * EACH).astype(np.float32)


def read(cache: NarrowCache, count: int) -> None:
    """One call, whose graph writes new entries behind the old ones as it keeps them."""
    cache.reserve(count)
    told = {"past_length": np.zeros(1, np.int32), "total_length": np.zeros((), np.int32)}
    cache.prepare(told, count)
    total = int(told["total_length"])
    found = entries(cache.length, count)
    if cache.narrow:
        found = np.rint(found / EACH).astype(np.int8)
    for plane, values in zip(cache.outputs().values(), found, strict=True):
        assert plane.dtype == found.dtype
        plane[:, :, total - count : total] = values
    cache.advance({}, count)


def held(cache: NarrowCache) -> np.ndarray:
    """[2 * layers, Hkv, S, head_dim] of positions `first` on."""
    return np.stack(list(cache.planes()))


def check(cache: NarrowCache) -> None:
    """What is held is what was written, to half a scale."""
    wanted = entries(cache.first, cache.length - cache.first)[:, 0]
    apart = np.abs(held(cache) - wanted)
    assert (apart <= 0.501 * SCALES[:, :, np.newaxis]).all()
    if cache.window is not None:
        assert cache.first <= max(0, cache.length - cache.window + 1)


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([None, 1, 7, 40]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["read", "back", "fork", "pack"]), st.sampled_from([1, 2, 16, 17, 32, 33, 60])
        ),
        max_size=14,
    ),
)
def test_a_cache_holds_what_was_written_however_it_is_kept(
    window: int | None, steps: list[tuple[str, int]]
) -> None:
    cache = new(window)
    kept: list[tuple[NarrowCache, np.ndarray]] = []
    for step, count in steps:
        generation, narrow = cache.generation, cache.narrow
        if step == "read" and cache.length + count <= 400:
            read(cache, count)
            assert cache.narrow == (count <= STEP_POSITIONS or (narrow and count <= 32))
            assert narrow == cache.narrow or cache.generation > generation
        elif step == "back" and cache.can_roll_back(max(0, cache.length - min(count, 5))):
            cache.roll_back(max(0, cache.length - min(count, 5)))
        elif step in ("fork", "pack"):
            other = cache.fork()
            if step == "pack":
                other.pack()
                assert other.narrow
                assert other.bytes <= cache.bytes
            kept.append((other, held(other)))
        check(cache)
    # What a text and its forks do, none of the others sees.
    for other, values in kept:
        assert (held(other) == values).all()
        if other.length < 400:
            read(other, 1)
            check(other)


def test_a_step_reads_a_quarter_of_the_bytes() -> None:
    cache = new(None)
    read(cache, CHUNK)
    before = cache.bytes
    cache.reserve(1)
    assert cache.bytes * 4 == before


def test_changing_back_and_forth_changes_no_number() -> None:
    cache = new(40)
    for _ in range(5):
        read(cache, 16)
    steps = held(cache)
    cache.reserve(33)
    assert not cache.narrow
    cache.reserve(1)
    assert cache.narrow
    assert (held(cache)[:, :, -20:] == steps[:, :, -20:]).all()


def test_what_is_put_there_comes_out_again() -> None:
    cache = new(40)
    values = entries(7, 30)
    cache.place(7, values)
    assert (cache.first, cache.length) == (7, 37)
    assert (held(cache) == values[:, 0]).all()
    cache.reserve(1)
    assert np.array_equal(held(cache), narrowed(values, SCALES)[:, 0])
    other = new(40)
    read(other, 1)  # it is in 8 bits
    room = other.room(7, 30)
    assert room is not None
    room[...] = narrowed(values, SCALES)[:, 0]
    other.reserve(1)
    assert np.array_equal(held(other), held(cache))


def test_what_8_bits_can_hold_is_not_rounded_again() -> None:
    once = narrowed(entries(0, 9), SCALES)
    assert np.array_equal(narrowed(once, SCALES), once)


def test_what_is_larger_is_cut_off_and_no_number_warns_nobody() -> None:
    values = np.full((2 * LAYERS, 1, HEADS, 1, WIDTH), 1e9, np.float32)
    assert np.array_equal(narrowed(values, SCALES), 127 * EACH)
    assert np.array_equal(narrowed(-values, SCALES), -128 * EACH)
    cache = new(None)
    cache.place(0, values * np.nan)
    cache.reserve(1)
    assert cache.narrow


def test_scales_are_kept_in_a_file(tmp_path: Path) -> None:
    manifest, path = demo_manifest(), tmp_path / "scales"
    scales = {
        stage: np.full((2 * spec.layers, spec.kv_heads, spec.head_dim), 0.5 + number, np.float32)
        for number, (stage, spec) in enumerate(manifest.stages.items())
    }
    write_scales(path, manifest, scales)
    found = read_scales(path, manifest)
    assert found.keys() == scales.keys()
    assert all(np.array_equal(found[stage], scales[stage]) for stage in scales)


@pytest.mark.parametrize("damage", ["short", "long", "empty", "zero", "negative", "nan", "inf"])
def test_damaged_scales_are_refused(tmp_path: Path, damage: str) -> None:
    manifest, path = demo_manifest(), tmp_path / "scales"
    count = sum(2 * spec.layers * spec.kv_heads * spec.head_dim for spec in manifest.stages.values())
    values = np.ones(count, "<f4")
    if damage in ("zero", "negative", "nan", "inf"):
        values[7] = {"zero": 0, "negative": -1}.get(damage, float(damage) if damage in ("nan", "inf") else 0)
    data = values.tobytes()
    path.write_bytes({"short": data[:-1], "long": data + b"x", "empty": b""}.get(damage, data))
    with pytest.raises(BundleError, match=r"^scales.*(bytes of scales|no number above 0)"):
        read_scales(path, manifest)
