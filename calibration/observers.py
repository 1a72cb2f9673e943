"""What a static int8 grid has to know about an activation, gathered while it streams by.

An observer keeps a histogram of magnitudes with bins of constant relative width (2^-9 of a value), once as
counts and once weighted, the largest magnitude of each channel and the number of rows: the same memory for
one byte and for a gigabyte. Bins are cut from a float32's own bits, so counts do not depend on the order or
the chunks in which values come. Every calibration method is a reading of these, so one run serves all.

What it does not know: graphs, weights, texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..runtime.errors import BltError

__all__ = [
    "LEVELS",
    "METHODS",
    "ActivationObserver",
    "CalibrationError",
    "CalibrationRun",
    "Histogram",
    "Observations",
    "Ranges",
    "entropy",
    "min_max",
    "mse",
    "percentile",
]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

LEVELS = 127
"""Positive steps of a symmetric int8 grid: the step is limit / LEVELS."""

# Bins: 2^9 per octave from 2^-20 to 2^20; one more below for everything smaller, zero included.
_MANTISSA_BITS = 9
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -20, 20
_SHIFT = 23 - _MANTISSA_BITS
_FIRST = (127 + _LOWEST_EXPONENT) << _MANTISSA_BITS
_OCTAVE_BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) << _MANTISSA_BITS
_BLOCK = 1 << 18  # values looked at together: they and their bins stay in the cache
_LEAST_SQUARE = 2.0**-40  # rows with a smaller mean square are as good as zero
_FEW = 1 << 12  # of a decode step's few values, not even the bins are worth walking over


class CalibrationError(BltError):
    """Calibration ran and found no usable range."""


class Histogram:
    """Counts of magnitudes |x| of float32 values, in bins of constant relative width."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(1 + _OCTAVE_BINS, np.int64)
        """[20481]: values below 2^-20, then 512 bins for each octave; the last also holds all above 2^20."""
        self.weights: Doubles = np.zeros(1 + _OCTAVE_BINS, np.float64)
        """[20481]: the same, but each value counts as one over its row's mean square."""
        self.maximum = 0.0
        """Largest magnitude, exact."""

    def add(self, magnitudes: Floats) -> None:
        """Count float32 magnitudes [rows, K] (>= 0, finite, contiguous)."""
        bits = magnitudes.reshape(-1).view(np.int32) >> _SHIFT
        bits -= _FIRST - 1
        np.clip(bits, 0, _OCTAVE_BINS, out=bits)
        width = magnitudes.shape[1]
        squares = np.einsum("rk,rk->r", magnitudes, magnitudes, dtype=np.float64) / width
        weights = np.repeat(
            np.where(squares > _LEAST_SQUARE, 1 / np.maximum(squares, _LEAST_SQUARE), 0), width
        )
        if bits.size < _FEW:
            np.add.at(self.counts, bits, 1)
            np.add.at(self.weights, bits, weights)
        else:
            self.counts += np.bincount(bits, minlength=1 + _OCTAVE_BINS)
            self.weights += np.bincount(bits, weights, minlength=1 + _OCTAVE_BINS)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def masses(self) -> tuple[Doubles, Doubles, Doubles]:
        """(lower edge, upper edge, count) of the bins that hold anything, ascending, float64.

        The last bin ends at `maximum`.
        """
        held = np.flatnonzero(self.counts)
        bits = (np.arange(1 + _OCTAVE_BINS, dtype=np.int32) + np.int32(_FIRST)) << np.int32(_SHIFT)
        edges = np.concatenate([[0.0], bits.view(np.float32).astype(np.float64)])
        upper = np.minimum(edges[held + 1], self.maximum)
        upper[-1:] = self.maximum
        lower = np.minimum(edges[held], upper)
        return lower, upper, self.counts[held].astype(np.float64)


