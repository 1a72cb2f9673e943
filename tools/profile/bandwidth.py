"""How fast this machine reads memory: what bounds decoding, since a byte reads every weight once.

Threads read one large buffer, a part each, with reductions that numpy vectorizes and during which it
holds no lock. The buffer is several times as large as the caches, so that what is measured is memory. On a
GPU a buffer is copied on the device, and both the bytes read and the bytes written count.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.host import available_memory

__all__ = [
    "Bandwidth",
    "available_cores",
    "last_level_cache",
    "measure_bandwidth",
    "measure_device_bandwidth",
]

_CPUS = Path("/sys/devices/system/cpu")
# A guest may run on a larger cache than it is told of: 256 MB have been read at twice the memory's speed.
_LEAST, _MOST = 1 << 30, 4 << 30
# Long enough that a machine busy with something else has a quiet moment, too.
_SECONDS, _LEAST_PASSES = 0.5, 3
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# Both halves are ordinary float32 numbers from 1 on: no sum meets a subnormal or a nan.
_ORDINARY = 0x3F8000003F800000

Reduction = Callable[[NDArray[Any]], object]
# Which one reaches the memory's speed depends on the processor's vectors; the fastest counts.
_REDUCTIONS: tuple[tuple[type[np.generic], Reduction], ...] = (
    (np.float32, np.add.reduce),
    (np.int64, np.bitwise_or.reduce),
)


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth, and how it was measured."""

    bytes_per_second: float
    """The best pass."""
    threads: int
    """Threads that read at the same time; 0 on a GPU."""
    buffer_bytes: int
    """What they read in a pass, together."""
    cache_bytes: int | None
    """The processor's last level of cache; None where unknown."""
    passes: int
    """How often they did."""
    device: str = "CPU"
    """"CPU", or the GPU's name."""

    @property
    def method(self) -> str:
        """How it was measured, in words."""
        if self.device != "CPU":
            return (
                f"best of {self.passes} copies of {self.buffer_bytes / 1e6:.0f} MB on {self.device}, "
                "bytes read and written"
            )
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        caches = f", caches hold {self.cache_bytes / 1e6:.0f} MB" if self.cache_bytes else ""
        return (
            f"best of {self.passes} passes of {threads} over "
            f"{self.buffer_bytes / 1e6:.0f} MB with numpy's sum and bitwise or{caches}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "method": self.method}


def available_cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache(cpus: Path = _CPUS) -> int | None:
    """Bytes of all caches of the highest level together; None where the system does not tell."""
    caches: dict[tuple[int, str], int] = {}
    for index in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text().strip()
            size = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if size is not None:
            caches[level, shared] = int(size[1]) * _UNITS.get(size[2], 1)
    highest = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == highest) or None


def measure_bandwidth(threads: int | None = None, buffer_bytes: int | None = None) -> Bandwidth:
    """Read bandwidth with so many threads; None = every core there is.

    buffer_bytes None: four times the last level of cache, 1 to 4 GB, and at most a quarter of the
    memory that is free. A shorter buffer than the caches measures those.
    """
    threads = threads or available_cores()
    cache = last_level_cache()
    wanted = min(max(_LEAST, 4 * (cache or 0)), _MOST) if buffer_bytes is None else buffer_bytes
    free = available_memory()
    if buffer_bytes is None and free is not None:
        wanted = min(wanted, free // 4)
    # Every page must be one of its own: unwritten pages are not, and a host may join equal ones.
    buffer = np.arange(max(wanted // 8, threads), dtype=np.int64)
    buffer += _ORDINARY
    seconds: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        for kind, reduction in _REDUCTIONS:
            parts = np.array_split(buffer.view(kind), threads)
            own: list[float] = []
            while sum(own) < _SECONDS or len(own) < _LEAST_PASSES:
                started = time.perf_counter()
                list(pool.map(reduction, parts))
                own.append(time.perf_counter() - started)
            seconds += own
    return Bandwidth(buffer.nbytes / min(seconds), threads, buffer.nbytes, cache, len(seconds))


def measure_device_bandwidth(driver: Any = None, buffer_bytes: int = 256 << 20) -> Bandwidth:
    """Memory bandwidth of the GPU; `driver` None opens the first one. Raises BackendError without one."""
    if driver is None:
        from ...runtime.backends.cuda import CudaDriver

        driver = CudaDriver()
    source = driver.allocate(2 * buffer_bytes)
    try:
        driver.clear(source, 2 * buffer_bytes)
        start, end = driver.new_event(), driver.new_event()
        seconds: list[float] = []
        while sum(seconds) < _SECONDS or len(seconds) < _LEAST_PASSES:
            driver.record(start)
            driver.copy(source + buffer_bytes, source, buffer_bytes)
            driver.record(end)
            driver.synchronize()
            seconds.append(driver.seconds(start, end))
    finally:
        driver.free(source)
    return Bandwidth(2 * buffer_bytes / min(seconds), 0, buffer_bytes, None, len(seconds), driver.name)
