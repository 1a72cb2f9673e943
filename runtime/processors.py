"""How many processor cores are ours to use: by affinity, by a container's quota, and by what others do now.

Read from the kernel's files under Linux; elsewhere, what Python knows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from .host import read_text

__all__ = ["free_cores", "usable_cores"]

_CPUS = Path("/sys/devices/system/cpu")
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_LOAD = Path("/proc/loadavg")
_LOOKS = 5
_LOOK_SECONDS = 0.002


def usable_cores() -> int:
    """Cores that this process may use, at least 1; two processors that share a core are one, which is what
    arithmetic gains from.
    """
    cores = {_siblings(cpu) for cpu in _affinity()}
    return max(1, min([len(cores), *map(int, _quotas())]))


def free_cores() -> int:
    """Those of them that are likely to be free, at least 1: less what others keep busy, now and lately."""
    everything = {_siblings(cpu) for cpu in range(os.cpu_count() or 1)}
    return max(1, min(usable_cores(), len(everything) - round(_others())))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """Names the core of a processor, equal for those that share it."""
    return read_text(_CPUS / f"cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)


def _quotas() -> Iterator[float]:
    """Processors that each control group we are in may keep busy."""
    for line in read_text(_OWN_GROUPS).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        own = Path("/", path.lstrip("/"))
        # A container may see its own group as the root, whatever its path says.
        for group in (own, *own.parents):
            folder = _GROUPS / controllers / str(group).lstrip("/")
            if controllers:
                quota = [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                quota = read_text(folder / "cpu.max").split()
            if len(quota) == 2 and all(part.isdecimal() and int(part) for part in quota):
                yield int(quota[0]) / int(quota[1])


def _others() -> float:
    """Processors that others keep busy: the last minute's mean, or what runs now where that is less."""
    lately = _load()[0]
    if lately < 0.5:
        return lately
    looks = []
    for _ in range(_LOOKS):
        looks.append(_load()[1])
        time.sleep(_LOOK_SECONDS)
    return min(lately, sorted(looks)[_LOOKS // 2])


def _load() -> tuple[float, int]:
    """The mean number of running threads over a minute, and how many run now beside ours; 0 if unknown."""
    try:
        minute, _, _, running, _ = read_text(_LOAD).split()
        return float(minute), max(0, int(running.partition("/")[0]) - 1)
    except ValueError:
        return 0.0, 0
