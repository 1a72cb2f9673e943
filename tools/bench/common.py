"""What every measurement needs: the machine's name, medians and spread, and the JSON line at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Spread", "machine", "print_json"]


@dataclass(frozen=True)
class Spread:
    """Several readings of one quantity."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, smallest and largest of at least one reading."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"

    def to_dict(self) -> dict[str, float]:
        """For the JSON line."""
        return {"median": self.median, "low": self.low, "high": self.high}


def machine() -> str:
    """Processor and core count, as the operating system names them."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"


def print_json(document: dict[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps({"machine": machine(), **document}))
