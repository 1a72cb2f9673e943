"""Several readings of one quantity, in a few numbers; and the machine they were taken on, in one line."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ...calibration.machine import processor_name

__all__ = ["Latency", "Spread", "machine"]


@dataclass(frozen=True)
class Spread:
    """Readings of one quantity in several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, smallest and largest of at least one reading."""
        return cls(statistics.median(values), min(values), max(values))

    @property
    def relative(self) -> float:
        """From the smallest to the largest, as a share of the median; 0 when that is 0."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"

    def to_dict(self) -> dict[str, float]:
        """For the JSON line."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Latency:
    """A distribution of times, in the unit of its readings."""

    count: int
    """Readings."""
    min: float
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency:
        """Of at least one reading; a percentile between two readings is interpolated."""
        low, p50, p90, p95, p99, high = np.percentile(values, (0, 50, 90, 95, 99, 100)).tolist()
        return cls(len(values), low, float(np.mean(values)), p50, p90, p95, p99, high)

    def scaled(self, factor: float) -> Latency:
        """In another unit."""
        values = {name: value * factor for name, value in asdict(self).items() if name != "count"}
        return Latency(self.count, **values)

    def to_dict(self) -> dict[str, float]:
        """For the JSON line."""
        return asdict(self)


def machine() -> str:
    """Processor and core count, as the operating system names them."""
    return f"{processor_name()}, {os.cpu_count()} cores"
