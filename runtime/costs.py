"""What runs of the stages cost on this machine, learned from every run.

A run's seconds depend on the stage and on how many positions it takes in at once; for numbers of positions
that have not been seen yet the cost is read off a line between those that have.
"""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["CostTable"]

# What is known to be possible counts more than a slow moment of a shared machine.
_TOWARDS_SLOWER = 0.1
# Without a second point: each further position costs this share of the first.
_ASSUMED_SLOPE = 0.25


class CostTable:
    """Seconds by stage and positions; `observe` takes what `stages.Observer` gives."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}
        self._seconds: dict[str, dict[int, float]] = {}
        self.changes = 0
        """Counts new points, so that plans made from few can be made again."""

    def observe(self, stage: str, started: float, seconds: float, rows: int) -> None:
        """One run over `rows` positions."""
        known = self._seconds.get(stage)
        if known is None:
            known = self._seconds[stage] = {}
            self._rows[stage] = []
        before = known.get(rows)
        if before is None:
            known[rows] = seconds
            self._rows[stage] = sorted(known)
            self.changes += 1
        elif seconds < before:
            known[rows] = seconds
        else:
            known[rows] = before + _TOWARDS_SLOWER * (seconds - before)

    def known(self, stage: str) -> bool:
        """Whether a run of this stage over one position was seen."""
        return 1 in self._seconds.get(stage, ())

    def seconds(self, stage: str, rows: int) -> float:
        """Expected seconds of a run over `rows` positions (>= 1); 0 for a stage that never ran."""
        known = self._seconds.get(stage)
        if not known:
            return 0.0
        if rows in known:
            return known[rows]
        points = self._rows[stage]
        place = bisect_left(points, rows)
        if place == 0:
            return known[points[0]]
        low = points[place - 1]
        if place == len(points):
            return known[low] * (1 + _ASSUMED_SLOPE * (rows - low) / low)
        high = points[place]
        share = (rows - low) / (high - low)
        return known[low] + share * (known[high] - known[low])
