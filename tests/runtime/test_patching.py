"""Boundaries equal plain-Python versions of the written rules and transformers', for any history of edits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.runtime.names import PATCHING_MODES
from blt_edge.runtime.patching import PatchBoundaries, PatchingRule
from blt_edge.runtime.vocabulary import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.torch_only import torch_or_skip, transformers_or_skip

RELEASED = 1.335442066192627

# Few distinct values, some of them the thresholds below, so that equalities are frequent.
ENTROPIES = st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 5.5, float("nan")]),
    st.floats(0, 6, width=32, allow_subnormal=False),
)
IDS = st.one_of(st.integers(0, 259), st.sampled_from([1, 2, 4 + 32, 4 + 97, 4 + 0xC3, 4 + 0xA9]))
TEXTS = st.lists(st.tuples(IDS, ENTROPIES), max_size=40)
LIMITS = st.one_of(st.none(), st.integers(1, 9))
THRESHOLDS = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, RELEASED, 9.0])
RULES = st.one_of(
    st.builds(PatchingRule, st.just("entropy"), THRESHOLDS, max_patch_length=LIMITS),
    st.builds(PatchingRule, st.just("entropy"), THRESHOLDS, monotonic=st.just(True), max_patch_length=LIMITS),
    st.builds(PatchingRule, st.just("entropy"), THRESHOLDS, THRESHOLDS, max_patch_length=LIMITS),
    st.builds(PatchingRule, st.just("space"), max_patch_length=LIMITS),
    st.builds(PatchingRule, st.just("static"), patch_size=st.integers(1, 9), max_patch_length=LIMITS),
    st.builds(PatchingRule, st.just("byte"), max_patch_length=LIMITS),
)
Text = list[tuple[int, float]]


def space_like(value: int) -> bool:
    if value < 4:
        return True
    byte = value - 4
    return byte >= 0xC0 or (byte < 0x80 and not chr(byte).isalnum())


def starts_after(rule: PatchingRule, i: int, ids: list[int], h: list[float]) -> bool:
    """Whether the rule, without a longest patch, starts a patch at i + 1."""
    threshold = np.float32(rule.threshold or 0)
    if rule.mode == "byte":
        return True
    if rule.mode == "static":
        return i + 1 in [1 + k * (rule.patch_size or 1) for k in range(i + 1)]
    if i == 0:
        return True
    if rule.mode == "space":
        return ids[i] < 4 or (space_like(ids[i]) and not space_like(ids[i - 1]))
    if rule.monotonic:
        return i == 1 or bool(np.float32(h[i]) - np.float32(h[i - 1]) > threshold)
    if rule.threshold_add:
        if i < 3:
            return i == 1
        rise = np.float32(h[i]) - np.float32(h[i - 1])
        return bool(rise > np.float32(rule.threshold_add) and np.float32(h[i]) > threshold)
    return bool(np.float32(h[i]) > threshold)


def by_definition(rule: PatchingRule, text: Text) -> list[int]:
    """The starts up to and including len(text), byte by byte."""
    ids, h = [value for value, _ in text], [entropy for _, entropy in text]
    starts, in_patch = [0], 0
    for i in range(len(ids)):
        in_patch += 1
        full = rule.max_patch_length is not None and in_patch >= rule.max_patch_length
        if full or starts_after(rule, i, ids, h):
            starts.append(i + 1)
            in_patch = 0
    return starts


def arrays(text: Text) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    ids = np.array([value for value, _ in text], dtype=np.int64)
    return ids, np.array([entropy for _, entropy in text], dtype=np.float32)


def add(boundaries: PatchBoundaries, text: Text) -> None:
    boundaries.extend(*arrays(text))


def of_entropies(rule: PatchingRule, entropies: list[float]) -> list[int]:
    boundaries = PatchBoundaries(rule)
    add(boundaries, [(4, entropy) for entropy in entropies])
    return boundaries.starts


@settings(max_examples=1000, deadline=None)
@given(RULES, TEXTS, st.lists(st.integers(0, 40), max_size=6))
def test_any_cut_gives_the_starts_of_the_written_rule(
    rule: PatchingRule, text: Text, cuts: list[int]
) -> None:
    expected = by_definition(rule, text)
    one_by_one, cut = PatchBoundaries(rule), PatchBoundaries(rule)
    for count, pair in enumerate(text, start=1):
        add(one_by_one, [pair])
        assert one_by_one.starts == [start for start in expected if start <= count]
        assert one_by_one.length == count
    for start, end in pairwise([0, *sorted(min(c, len(text)) for c in cuts), len(text)]):
        add(cut, text[start:end])
    assert one_by_one.starts == cut.starts == expected
    assert all(type(start) is int for start in cut.starts)


@settings(max_examples=500, deadline=None)
@given(RULES, st.lists(st.tuples(st.integers(0, 40), TEXTS.filter(len)), max_size=6))
def test_any_edits_leave_what_a_fresh_run_has(rule: PatchingRule, edits: list[tuple[int, Text]]) -> None:
    boundaries, text = PatchBoundaries(rule), list[tuple[int, float]]()
    for keep, more in edits:
        length = min(keep, len(text))
        boundaries.rollback(length)
        assert boundaries.length == length
        assert boundaries.starts == by_definition(rule, text[:length])
        add(boundaries, more)
        text = text[:length] + more
        assert boundaries.length == len(text)
        assert boundaries.starts == by_definition(rule, text)


@settings(max_examples=500, deadline=None)
@given(RULES, TEXTS, st.integers(0, 40), st.integers(0, 40))
def test_lengths_and_indices_follow_from_the_starts(
    rule: PatchingRule, text: Text, one: int, two: int
) -> None:
    boundaries = PatchBoundaries(rule)
    add(boundaries, text)
    starts, n = boundaries.starts, len(text)
    patch_of = [sum(start <= i for start in starts) - 1 for i in range(n + 1)]
    lengths = boundaries.patch_lengths()
    assert sum(lengths) == n
    assert all(length > 0 for length in lengths)
    assert np.repeat(np.arange(len(lengths)), lengths).tolist() == patch_of[:n]
    assert boundaries.count == len(lengths)
    first, last = sorted((min(one, n), min(two, n)))
    latents = boundaries.latent_index(first, last - first)
    assert latents.dtype == np.int64
    assert latents.tolist() == [patch_of[i + 1] - 1 for i in range(first, last)]
    assert (latents >= 0).all()
    # What byte i reads is the last patch that is complete before byte i + 1.
    ends = np.cumsum(lengths)
    assert all(ends[latent] <= i + 1 for i, latent in zip(range(first, last), latents, strict=True))


@settings(max_examples=300, deadline=None)
@given(st.lists(ENTROPIES, min_size=2, max_size=60), THRESHOLDS, st.integers(1, 9))
def test_entropy_mode_equals_transformers(entropies: list[float], threshold: float, longest: int) -> None:
    torch = torch_or_skip()
    blt = transformers_or_skip("transformers.models.blt.modeling_blt")
    rows = torch.tensor([entropies], dtype=torch.float32)
    raw = blt.BltPatcher.patch_lengths_from_entropies(rows, len(entropies), threshold=threshold)
    # transformers closes the last patch with length 0 where a patch starts after the last position
    starts = of_entropies(PatchingRule("entropy", threshold), entropies)
    assert [b - a for a, b in pairwise([*starts, len(entropies)])] == raw[0].tolist()
    lengths = [length for length in blt.process_patch_lengths(raw, longest)[0].tolist() if length > 0]
    boundaries = PatchBoundaries(PatchingRule("entropy", threshold, max_patch_length=longest))
    add(boundaries, [(4, entropy) for entropy in entropies])
    assert boundaries.patch_lengths() == lengths
    # Only ours says that a patch that is full at the last byte is complete.
    assert (boundaries.starts[-1] == len(entropies)) == (raw[0, -1].item() == 0 or lengths[-1] == longest)


def test_entropies_are_compared_in_float32_as_torch_does() -> None:
    rounded = np.float32(0.1)
    assert float(rounded) > 0.1  # so that a comparison in float64 would start a patch
    around = np.array([np.nextafter(rounded, np.float32(0)), rounded, np.nextafter(rounded, np.float32(9))])
    starts = of_entropies(PatchingRule("entropy", 0.1), [0.0, *around.tolist()])
    assert [i + 1 in starts for i in (1, 2, 3)] == [False, False, True]
    # Entropies of another type are rounded first: this is above float32's 0.1, but less than a rounding.
    boundaries = PatchBoundaries(PatchingRule("entropy", 0.1))
    boundaries.extend(np.array([4, 5, 6]), np.array([0.0, 0.1000000020, 0.2]))  # type: ignore[arg-type]
    assert boundaries.starts == [0, 1, 3]
    assert of_entropies(PatchingRule("entropy", 1e300), [1.0] * 4) == [0, 1]
    assert of_entropies(PatchingRule("entropy", -1e300), [1.0] * 4) == [0, 1, 2, 3, 4]
    torch = torch_or_skip()
    assert (torch.from_numpy(around) > 0.1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("rule", "starts"),
    [
        (PatchingRule("entropy", 1.0), [0, 1, 3, 5, 6]),
        (PatchingRule("entropy", 1.0, monotonic=True), [0, 1, 2, 3, 5]),
        (PatchingRule("entropy", 1.0, 0.25), [0, 1, 2, 5]),
        (PatchingRule("entropy", 1.0, 0.25, monotonic=True), [0, 1, 2, 3, 5]),
        (PatchingRule("entropy", 1.0, 0.0), [0, 1, 3, 5, 6]),
        (PatchingRule("entropy", 9.0), [0, 1]),
        (PatchingRule("entropy", 9.0, max_patch_length=2), [0, 1, 3, 5]),
        (PatchingRule("entropy", -1.0), [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_entropy_rules_by_hand(rule: PatchingRule, starts: list[int]) -> None:
    assert of_entropies(rule, [7.0, 0.5, 2.0, 0.9, 2.5, 2.5]) == starts


def test_spaces_by_hand() -> None:
    boundaries = PatchBoundaries(PatchingRule("space"))
    data = "Hi, you été\n\nx_1 文".encode()
    boundaries.extend(encode(data))
    edges = [*boundaries.starts, 1 + len(data)]
    patches = [data[max(0, start - 1) : end - 1] for start, end in pairwise(edges)]
    assert patches == [
        b"", b"Hi,", b" you ", b"\xc3\xa9t\xc3", b"\xa9\n", b"\nx_", b"1 ", b"\xe6\x96\x87",
    ]  # fmt: skip


def test_what_is_like_a_space() -> None:
    letters = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for byte in range(256):
        boundaries = PatchBoundaries(PatchingRule("space"))
        boundaries.extend(encode(bytes([ord("a"), byte])))
        assert (3 in boundaries.starts) == (byte not in letters and not 0x80 <= byte < 0xC0)


def test_a_new_text_has_decided_its_first_start() -> None:
    boundaries = PatchBoundaries(PatchingRule("byte"))
    assert (boundaries.length, boundaries.starts, boundaries.patch_lengths()) == (0, [0], [])
    assert boundaries.count == 0
    assert boundaries.latent_index(0, 0).tolist() == []
    boundaries.extend(np.empty(0, dtype=np.int64))
    boundaries.rollback(0)
    assert boundaries.starts == [0]


@pytest.mark.parametrize("mode", ["space", "static", "byte"])
def test_other_modes_do_not_look_at_entropies(mode: str) -> None:
    rule = PatchingRule(mode, patch_size=3)
    assert not rule.needs_entropy
    ids = encode(b"some text, more text")
    with_entropies, without = PatchBoundaries(rule), PatchBoundaries(rule)
    with_entropies.extend(ids, np.full(len(ids), 9, dtype=np.float32))
    without.extend(ids)
    assert with_entropies.starts == without.starts


def test_missing_or_uneven_entropies_and_positions_outside_are_refused() -> None:
    assert PatchingRule("entropy", 1.0).needs_entropy
    boundaries = PatchBoundaries(PatchingRule("entropy", 1.0))
    ids = encode(b"ab")
    with pytest.raises(ValueError, match="no entropies given for 3 ids"):
        boundaries.extend(ids)
    for wrong in (np.zeros(2, dtype=np.float32), np.zeros((3, 1), dtype=np.float32)):
        with pytest.raises(ValueError, match="allowed is one each"):
            boundaries.extend(ids, wrong)
    assert (boundaries.length, boundaries.starts) == (0, [0])
    boundaries.extend(ids, np.zeros(3, dtype=np.float32))
    for length in (-1, 4):
        with pytest.raises(ValueError, match=f"roll-back to length {length}; allowed is 0 to 3"):
            boundaries.rollback(length)
    for first, count in ((-1, 2), (0, 4), (3, 1), (2, -1)):
        with pytest.raises(IndexError, match="allowed are 0 to below 3"):
            boundaries.latent_index(first, count)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mode": "bpe"}, "patching mode is 'bpe'; allowed are entropy, space, static, byte"),
        ({"mode": None}, "patching mode is None"),
        ({"mode": "entropy"}, "patching mode entropy has no threshold"),
        ({"mode": "entropy", "threshold": float("nan")}, "patching threshold is nan; allowed is a finite"),
        ({"mode": "entropy", "threshold": float("inf")}, "patching threshold is inf"),
        ({"mode": "entropy", "threshold": "1.3"}, "patching threshold is '1.3'"),
        ({"mode": "entropy", "threshold": True}, "patching threshold is True"),
        (
            {"mode": "entropy", "threshold": 1.0, "threshold_add": float("nan")},
            "patching threshold_add is nan",
        ),
        ({"mode": "entropy", "threshold": 1.0, "monotonic": None}, "monotonic is None; allowed is true or"),
        ({"mode": "byte", "max_patch_length": 0}, "max_patch_length is 0; allowed is a whole number >= 1"),
        ({"mode": "byte", "max_patch_length": 2.0}, "max_patch_length is 2.0"),
        ({"mode": "static"}, "patching mode static has no patch_size"),
        ({"mode": "static", "patch_size": 0}, "patch_size is 0; allowed is a whole number >= 1"),
        ({"mode": "space", "threshold": float("nan")}, "patching threshold is nan"),
    ],
)
def test_impossible_rules_are_refused_in_one_line(fields: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        PatchingRule(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_rules_are_values() -> None:
    rule = PatchingRule("entropy", np.float32(1.5), 0.0, max_patch_length=np.int64(8))
    assert rule == PatchingRule("entropy", 1.5, None, max_patch_length=8)
    assert replace(rule, mode="byte").mode == "byte"
    assert type(rule.threshold) is float
    assert type(rule.max_patch_length) is int
    assert PATCHING_MODES == ("entropy", "space", "static", "byte")
