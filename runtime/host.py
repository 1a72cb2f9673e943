"""The machine that this runs on: its processor, its memory, what others do on it.

Read from the kernel's files under Linux; what another system does not tell is None or empty. Figures mean
nothing without it, and prepared weights depend on the processor.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .fields import plain_text

__all__ = [
    "MOST_NAME",
    "OtherLoad",
    "PrivatePeak",
    "available_memory",
    "busy_ticks",
    "describe_machine",
    "describe_processor",
    "mapped_resident",
    "peak_resident",
    "processor_name",
    "read_text",
    "release_memory",
    "reset_peak_resident",
    "size_in",
]

MOST_NAME = 200
"""Characters of a processor's name."""

_CPUINFO = Path("/proc/cpuinfo")
# Boards such as Jetsons and Raspberry Pis name themselves here; their processors have no model name.
_BOARD = Path("/proc/device-tree/model")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_SMAPS = Path("/proc/self/smaps")
_CLEAR = Path("/proc/self/clear_refs")
_STAT = Path("/proc/stat")
_CGROUP = Path("/sys/fs/cgroup")

# Kernels are chosen by vector and matrix instructions; other flags come and go with the system's version.
_FEATURE = re.compile(r"s?sse|avx|fma|f16c|amx|asimd|fphp|neon|i8mm|bf16|sve|sme|dotprod|rvv")
_MODEL = (
    "vendor_id",
    "cpu family",
    "model",
    "CPU implementer",
    "CPU variant",
    "CPU part",
    "mvendorid",
    "marchid",
)
_WATCH_SECONDS = 0.01
# Columns of /proc/stat's "cpu" line that are work: user, nice, system, irq, softirq, steal. Idle and iowait
# are not, and guests' time is in user's already.
_WORK = (0, 1, 2, 5, 6, 7)
# A tick has 10 ms: less time tells nothing.
_LEAST_SECONDS = 0.3


def read_text(path: Path) -> str:
    """What a file of the kernel's says; empty where there is none."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def size_in(path: Path, name: str) -> int | None:
    """A line "name 123 kB" of a file of the kernel's, in bytes."""
    values = [line.split()[1] for line in read_text(path).splitlines() if line.startswith(name)]
    return int(values[0]) * 1024 if values else None


# 1. The processor.


def describe_processor() -> dict[str, str]:
    """system, machine, processor and features (sorted, one space between); equal on equal machines."""
    fields: dict[str, set[str]] = {}
    for line in read_text(_CPUINFO).splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), set()).add(value.strip())
    # Cores may differ: each kind counts.
    model = " ".join(",".join(sorted(fields[name])) for name in _MODEL if name in fields)
    texts = [text for name in ("flags", "Features", "isa") for text in fields.get(name, ())]
    flags = {flag for flag in " ".join(texts).split() if _FEATURE.match(flag)}
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": model or platform.processor(),
        "features": " ".join(sorted(flags)),
    }


def describe_machine(threads: int | None = None) -> dict[str, Any]:
    """processor, system, cpus, threads (None = not told), onnxruntime's version."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, seldom asked

    try:
        onnxruntime = version("onnxruntime")
    except PackageNotFoundError:
        onnxruntime = "unknown"
    return {
        "processor": processor_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": threads,
        "onnxruntime": onnxruntime,
    }


def processor_name() -> str:
    """The processor's name, or the board's, as the operating system has it; printable, of `MOST_NAME`
    characters at most."""
    names = [
        line.partition(":")[2].strip()
        for line in read_text(_CPUINFO).splitlines()
        if line.lower().startswith("model name")
    ]
    board = read_text(_BOARD).strip("\0 \n")
    name = next(filter(None, names), "") or board or platform.processor() or platform.machine()
    return plain_text(name, MOST_NAME)


# 2. Memory, in bytes.


def available_memory() -> int | None:
    """Memory to be had now without swapping, within a container's limit; None where unknown."""
    known = [size_in(_MEMINFO, "MemAvailable:"), _container_memory()]
    return min((value for value in known if value is not None), default=None)


def _container_memory() -> int | None:
    statistics = dict(
        line.split()[:2] for line in read_text(_CGROUP / "memory.stat").splitlines() if " " in line
    )
    try:
        most = int(read_text(_CGROUP / "memory.max"))  # "max" without a limit
        used = int(read_text(_CGROUP / "memory.current"))
    except ValueError:
        return None
    return max(0, most - used + int(statistics.get("inactive_file", 0)))


def peak_resident() -> int | None:
    """Most resident memory this process has had, mapped files included; None where unknown."""
    # Not from getrusage where it can be helped: Linux carries over the peak of the process that forked us.
    peak = size_in(_STATUS, "VmHWM:")
    if peak is not None:
        return peak
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak_resident() -> bool:
    """Let `peak_resident` count from now on; False where the kernel does not do that."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def mapped_resident(path: Path) -> int | None:
    """How much of a mapped file is in memory and counted as ours; None where unknown."""
    try:
        lines = _SMAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    wanted, total, inside = str(path.resolve()), 0, False
    for line in lines:
        name, _, value = line.partition(" ")
        if not name.endswith(":"):  # an address range, permissions, ... and the file
            inside = line.endswith(" " + wanted)
        elif inside and name == "Rss:":
            total += int(value.split()[0]) * 1024
    return total


def release_memory() -> None:
    """Give back what the allocator keeps of freed memory, where it is glibc's.

    After buffers of many sizes it keeps ever more of them in pieces: half an hour of mixed texts made 100 MB.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PrivatePeak:
    """Watches memory that belongs to no file while its block runs; `bytes` is the most there was."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PrivatePeak:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(_WATCH_SECONDS):
            self._look()

    def _look(self) -> None:
        now = size_in(_STATUS, "RssAnon:")
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


# 3. What others do.


class OtherLoad:
    """`cores` after the block: processor seconds that others used in each second of it; None if unknown,
    or if the block was too short to tell.
    """

    def __init__(self) -> None:
        self.cores: float | None = None

    def __enter__(self) -> OtherLoad:
        self._before = (busy_ticks(read_text(_STAT)), time.process_time(), time.perf_counter())
        return self

    def __exit__(self, *_: object) -> None:
        ticks, own, started = self._before
        now = busy_ticks(read_text(_STAT))
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
