"""Memory for what is kept of texts and passes: large arrays apart from the allocator's heap.

Such arrays live long, are of all sizes, and come and go among the short-lived ones of every request. In the
heap they cut what is freed around them into pieces that fit nothing later: a server with 50 MB of states had
75 MB in use all along, and 25 MB of free pieces that became 75 in 2,000 requests; with the states apart and
24 MB of what passes read and write still there, 25 MB of pieces became 50. As pages of the system's they
leave nothing behind, whatever the platform's allocator is.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["duplicate", "zeros"]

Array = npt.NDArray[Any]

_LEAST = 1 << 15
"""Bytes of an array that gets pages of its own: of the last of them, half is unused on average."""
_TAIL = 64
"""Bytes behind an array that may be read: kernels for AVX2 load whole vectors at its end and mask what is too
much, which an emulated processor takes for an access behind what is mapped."""
_HUGE = 1 << 22
# Private, where there is a choice: pages that are shared would stay common to a process and its forks.
_FLAGS = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """A new C-contiguous array of zeros. Raises MemoryError."""
    kind = np.dtype(dtype)
    size = kind.itemsize * math.prod(shape)
    if size < _LEAST:
        return np.zeros(shape, kind)
    try:
        pages = mmap.mmap(-1, size + _TAIL, **_FLAGS)
    except OSError:  # no memory, or no more mappings for this process
        return np.zeros(shape, kind)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):  # as numpy does
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, kind, math.prod(shape)).reshape(shape)


def duplicate(values: Array) -> Array:
    """A copy, C-contiguous. Raises MemoryError."""
    copied = zeros(values.shape, values.dtype)
    copied[...] = values
    return copied
