"""How fast memory lets this machine decode at best: what a byte of text reads, and how fast that can be read.

Decoding is bound by memory: each run of a stage reads all of its weights and the cached keys and values that
its window still sees. What a byte costs is that, times how often the stage runs for a byte: once, the latent
stage once a patch, drafted bytes less often. Sizes are those of the bundle's own files.

Bandwidth is measured by threads that read one large buffer, a part each, with reductions that numpy
vectorizes and during which it holds no lock. The buffer is several times as large as the caches, so that what
is measured is memory. On a GPU a buffer is copied on the device: the bytes read and those written count.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...graphs.config import ConfigError, parse_config
from ...runtime.host import available_memory
from ...runtime.manifest import Manifest
from ...runtime.processors import usable_cores

_FLOAT = 4
"""Bytes: patch values and the patcher's embedding are float32 at every precision."""

_CACHED = {"float32": 4, "int8": 1}
"""Bytes of a key or value, by an engine's caches."""


# 1. What a byte reads.


@dataclass(frozen=True)
class StageCost:
    """What one run of a stage reads. Bytes."""

    stage: str
    precision: str
    """Its weights' precision."""
    weights: int
    """Its weights' file, without `left_out`."""
    left_out: int
    """Part of that file of which a run reads next to nothing: the patcher's byte embedding."""
    cache: int
    """Keys and values of the positions that its window sees, and the decoder's of one patch."""
    calls_per_byte: float
    """Runs for one byte of text, as measured."""
    per_byte: float
    """Bytes read for one byte of text."""


@dataclass(frozen=True)
class Cost:
    """What a byte of text reads at one place in a text. Bytes, unless it says otherwise."""

    positions: int
    """Where: bytes read before, BOS included."""
    bytes_per_patch: float | None
    """Measured; None when no patch ended."""
    stages: dict[str, StageCost]
    """Stages that ran, by name."""
    table_rows: int
    """Rows of the embedding tables that a byte reads: its own, and one of each hash table."""
    row_bytes: int
    weights_per_byte: float
    """Weights read for one byte of text."""
    cache_per_byte: float
    """Cached keys and values read for one byte of text."""
    tables_per_byte: int
    """Rows of the tables read for one byte of text."""
    read_per_byte: float
    """All that is read for one byte of text."""
    state_bytes: int
    """Memory of caches and recent states, measured at the end of a generation."""
    bandwidth_bytes_per_second: float
    ceiling_bytes_per_second: float
    """Bytes of text a second, if memory were never idle and nothing else took time."""

    @property
    def weights(self) -> int:
        return sum(stage.weights for stage in self.stages.values())


def cost_of_a_byte(
    manifest: Manifest,
    *,
    positions: int,
    bytes_per_patch: float | None,
    calls_per_byte: Mapping[str, float],
    state_bytes: int,
    bandwidth: float,
    caches: str = "float32",
) -> Cost:
    """The cost of a bundle. calls_per_byte: measured runs of each stage; those not in it never run. caches:
    what its engine keeps keys and values as."""
    patches = positions / bytes_per_patch if bytes_per_patch else 0.0
    stages = {}
    for name, spec in manifest.stages.items():
        if name not in calls_per_byte:
            continue
        left_out = embedding_bytes(manifest) if name == "patcher" else 0
        weights = manifest.files[spec.data].bytes - left_out
        context = patches if name == "latent" else positions
        seen = context if spec.window is None else min(context, spec.window)
        cache = round(_CACHED[caches] * 2 * spec.layers * spec.kv_heads * spec.head_dim * seen)
        if name == "decoder":  # a byte also reads the keys and values of its patch, in every layer
            cache += _FLOAT * (spec.patch_values or 0)
        calls = calls_per_byte[name]
        stages[name] = StageCost(
            name,
            "+".join(manifest.precisions_of(name)),
            weights,
            left_out,
            cache,
            calls,
            calls * (weights + cache),
        )
    table_rows, row_bytes = manifest.embedding.hash.tables + 1, manifest.embedding.row_bytes
    read_per_byte = sum(stage.per_byte for stage in stages.values()) + table_rows * row_bytes
    return Cost(
        positions=positions,
        bytes_per_patch=bytes_per_patch,
        stages=stages,
        table_rows=table_rows,
        row_bytes=row_bytes,
        weights_per_byte=sum(stage.calls_per_byte * stage.weights for stage in stages.values()),
        cache_per_byte=sum(stage.calls_per_byte * stage.cache for stage in stages.values()),
        tables_per_byte=table_rows * row_bytes,
        read_per_byte=read_per_byte,
        state_bytes=state_bytes,
        bandwidth_bytes_per_second=bandwidth,
        ceiling_bytes_per_second=bandwidth / read_per_byte,
    )


def embedding_bytes(manifest: Manifest) -> int:
    """Size of the byte embedding inside the patcher's weights: float32 at every precision, a byte reads one
    row of it. 0 when there is no patcher, or the source's config no longer says how wide it is.
    """
    if "patcher" not in manifest.stages:
        return 0
    try:
        patcher = parse_config(manifest.source.config).patcher
    except ConfigError:
        return 0
    size = _FLOAT * manifest.model.vocab_size * patcher.width if patcher else 0
    return size if size < manifest.files[manifest.stages["patcher"].data].bytes else 0


# 2. How fast memory is.

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
    device: str
    """"CPU", or the GPU's name."""
    method: str
    """How it was measured, in words."""


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
    threads = threads or usable_cores()
    cache, free = last_level_cache(), available_memory()
    wanted = min(max(_LEAST, 4 * (cache or 0)), _MOST) if buffer_bytes is None else buffer_bytes
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
    method = (
        f"best of {len(seconds)} passes of {threads} thread{'s' * (threads != 1)} over "
        f"{buffer.nbytes / 1e6:.0f} MB with numpy's sum and bitwise or"
    )
    if cache:
        method += f", caches hold {cache / 1e6:.0f} MB"
    speed = buffer.nbytes / min(seconds)
    return Bandwidth(speed, threads, buffer.nbytes, cache, len(seconds), "CPU", method)


def measure_device_bandwidth(driver: Any = None, buffer_bytes: int = 256 << 20) -> Bandwidth:
    """Memory bandwidth of the GPU; `driver` None opens the first one. Raises BackendError without one."""
    if driver is None:
        from ...runtime.backends.cuda import CudaDriver  # needs a package that only GPUs need

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
    method = (
        f"best of {len(seconds)} copies of {buffer_bytes / 1e6:.0f} MB on {driver.name}, "
        "bytes read and written"
    )
    speed = 2 * buffer_bytes / min(seconds)
    return Bandwidth(speed, 0, buffer_bytes, None, len(seconds), driver.name, method)
