"""Where values that pass from stage to stage live: numpy arrays on the CPU, device memory on a GPU.

The runtime moves byte states and patch values between stages without looking at them, so it only asks for
what both kinds of array offer (`Tensor`). What people and sampling see (logits, entropies) is always numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["HOST", "HostMemory", "Memory", "Tensor", "ring_runs"]


class Tensor(Protocol):
    """float32 values; slices of leading axes are views, assignment copies, `np.array(x)` fetches."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes."""

    @property
    def nbytes(self) -> int:
        """Bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...

    def __setitem__(self, key: Any, value: Any, /) -> None: ...

    def copy(self) -> Any:
        """Values of its own."""


class Memory(Protocol):
    """Where a backend keeps tensors."""

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """New float32 values, all 0."""


class HostMemory:
    """Numpy arrays."""

    def zeros(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """See Memory.zeros."""
        return np.zeros(shape, np.float32)


HOST = HostMemory()
"""The one host memory."""


def ring_runs(first: int, count: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Where `count` <= size consecutive numbers from `first` lie in a ring: (slots, which of them)."""
    done = 0
    while done < count:
        slot = (first + done) % size
        run = min(count - done, size - slot)
        yield slice(slot, slot + run), slice(done, done + run)
        done += run
