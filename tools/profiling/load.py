"""How busy the machine was with other things while something was measured; None everywhere but on Linux."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

__all__ = ["OtherLoad", "busy_ticks"]

_STAT = Path("/proc/stat")
# Columns of the "cpu" line that are work: user, nice, system, irq, softirq, steal. Idle and iowait are not,
# and guests' time is in user's already.
_WORK = (0, 1, 2, 5, 6, 7)
# A tick has 10 ms: less time tells nothing.
_LEAST_SECONDS = 0.3


class OtherLoad:
    """`cores` after the block: processor seconds that others used in each second of it; None if unknown,
    or if the block was too short to tell.
    """

    def __init__(self) -> None:
        self.cores: float | None = None

    def __enter__(self) -> OtherLoad:
        self._before = (busy_ticks(_read()), time.process_time(), time.perf_counter())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ticks, own, started = self._before
        now = busy_ticks(_read())
        seconds = time.perf_counter() - started
        if ticks is None or now is None or seconds < _LEAST_SECONDS:
            return
        all_work = (now - ticks) / os.sysconf("SC_CLK_TCK")
        self.cores = max(0.0, (all_work - (time.process_time() - own)) / seconds)


def busy_ticks(stat: str) -> int | None:
    """Clock ticks that all processors have worked since the system began, from /proc/stat's text."""
    for line in stat.splitlines():
        name, *values = line.split()[:11] or [""]
        if name == "cpu" and len(values) > max(_WORK):
            return sum(int(values[column]) for column in _WORK)
    return None


def _read() -> str:
    try:
        return _STAT.read_text()
    except OSError:
        return ""