class ActivationObserver:
    """Everything calibration keeps about the input [..., K] of one product."""

    def __init__(self, width: int) -> None:
        self.rows = 0
        """Rows seen."""
        self.channel_max: Floats = np.zeros(width, np.float32)
        """[K]: the largest magnitude of each channel."""
        self.histogram = Histogram()
        """Magnitudes of all channels together."""

    def observe(self, values: Floats) -> None:
        """Take in float32 [..., K]. Raises CalibrationError, and counts nothing, for NaN or infinity."""
        width = len(self.channel_max)
        rows = np.ascontiguousarray(values).reshape(-1, width)
        if not len(rows):
            return
        step = max(1, _BLOCK // width)
        blocks = [rows[start : start + step] for start in range(0, len(rows), step)]
        peak = np.max([np.maximum(block.max(axis=0), -block.min(axis=0)) for block in blocks], axis=0)
        if not np.isfinite(peak).all():
            raise CalibrationError("an activation is NaN or infinite; the model cannot be calibrated")
        for block in blocks:
            self.histogram.add(np.abs(block))
        np.maximum(self.channel_max, peak, out=self.channel_max)
        self.histogram.maximum = float(self.channel_max.max())
        self.rows += len(rows)

    def limit(self, method: str) -> float:
        """The magnitude that the int8 grid's end stands for, > 0, by one of `METHODS`.

        An activation that was always zero gets 1: any grid represents it exactly.
        """
        return METHODS[method](self.histogram) if self.histogram.maximum > 0 else 1.0


def min_max(histogram: Histogram) -> float:
    """The largest magnitude: nothing is clipped."""
    return histogram.maximum


def percentile(histogram: Histogram, share: float = 99.99) -> float:
    """The magnitude that `share` percent of all values stay below, to 2^-9 of its value."""
    lower, upper, counts = histogram.masses()
    below = np.cumsum(counts)
    rank = share / 100 * below[-1]
    index = int(np.searchsorted(below, rank))
    inside = (rank - (below[index] - counts[index])) / counts[index]
    return _positive(lower[index] + inside * (upper[index] - lower[index]), histogram)


def mse(histogram: Histogram) -> float:
    """The limit with the smallest squared error of rounding and clipping, each row's in relation to the row.

    What follows a product is mostly normed, so an error counts as much as its row is small: absolute errors
    would let the few rows of a loud script or position set the grid of all others. The error is the mean over
    rows of |x - grid(x)|^2 / |x|^2.

    Values are taken as uniform within a bin, for which the error has a closed form, so nothing is lost to
    bins wider than a step. Searched from the maximum downwards over 6 octaves.
    """
    lower, upper, _ = histogram.masses()
    bins = lower, upper, histogram.weights[histogram.counts > 0]
    coarse = histogram.maximum * 2.0 ** (-np.arange(49) / 8)
    best = int(np.argmin([_squared_error(limit, *bins) for limit in coarse]))
    fine = np.linspace(coarse[max(0, best - 1)], coarse[min(len(coarse) - 1, best + 1)], 17)
    errors = [_squared_error(limit, *bins) for limit in fine]
    return float(fine[int(np.argmin(errors))])


def _squared_error(limit: float, lower: Doubles, upper: Doubles, counts: Doubles) -> float:
    step = limit / LEVELS
    # A last bin of no width holds its maximum alone.
    lower = np.minimum(lower, upper * (1 - 1e-9))
    mean = (_integral(upper / step) - _integral(lower / step)) * step / (upper - lower)
    return float(step * step * (mean * counts).sum())


def _integral(steps: Doubles) -> Doubles:
    # Of the squared error from 0 to a value given in steps: it is 1/12 for each whole step, and beyond the
    # grid's end the nearest level stays the last one.
    nearest = np.minimum(np.rint(steps), LEVELS)
    return nearest / 12 + (steps - nearest) ** 3 / 3


def entropy(histogram: Histogram, bins: int = 2048) -> float:
    """The limit whose 128 levels keep the distribution's shape best (least Kullback-Leibler divergence).

    The search that TensorRT's calibrator made known: for each candidate, the clipped distribution P, with all
    that lies beyond added to its last bin, against Q, the same bins averaged within each level. But here a
    value counts by its magnitude, as it does in a product: in plain counts the many values near zero decide,
    and the search cut 0.1 to 0.8 % off a gated product, to a tenth of its range, which lost more than
    clipping nothing.
    """
    # Sums of magnitudes in `bins` equal bins of [0, maximum]: cumulative ones interpolated at their edges.
    lower, upper, counts = histogram.masses()
    sums = counts * (lower + upper) / 2
    below = np.cumsum(sums)
    edges = np.stack([lower, upper], axis=1).reshape(-1)
    cumulative = np.stack([below - sums, below], axis=1).reshape(-1)
    linear = np.diff(np.interp(np.linspace(0, histogram.maximum, bins + 1), edges, cumulative))
    # The search.
    beyond = linear.sum() - np.cumsum(linear)
    levels = LEVELS + 1
    candidates = range(levels, bins + 1, 4)
    divergences = [_divergence(linear[:size], beyond[size - 1], levels) for size in candidates]
    best = candidates[int(np.argmin(divergences))]
    return _positive(histogram.maximum * best / bins, histogram)


def _divergence(inside: Doubles, beyond: float, levels: int) -> float:
    starts = np.arange(levels) * len(inside) // levels
    held = inside > 0
    mass, members = np.add.reduceat(inside, starts), np.add.reduceat(held.astype(np.float64), starts)
    sizes = np.diff(np.append(starts, len(inside)))
    q = np.repeat(mass / np.maximum(members, 1), sizes) * held
    p = inside.copy()
    p[-1] += beyond
    # What Q gives no chance at all would cost infinitely much: a little is moved there, as is customary.
    p, q = np.maximum(p / p.sum(), 1e-7), np.maximum(q / max(q.sum(), 1e-300), 1e-7)
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def _positive(limit: float, histogram: Histogram) -> float:
    # Mostly zeros and a few values: any clipping that reaches zero would lose them all.
    return float(limit) if limit > histogram.maximum * 1e-6 else histogram.maximum


METHODS: dict[str, Callable[[Histogram], float]] = {
    "minmax": min_max,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""By the words of `names.CALIBRATION_METHODS`: histogram -> limit."""


@dataclass(frozen=True)
class CalibrationRun:
    """What was read: so many windows of these texts, each from BOS, chosen by the seed."""

    texts: tuple[str, ...]
    """Their names."""
    windows: int
    window_bytes: int
    seed: int


@dataclass(frozen=True)
class Ranges:
    """Limits and channel maxima by weight name (the initializer of the product's matrix)."""

    method: str
    """How the limits were chosen, one of `METHODS`."""
    run: CalibrationRun
    limits: Mapping[str, float]
    """The magnitude that 127 stands for, > 0, for the activation that meets this weight."""
    channels: Mapping[str, Floats]
    """float32 [K]: the largest magnitude of each channel of that activation."""

    def scale(self, weight: str) -> float:
        """Magnitude at the end of the symmetric int8 grid (its step is this / 127), > 0."""
        return self.limits[self._known(weight)]

    def channel_max(self, weight: str) -> Floats:
        """float32 [K]: the largest magnitude of each channel."""
        return self.channels[self._known(weight)]

    def _known(self, weight: str) -> str:
        if weight not in self.limits:
            raise CalibrationError(f"no range was collected for {weight}; calibrate its stage too")
        return weight


@dataclass(frozen=True)
class Observations:
    """Everything a run has seen; every method reads its ranges from here."""

    run: CalibrationRun
    observers: Mapping[str, ActivationObserver]
    """By weight name, in graph order."""

    def ranges(self, method: str) -> Ranges:
        """Limits by one of `METHODS`."""
        assert method in METHODS, method
        return Ranges(
            method=method,
            run=self.run,
            limits={name: observer.limit(method) for name, observer in self.observers.items()},
            channels={name: observer.channel_max.copy() for name, observer in self.observers.items()},
        )
