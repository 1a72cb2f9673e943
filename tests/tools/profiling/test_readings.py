"""Medians, spreads and percentiles."""

from __future__ import annotations

import pytest
from blt_edge.tools.profile.statistics import Latency, Spread, machine


def test_spread() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread == Spread(2.0, 1.0, 3.0)
    assert spread.relative == 1.0
    assert str(spread) == "2 (1 to 3)"
    assert Spread.of([5.0]).relative == 0
    assert Spread.of([0.0, 0.0]).relative == 0


def test_percentiles_of_a_hundred_and_one_readings() -> None:
    """0 to 100: the p-th percentile is p."""
    latency = Latency.of([float(value) for value in reversed(range(101))])
    assert latency == Latency(101, 0, 50, 50, 90, 95, 99, 100)


def test_percentiles_between_readings_are_interpolated() -> None:
    latency = Latency.of([1.0, 2.0])
    assert (latency.p50, latency.p90, latency.p99) == pytest.approx((1.5, 1.9, 1.99))


def test_another_unit_keeps_the_count() -> None:
    assert Latency.of([0.001, 0.003]).scaled(1000).to_dict() == pytest.approx(
        {"count": 2, "min": 1, "mean": 2, "p50": 2, "p90": 2.8, "p95": 2.9, "p99": 2.98, "max": 3}
    )


def test_machine_names_its_cores() -> None:
    assert machine().endswith(" cores")
