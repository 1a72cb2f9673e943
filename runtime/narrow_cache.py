"""A cache in 8 bits while a text goes on in steps, in float32 while it is read in chunks.

A step of one position waits for the cache, and reads a quarter of the bytes faster; a chunk of many computes
longer than it reads, faster in float32. So `NarrowCache` holds its keys and values as whichever graph runs
next reads them (`graphs.narrow_caches` has the two), and changes them when a text goes over from one to the
other: once for a prompt, about as long as a step.

A number n of a channel stands for n times the channel's scale. Scales are fixed, measured on texts when the
engine is built, and lie beside its graphs (`SCALES_NAME`): so a position's numbers never change, whatever
comes after it, and rolling back, forks and packed rows work as they do in float32. Files of states are
float32 (`planes`, `room`), whose numbers become the same again.

What this does not know: which graph is which, where scales come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import buffers
from .cache import OrderedCache
from .errors import BundleError
from .files import open_plain
from .manifest import Manifest, StageSpec

__all__ = ["SCALES_NAME", "STEP_POSITIONS", "NarrowCache", "narrowed", "read_scales", "write_scales"]

Floats = npt.NDArray[np.float32]

SCALES_NAME = "cache_scales.bin"
"""Float32 values beside an engine's graphs: scales of each stage's keys and values."""

STEP_POSITIONS = 16
"""So many new positions or fewer are a step, which wants 8 bits: one byte, or guesses and the byte before."""

# More than these are a chunk, which wants float32. What lies between takes the cache as it is, so that a text
# whose calls are now shorter and now longer does not change it each time.
_CHUNK_POSITIONS = 32
_LEAST, _MOST = -128, 127


class NarrowCache(OrderedCache):
    """An `OrderedCache` whose `buffer` is int8 or float32."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        scales: Floats,
        *,
        window: int | None,
        rollback: int,
        limit: int,
        chunk: int,
    ) -> None:
        """scales [2 * layers, Hkv, head_dim]: of keys, then values, of each layer in turn."""
        super().__init__(
            layers, kv_heads, head_dim, window=window, rollback=rollback, limit=limit, chunk=chunk
        )
        assert scales.shape == (2 * layers, kv_heads, head_dim)
        self._scales = scales[:, :, np.newaxis]

    @property
    def narrow(self) -> bool:
        """Whether keys and values are in 8 bits now."""
        return bool(self.buffer.dtype == np.int8)

    def reserve(self, count: int) -> None:
        if self.narrow:
            if count > _CHUNK_POSITIONS:
                self._change(np.float32, 0, self.capacity)
        elif count <= STEP_POSITIONS:
            self._change(np.int8, 0, self.capacity)
        super().reserve(count)

    def planes(self) -> Iterator[Floats]:
        for plane, scale in zip(super().planes(), self._scales, strict=True):
            yield plane * scale if self.narrow else plane

    def pack(self) -> None:
        if self.narrow:
            super().pack()
        else:
            first = self.first
            self._change(np.int8, first - self._oldest, max(1, self.length - first))

    def room(self, first: int, count: int) -> Floats | None:
        if count > self._kept:
            return None
        self.length = self._oldest = first
        if self.narrow:
            self._change(np.float32, 0, self.capacity)
        return super().room(first, count)

    def _change(self, dtype: type[np.generic], shift: int, capacity: int) -> None:
        """Hold keys and values as `dtype`, those from slot `shift` on, in a buffer of its own."""
        old, held = self.buffer, self.length - self._oldest
        new = buffers.zeros((*old.shape[:3], capacity, old.shape[4]), dtype)
        for source, target, scale in zip(old[:, 0], new[:, 0], self._scales, strict=True):
            # Head by head: what is worked with stays in the processor's cache.
            for values, place, each in zip(source, target, scale, strict=True):
                known = values[shift:held]
                place[: held - shift] = known * each if dtype is np.float32 else _rounded(known, each)
        self.buffer, self.capacity = new, capacity
        self._oldest += shift
        self._renewed()
        self.lease.claim(0, held - shift)


def narrowed(values: Floats, scales: Floats) -> Floats:
    """What keys and values [2 * layers, 1, Hkv, S, head_dim] are once they were in 8 bits."""
    each = scales[:, np.newaxis, :, np.newaxis]
    found: Floats = _rounded(values, each) * each
    return found


@np.errstate(invalid="ignore")  # what is no number becomes any: the stage's outputs are none then, too
def _rounded(values: Floats, scale: Floats) -> npt.NDArray[np.int8]:
    numbers = np.rint(np.divide(values, scale))
    return np.clip(numbers, _LEAST, _MOST, out=numbers).astype(np.int8)


# A file of scales: float32 [2 * layers, Hkv, head_dim] of each stage, in the manifest's order, little endian.


def write_scales(path: Path, manifest: Manifest, scales: Mapping[str, Floats]) -> None:
    """Write the scales of every stage's keys and values. Raises OSError."""
    shapes = {stage: _shape(spec) for stage, spec in manifest.stages.items()}
    assert {stage: each.shape for stage, each in scales.items()} == shapes
    path.write_bytes(b"".join(scales[stage].astype("<f4").tobytes() for stage in shapes))


def read_scales(path: Path, manifest: Manifest) -> dict[str, Floats]:
    """What `write_scales` wrote, by stage. Raises BundleError for anything else."""
    shapes = {stage: _shape(spec) for stage, spec in manifest.stages.items()}
    needed = 4 * sum(math.prod(shape) for shape in shapes.values())
    with open_plain(path) as file:
        data = file.read(needed + 1)
    values: npt.NDArray[Any] = np.frombuffer(data[: len(data) // 4 * 4], "<f4").astype(np.float32)
    if len(data) != needed:
        raise BundleError(f"{path.name} has not the {needed} bytes of scales that its engine's caches need")
    if not (np.isfinite(values) & (values > 0)).all():
        raise BundleError(f"{path.name}: a scale is no number above 0")
    found, start = {}, 0
    for stage, shape in shapes.items():
        end = start + math.prod(shape)
        found[stage], start = values[start:end].reshape(shape), end
    return found


def _shape(spec: StageSpec) -> tuple[int, int, int]:
    return 2 * spec.layers, spec.kv_heads, spec.head_dim
