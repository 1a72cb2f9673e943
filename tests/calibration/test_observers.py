"""Observers against plain numpy over all values at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from blt_edge.calibration.observers import (
    LEVELS,
    METHODS,
    ActivationObserver,
    CalibrationError,
    entropy,
    min_max,
    mse,
    percentile,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

Floats = npt.NDArray[np.float32]

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 6)),
    elements=st.one_of(st.floats(-(2.0**22), 2.0**22, width=32), st.floats(-4, 4, width=32)),
)


def samples(name: str, count: int = 60_000) -> Floats:
    random = np.random.default_rng(5)
    made = {
        "normal": lambda: random.normal(0, 3, count),
        "laplace": lambda: random.laplace(0, 0.01, count),
        "heavy": lambda: random.standard_t(2, count),
        "uniform": lambda: random.uniform(-5, 5, count),
        "outlier": lambda: np.append(random.normal(0, 1, count - 1), 100.0),
        "sparse": lambda: np.maximum(random.normal(-1, 1, count), 0) * 1000,
        "one value": lambda: np.full(count, 0.3),
        "two values": lambda: np.where(random.random(count) < 0.5, -1.0, 4.0),
    }[name]
    return made().astype(np.float32).reshape(-1, 20)


SHAPES = ["normal", "laplace", "heavy", "uniform", "outlier", "sparse", "one value", "two values"]


def observed(data: Floats, pieces: int = 7) -> ActivationObserver:
    observer = ActivationObserver(data.shape[-1])
    for piece in np.array_split(data, pieces):
        observer.observe(piece)
    return observer


def edges_by_hand() -> npt.NDArray[np.float64]:
    steps = [2.0**exponent * (1 + part / 512) for exponent in range(-20, 20) for part in range(512)]
    return np.array([0.0, *steps])


@settings(deadline=None)
@given(data=values, cuts=st.lists(st.integers(0, 40), max_size=5))
def test_pieces_count_as_the_whole_does(data: Floats, cuts: list[int]) -> None:
    observer = ActivationObserver(data.shape[1])
    for piece in np.split(data, sorted(min(cut, len(data)) for cut in cuts)):
        observer.observe(piece)
    absolute = np.abs(data.astype(np.float64))
    places = np.searchsorted(edges_by_hand(), absolute.ravel(), side="right") - 1
    expected = np.bincount(places, minlength=len(edges_by_hand()))
    np.testing.assert_array_equal(observer.histogram.counts, expected)
    np.testing.assert_array_equal(observer.channel_max, absolute.max(axis=0).astype(np.float32))
    assert observer.rows == len(data)
    assert observer.histogram.total == data.size
    assert min_max(observer.histogram) == absolute.max()


@settings(deadline=None, max_examples=30)
@given(data=values)
def test_every_method_stays_within_what_was_seen(data: Floats) -> None:
    observer = observed(data, 1)
    largest = float(np.abs(data).max())
    for method in METHODS:
        limit = observer.limit(method)
        assert 0 < limit <= largest if largest > 0 else limit == 1.0, method


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [50.0, 99.0, 99.99, 100.0])
def test_percentile_is_numpys_within_a_bin(shape: str, share: float) -> None:
    data = samples(shape)
    expected = np.percentile(np.abs(data), share, method="inverted_cdf")
    if shape == "sparse" and share == 50.0:
        return  # more than half are zero, and a limit of zero is no limit
    assert percentile(observed(data).histogram, share) == pytest.approx(expected, rel=2**-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_finds_the_least_error_relative_to_each_row(shape: str) -> None:
    data = samples(shape).astype(np.float64)
    used = data.any(axis=1)

    def error(limit: float) -> float:
        step = limit / LEVELS
        rounded = np.clip(np.rint(data / step), -LEVELS, LEVELS) * step
        return float((((data - rounded) ** 2).sum(axis=1)[used] / (data**2).sum(axis=1)[used]).mean())

    largest = np.abs(data).max()
    least = min(error(limit) for limit in largest * np.linspace(0.02, 1, 300))
    found = error(mse(observed(data.astype(np.float32)).histogram))
    if shape in ("one value", "two values"):  # no error at all is possible; a step's rounding is what is left
        assert found <= 2**-16
    else:
        assert found <= 1.02 * least


def divergence_by_hand(counts: list[float], size: int) -> float:
    p = counts[:size]
    starts = [level * size // 128 for level in range(129)]
    q = [0.0] * size
    for start, end in pairwise(starts):
        members = [index for index in range(start, end) if counts[index] > 0]
        for index in members:
            q[index] = sum(counts[start:end]) / len(members)
    p = [*p[:-1], p[-1] + sum(counts[size:])]
    p = [max(value / sum(p), 1e-7) for value in p]
    q = [max(value / sum(q), 1e-7) for value in q]
    p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("shape", ["normal", "laplace", "heavy", "outlier"])
def test_entropy_finds_the_least_divergence(shape: str) -> None:
    # In nats, to a thousandth: bins of relative width smooth the thin tail a little.
    data = np.abs(samples(shape)).astype(np.float64)
    sums = np.histogram(data, 512, (0, data.max()), weights=data)[0].tolist()
    least = min(divergence_by_hand(sums, size) for size in range(128, 513, 4))
    limit = entropy(observed(data.astype(np.float32)).histogram, bins=512)
    found = divergence_by_hand(sums, round(limit / data.max() * 512))
    assert found <= 1.1 * least + 1e-3


def test_entropy_keeps_the_tail_of_a_gated_product() -> None:
    # Most values near zero, a few large: what enters a feed-forward's last product.
    random = np.random.default_rng(7)
    data = (random.laplace(size=(10_000, 20)) * random.laplace(size=(10_000, 20))).astype(np.float32)
    largest = float(np.abs(data).max())
    limit = observed(data).limit("entropy")
    assert limit < largest

    def error(limit: float) -> float:
        step = limit / LEVELS
        return float(((data - np.clip(np.rint(data / step), -LEVELS, LEVELS) * step) ** 2).sum())

    assert error(limit) < error(largest)


def test_a_single_outlier_is_clipped_by_all_methods_but_the_plain_one() -> None:
    observer = observed(samples("outlier"))
    assert observer.limit("minmax") == 100.0
    assert observer.limit("percentile") < 6
    assert observer.limit("entropy") < 30
    assert observer.limit("mse") < 90  # one of 60,000 weighs little, but squared it is not nothing


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_not_counted(bad: float) -> None:
    observer = observed(samples("normal"))
    before = observer.histogram.counts.copy(), observer.channel_max.copy(), observer.rows
    data = samples("normal")[:50].copy()
    data[17, 3] = bad
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        observer.observe(data)
    np.testing.assert_array_equal(observer.histogram.counts, before[0])
    np.testing.assert_array_equal(observer.channel_max, before[1])
    assert observer.rows == before[2]


def test_loud_rows_do_not_set_the_grid_of_all_others_for_mse() -> None:
    random = np.random.default_rng(3)
    data = random.normal(size=(2000, 32)).astype(np.float32)
    data[::50] *= 30
    loud = observed(data).limit("mse")
    assert loud < 0.5 * np.abs(data).max()
    assert loud > np.abs(data[1::50]).max() * 0.7


def test_zeros_and_nothing_leave_a_usable_range() -> None:
    observer = ActivationObserver(3)
    observer.observe(np.zeros((0, 3), np.float32))
    assert observer.rows == 0
    observer.observe(np.zeros((5, 3), np.float32))
    assert {observer.limit(method) for method in METHODS} == {1.0}


@settings(deadline=None, max_examples=20)
@given(data=values, exponent=st.integers(-10, 10))
def test_limits_scale_with_the_values(data: Floats, exponent: int) -> None:
    # Powers of two move whole octaves, so nothing but the scale may change.
    data = np.clip(data, -(2.0**8), 2.0**8)
    data[np.abs(data) < 2.0**-8] = 0
    if not data.any():
        return
    scaled = (data * np.float32(2.0**exponent)).astype(np.float32)
    for method in ("minmax", "mse"):
        ours, theirs = observed(scaled, 1).limit(method), observed(data, 1).limit(method)
        assert ours == pytest.approx(theirs * 2.0**exponent, rel=1e-5)
