"""The key/value cache of one stage for one sequence: a ring of positions that never moves its contents.

A slot's position is stored beside it, and the graph masks by positions, so neither order nor gaps
matter: a window is a ring of fixed size, rolling back marks slots empty, and no step copies the
cache. What it does not know: layers' meaning, windows' masks (the graph has them), other stages.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["KvCache"]

_FIRST_CAPACITY = 64


class KvCache:
    """Keys and values [2 * layers, 1, Hkv, C, head_dim] float32 and the position of each slot.

    Position p lives in slot p mod C. With a window, C stops growing at window - 1 + rollback: all
    that the next byte can see after taking back up to `rollback` positions. Without, C grows by half.
    Capacity starts small, so that a short text neither allocates nor reads a full window.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, *, window: int | None, rollback: int, limit: int
    ) -> None:
        self._window = window
        wanted = limit if window is None else window - 1 + rollback
        self._largest = max(1, min(limit, wanted))
        self.length = 0
        self._oldest = 0  # every position from here to length is in the ring
        self.generation = 0  # changes when the buffers do, so that whoever bound them binds anew
        self._allocate(2 * layers, kv_heads, head_dim, min(_FIRST_CAPACITY, self._largest))

    def _allocate(self, planes: int, kv_heads: int, head_dim: int, capacity: int) -> None:
        self.buffer: npt.NDArray[np.float32] = np.zeros(
            (planes, 1, kv_heads, capacity, head_dim), dtype=np.float32
        )
        self.positions: npt.NDArray[np.int64] = np.full((1, capacity), -1, dtype=np.int64)

    @property
    def capacity(self) -> int:
        """Slots in the ring now."""
        return int(self.positions.shape[1])

    @property
    def bytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return self.buffer.nbytes + self.positions.nbytes

    def reserve(self, count: int) -> None:
        """Make room for `count` more positions before a call binds the buffers."""
        needed = min(self.length + count, self._largest)
        if needed <= self.capacity:
            return
        old, old_positions = self.buffer, self.positions
        grown = min(self._largest, max(needed, self.capacity + self.capacity // 2))
        # Growing happens only while no slot was reused: position p is in slot p of both rings.
        self._allocate(old.shape[0], old.shape[2], old.shape[4], grown)
        self.buffer[:, :, :, : old.shape[3]] = old
        self.positions[:, : old_positions.shape[1]] = old_positions
        self.generation += 1

    def append(self, new_kv: npt.NDArray[np.float32]) -> None:
        """Write new_kv [2 * layers, 1, Hkv, S, head_dim] at the next S positions."""
        count, capacity = new_kv.shape[3], self.capacity
        if count == 1:
            slot = self.length % capacity
            self.buffer[:, :, :, slot] = new_kv[:, :, :, 0]
            self.positions[0, slot] = self.length
        else:
            kept = min(count, capacity)
            first = self.length + count - kept
            start = first % capacity
            head = min(kept, capacity - start)
            tail = new_kv[:, :, :, count - kept :]
            self.buffer[:, :, :, start : start + head] = tail[:, :, :, :head]
            self.buffer[:, :, :, : kept - head] = tail[:, :, :, head:]
            numbers = np.arange(first, first + kept)
            self.positions[0, numbers % capacity] = numbers
        self.length += count
        self._oldest = max(self._oldest, self.length - capacity)

    def can_roll_back(self, length: int) -> bool:
        """Whether everything that position `length` may see is still here."""
        first_visible = 0 if self._window is None else max(0, length - self._window + 1)
        return first_visible >= self._oldest

    def roll_back(self, length: int) -> None:
        """Forget positions from `length` on; the caller has asked `can_roll_back`."""
        self.positions[self.positions >= length] = -1
        self.length = length
        self._oldest = min(self._oldest, length)
