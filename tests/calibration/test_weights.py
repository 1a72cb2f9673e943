"""Weights to integers, against plain loops and known bounds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from blt_edge.graphs.quantize import Quantized, WeightFactors, dequantize, pack_int4, quantize_weight, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

LIMITS = {4: (-8, 7), 8: (-127, 127)}


def random_weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.05).astype(np.float32)


def block_errors(weight: np.ndarray, quantized: Quantized) -> np.ndarray:
    rest = (weight - dequantize(quantized)).astype(np.float64)
    return (rest.reshape(len(quantized.scales), -1, weight.shape[1]) ** 2).sum(axis=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_rounding_to_nearest_is_what_a_plain_loop_gives(bits: int, block: int) -> None:
    weight = random_weight(128, 5)
    found = quantize_weight(weight, bits, block, "rtn")
    high = LIMITS[bits][1]
    for column in range(5):
        for start in range(0, 128, block):
            part = weight[start : start + block, column]
            scale = np.float32(np.abs(part).max() / np.float32(high))
            assert found.scales[start // block, column] == scale
            np.testing.assert_array_equal(
                found.values[start : start + block, column], np.rint(part / scale).astype(np.int8)
            )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 96])
def test_search_is_never_worse_and_mostly_better(bits: int, block: int) -> None:
    weight = random_weight(96, 300)
    plain = block_errors(weight, quantize_weight(weight, bits, block, "rtn"))
    searched = block_errors(weight, quantize_weight(weight, bits, block, "mse"))
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()
    assert searched.sum() < plain.sum() * (0.9 if bits == 4 else 1.0)


def test_search_comes_close_to_trying_a_thousand_scales() -> None:
    weight = random_weight(32, 20)
    searched = block_errors(weight, quantize_weight(weight, 4, 32, "mse"))[0]
    largest = np.abs(weight).max(axis=0)
    best = np.full(20, np.inf)
    for share in np.linspace(0.4, 1.1, 1001):
        scale = largest / 7 * share
        rest = weight - np.clip(np.rint(weight / scale), -8, 7) * scale
        best = np.minimum(best, (rest.astype(np.float64) ** 2).sum(axis=0))
    assert (searched <= best * 1.06).all()
    assert searched.sum() <= best.sum() * 1.02


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([(32, 3), (64, 1), (64, 40)]),
        elements=st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False),
    ),
    st.sampled_from([4, 8]),
    st.sampled_from(["mse", "rtn"]),
)
def test_any_finite_weight(weight: np.ndarray, bits: int, search: str) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = quantize_weight(weight, bits, 32, search)
    low, high = LIMITS[bits]
    assert found.values.dtype == np.int8
    assert found.values.min() >= low
    assert found.values.max() <= high
    assert np.isfinite(found.scales).all()
    assert (found.scales > 0).all()


def test_zeros_stay_zeros() -> None:
    found = quantize_weight(np.zeros((64, 7), np.float32), 4, 32)
    assert not found.values.any()
    assert (found.scales == 1).all()


def test_what_fits_the_grid_is_exact() -> None:
    values = np.random.default_rng(1).integers(-7, 8, (64, 9)).astype(np.float32)
    values[::32] = 7
    for search in ("rtn", "mse"):
        np.testing.assert_allclose(
            dequantize(quantize_weight(values * 0.5, 4, 32, search)), values * 0.5, atol=1e-6
        )


@given(hnp.arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(-8, 7)))
def test_packing_is_the_low_nibble_first(values: np.ndarray) -> None:
    packed = pack_int4(values)
    assert len(packed) == -(-values.size // 2)
    nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: values.size]
    np.testing.assert_array_equal(nibbles.astype(ml_dtypes.int4).astype(np.int8), values.reshape(-1))


def test_factors() -> None:
    weight = random_weight(4, 3)
    rows, columns = np.float32([1, 2, 3, 4]), np.float32([5, 6, 7])
    np.testing.assert_array_equal(scaled(weight, WeightFactors()), weight)
    expected = np.diag(rows) @ weight @ np.diag(columns)
    np.testing.assert_allclose(scaled(weight, WeightFactors(rows, columns)), expected, rtol=1e-6)
    np.testing.assert_array_equal(scaled(weight[0], WeightFactors(columns=columns)), weight[0] * columns)
