"""The oracle's patching rules: hand-made examples, Meta's vectorised form, and the runtime's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blt_edge.export.reference import causal_starts, patching_mode, transformers_patching
from blt_edge.graphs.config import parse_config
from blt_edge.runtime.patching import PatchBoundaries
from hypothesis import given
from hypothesis import strategies as st


def ids_of(data: bytes) -> list[int]:
    return [1, *(byte + 4 for byte in data)]


def starts(entropies: list[float], **config: Any) -> list[int]:
    return causal_starts(config, [1] + [70] * (len(entropies) - 1), np.array(entropies, np.float32))


def test_plain_entropy_ignores_the_first() -> None:
    assert starts([9, 0, 9, 1, 2], patching_threshold=1.0) == [0, 1, 3, 5]
    assert starts([0.0], patching_threshold=1.0) == [0, 1]
    assert starts([9, 9], patching_threshold=1.0) == [0, 1, 2]


def test_monotonic_compares_neighbours() -> None:
    assert starts([9, 0, 2, 2, 3.5, 9], monotonicity=True, patching_threshold=1.0) == [0, 1, 2, 3, 5, 6]
    both = {"monotonicity": True, "patching_threshold_add": 0.1, "patching_threshold": 1.0}
    assert starts([9, 0, 2, 2, 3.5, 9], **both) == [0, 1, 2, 3, 5, 6]


def test_threshold_add_needs_both() -> None:
    add = {"patching_threshold_add": 1.0, "patching_threshold": 3.0}
    assert starts([0, 0, 9, 9, 0, 2, 9, 9.5, 11], **add) == [0, 1, 2, 7, 9]


def test_zero_false_and_null_are_off() -> None:
    off = {"patching_threshold_add": 0.0, "monotonicity": False, "max_patch_length": None}
    assert starts([9, 0, 9, 9], patching_threshold=1.0, **off) == [0, 1, 3, 4]
    assert transformers_patching({"patching_mode": "entropy", **off})


def test_longest_patch_counts_from_the_last_start() -> None:
    assert starts([0] * 9, patching_threshold=1.0, max_patch_length=3) == [0, 1, 4, 7]
    assert starts([0, 0, 9, 0, 0, 0], patching_threshold=1.0, max_patch_length=3) == [0, 1, 3, 6]
    assert starts([0] * 4, patching_threshold=1.0, max_patch_length=1) == [0, 1, 2, 3, 4]


def test_static_and_byte() -> None:
    assert causal_starts({"patching_mode": "static", "patch_size": 3}, [5] * 8, None) == [0, 1, 4, 7]
    assert causal_starts({"patching_mode": "byte"}, [5] * 3, None) == [0, 1, 2, 3]
    assert causal_starts({"patch_in_forward": False}, [5] * 3, None) == [0, 1, 2, 3]
    assert patching_mode({"patching_mode": "space", "patch_in_forward": False}) == "byte"


def test_space_starts_after_the_first_space_like_byte() -> None:
    space = {"patching_mode": "space"}
    assert causal_starts(space, ids_of(b"a bc  d"), None) == [0, 1, 3, 6]
    assert causal_starts(space, ids_of("é!x".encode()), None) == [0, 1, 4]
    assert causal_starts(space, [1, 70, 2, 70, 70], None) == [0, 1, 3]


def meta_space_starts(ids: list[int]) -> list[int]:
    # Meta's formula: a mask over all positions at once
    byte = np.array(ids) - 4
    letters = [(b"09", b"AZ", b"az")[i] for i in range(3)]
    alphanumeric = np.any([(pair[0] <= byte) & (byte <= pair[1]) for pair in letters], axis=0)
    ends = ((byte < 0x80) & ~alphanumeric) | (byte >= 0xC0)
    ends[1:] &= ~ends[:-1].copy()
    ends |= byte < 0
    return [0, 1, *(i + 1 for i in range(1, len(ids)) if ends[i])]


@given(st.binary(max_size=40))
def test_space_equals_the_vectorised_form(data: bytes) -> None:
    assert causal_starts({"patching_mode": "space"}, ids_of(data), None) == meta_space_starts(ids_of(data))


RULES: list[dict[str, Any]] = [
    {"patching_threshold": 1.0},
    {"patching_threshold": 0.25, "monotonicity": True},
    {"patching_threshold": 1.0, "patching_threshold_add": 0.25},
    {"patching_mode": "space"},
    {"patching_mode": "static", "patch_size": 3},
    {"patching_mode": "byte"},
    {"patch_in_forward": False},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(
    data=st.binary(max_size=24),
    longest=st.sampled_from([None, 1, 2, 5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_runtime_agrees(rule: dict[str, Any], data: bytes, longest: int | None, seed: int) -> None:
    config = {"model_type": "blt", **rule, "max_patch_length": longest}
    ids = ids_of(data)
    # eighths are exact in float32, so that equal values meet the threshold too
    entropies = np.random.default_rng(seed).integers(0, 17, len(ids)).astype(np.float32) / 8
    runtime_rule = parse_config(config).patching
    boundaries = PatchBoundaries(runtime_rule)
    boundaries.extend(np.array(ids), entropies if runtime_rule.needs_entropy else None)
    assert boundaries.starts == causal_starts(config, ids, entropies)


def test_what_transformers_can_do_itself() -> None:
    assert transformers_patching({})
    assert transformers_patching({"patching_mode": "byte", "max_patch_length": 4})
    assert transformers_patching({"patching_mode": "space", "patch_in_forward": False})
    for extra in ({"patching_mode": "space"}, {"max_patch_length": 4}, {"monotonicity": True}):
        assert not transformers_patching(extra)
    assert not transformers_patching({"patching_threshold_add": 0.1})


def test_an_unknown_mode_has_no_rule() -> None:
    with pytest.raises(ValueError, match="bpe"):
        causal_starts({"patching_mode": "bpe"}, [1, 70], None)
