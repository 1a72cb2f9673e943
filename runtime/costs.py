"""What runs of the stages cost, learned from every run.

A run's seconds depend on the stage and on how many positions it takes in at once. A machine that does other
things too runs everything slower for a while: that pace is followed apart, and costs are what a run takes at
the pace of 1, so that costs learned at different times compare.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

__all__ = ["CostTable"]

# Without a second point: each further position costs this share of the first.
_ASSUMED_SLOPE = 0.25
# The first runs of a shape may prepare something: the fastest of them counts.
_FIRST_RUNS = 5
# The pace changes faster than what a run costs.
_FOLLOW = 0.01
_FOLLOW_PACE = 0.1
# One run that waited for something else says little about the pace.
_MOST_DEVIATION = 3.0


@dataclass
class _Point:
    seconds: float
    runs: int = 1


class CostTable:
    """Seconds by stage and positions; `observe` takes what `stages.Observer` gives."""

    def __init__(self) -> None:
        self._points: dict[str, dict[int, _Point]] = {}
        self.pace = 1.0
        """How much slower than the costs say runs are just now."""

    def observe(self, stage: str, started: float, seconds: float, rows: int) -> None:
        """One run over `rows` positions."""
        # Where a device's clock times the stages, what is left of a round for the host may come out negative.
        seconds = max(0.0, seconds)
        points = self._points.setdefault(stage, {})
        point = points.get(rows)
        if point is None:
            points[rows] = _Point(seconds / self.pace)
            return
        point.runs += 1
        if point.seconds > 0:
            found = min(max(seconds / point.seconds, 1 / _MOST_DEVIATION), _MOST_DEVIATION)
            self.pace += _FOLLOW_PACE * (found - self.pace)
        own = seconds / self.pace
        if point.runs <= _FIRST_RUNS:
            point.seconds = min(point.seconds, own)
        else:
            point.seconds += _FOLLOW * (min(own, _MOST_DEVIATION * point.seconds) - point.seconds)

    def known(self, stage: str) -> bool:
        """Whether a run of this stage over one position was seen."""
        return 1 in self._points.get(stage, ())

    def seconds(self, stage: str, rows: int) -> float:
        """Expected seconds, at pace 1, of a run over `rows` (>= 1) positions; 0 for a stage never run.

        Between numbers of positions that have been seen the cost is read off a line.
        """
        known = self._points.get(stage)
        if not known:
            return 0.0
        if rows in known:
            return known[rows].seconds
        points = sorted(tuple(known))  # noqa: C414 - a copy first: another thread may add to it
        place = bisect_left(points, rows)
        if place == 0:
            return known[points[0]].seconds
        low = points[place - 1]
        if place == len(points):
            return known[low].seconds * (1 + _ASSUMED_SLOPE * (rows - low) / low)
        high = points[place]
        share = (rows - low) / (high - low)
        return known[low].seconds + share * (known[high].seconds - known[low].seconds)
