"""The key/value cache of one stage for one sequence, in the two layouts that graphs read.

- `RingCache`, for portable graphs: a slot's position is stored beside it, and the graph masks by positions,
  so neither order nor gaps matter. A window is a ring of fixed size, and rolling back marks slots empty. The
  graph hands out new keys and values, which are written into the ring.
- `OrderedCache`, for graphs with fused attention: positions lie in order, and the graph writes new keys and
  values behind them itself. A window slides through a buffer somewhat larger than it, and is moved to the
  buffer's start when it gets to the end. Rolling back moves a counter. `narrow_cache` has it in 8 bits.

A cache that is forked shares its buffers until one of the two writes where the other's slots are
(`sharing`): positions that are added behind what both have in common go in place for whoever comes first,
and a window that is full is copied by whoever goes on first.

What they do not know: layers' meaning, windows' masks (the graph has them), other stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import buffers
from .sharing import Lease

__all__ = ["OrderedCache", "RingCache", "StageCache"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_Cache = TypeVar("_Cache", bound="StageCache")
_Ring = TypeVar("_Ring", bound="RingCache")

_FIRST_CAPACITY = 64
# Positions that an ordered window slides before it is moved: moving them costs as much as reading them past.
_SLIDE = 64


class StageCache(ABC):
    """Keys and values [2 * layers, 1, Hkv, C, head_dim] of a stage, in C slots; float32 but where a layout
    says otherwise.

    C starts small, so that a short text neither allocates nor reads a full window. With a window it stops
    growing at what the next byte can see after taking back up to `rollback` positions (and what the layout
    needs beside); without, at `limit` positions.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        """Positions that a position sees, itself included; None = all."""
        self._oldest = 0  # every position from here to length is held
        self.length = 0
        """Positions read so far."""
        self.generation = 0
        """Changes when the buffers do, so that whoever bound them binds anew."""
        self.binding: Any = None
        """What a backend has bound to these buffers; None when they are new."""
        self.buffer: Any
        self.capacity: int
        """Slots now."""
        self.lease = Lease()
        """This cache's part in `buffer`."""
        self.expected = 0
        """Positions that the text is known to come to: when a buffer grows, it grows to them at once."""

    @property
    def bytes(self) -> int:
        """Memory of the buffers, in bytes, those of forks included that are shared."""
        return int(self.buffer.nbytes)

    def fork(self: _Cache) -> _Cache:
        """A cache of the same positions, which shares this one's buffers until one of them may not."""
        other = copy(self)
        other.binding = None
        other.lease = self.lease.fork(self._filled())
        return other

    @abstractmethod
    def _filled(self) -> int:
        """Slots from 0 on that hold positions, or held some."""

    def inputs(self) -> dict[str, Array]:
        """The graph inputs that are this cache's buffers: keys and values of each layer."""
        names = [f"past.{plane // 2}.{'value' if plane % 2 else 'key'}" for plane in range(len(self.buffer))]
        return dict(zip(names, self.buffer, strict=True))

    def outputs(self) -> dict[str, Array]:
        """The graph outputs that are written into this cache's buffers."""
        return {}

    @abstractmethod
    def reserve(self, count: int) -> None:
        """Make room for `count` more positions, this cache's own, before a call binds the buffers."""

    def prepare(self, inputs: Mapping[str, Array], count: int) -> None:  # noqa: B027 (a ring tells nothing)
        """Fill in what the graph is told of the cache before a run over `count` new positions."""

    @abstractmethod
    def advance(self, outputs: Mapping[str, Array], count: int) -> None:
        """Take in what a run over `count` new positions gave."""

    def can_roll_back(self, length: int) -> bool:
        """Whether everything that position `length` may see is still here."""
        first_visible = 0 if self.window is None else max(0, length - self.window + 1)
        return first_visible >= self._oldest

    @abstractmethod
    def roll_back(self, length: int) -> None:
        """Forget positions from `length` on; the caller has asked `can_roll_back`."""

    @property
    @abstractmethod
    def first(self) -> int:
        """The oldest position that rolling back as far as was asked for needs; `planes` begins with it."""

    @abstractmethod
    def planes(self) -> Iterator[Floats]:
        """Keys, then values, of each layer in turn: [Hkv, S, head_dim] of positions `first` .. length - 1."""

    def pack(self) -> None:  # noqa: B027 (most layouts have little to give up)
        """Give up memory that neither the window nor a roll-back needs, where that is much."""

    def room(self, first: int, count: int) -> Floats | None:
        """Hold positions first .. first + count - 1 and nothing else: where their keys and values
        [2 * layers, Hkv, count, head_dim] lie, for the caller to fill. None, and nothing changes, where they
        do not lie so in this machine's memory: then `place` has to be given them.
        """
        return None

    @abstractmethod
    def place(self, first: int, keys_values: Floats) -> None:
        """Hold keys_values [2 * layers, 1, Hkv, S, head_dim] as those of positions first.. and nothing else.

        S > 0; what a window of this size and its roll-back do not need is left out.
        """

    def _renewed(self) -> None:
        # The buffers are others now, and nobody else's.
        self.generation += 1
        self.binding = None
        self.lease = Lease()


class RingCache(StageCache):
    """Position p lives in slot p mod C; the position of each slot is stored beside it.

    With a window, C stops growing at window - 1 + rollback. Without, it grows by `growth`.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int | None,
        rollback: int,
        limit: int,
        first_capacity: int = _FIRST_CAPACITY,
        growth: float = 1.5,
    ) -> None:
        super().__init__(window)
        self._largest = limit if window is None else min(limit, window - 1 + rollback)
        self._growth = growth
        self._allocate(2 * layers, kv_heads, head_dim, max(1, min(first_capacity, self._largest)))

    def _allocate(self, planes: int, kv_heads: int, head_dim: int, capacity: int) -> None:
        # Where there is no memory for one of them, all stays as it was.
        buffer = self._new_buffer((planes, 1, kv_heads, capacity, head_dim))
        positions: npt.NDArray[np.int64] = np.full((1, capacity), -1, dtype=np.int64)
        self.buffer, self.positions, self.capacity = buffer, positions, capacity

    # What a ring in other memory does otherwise.

    def _new_buffer(self, shape: tuple[int, ...]) -> Any:
        return buffers.zeros(shape)

    def _copy_slots(self, target: Any, source: Any, slot: int, first: int, count: int) -> None:
        """Slots slot.. of `target` become slots first.. of `source`, `count` of them."""
        target[:, :, :, slot : slot + count] = source[:, :, :, first : first + count]

    def _upload(self, values: Floats) -> Any:
        """The values where the ring's own are."""
        return values

    @property
    def bytes(self) -> int:
        return int(self.buffer.nbytes + self.positions.nbytes)

    def fork(self: _Ring) -> _Ring:
        other = super().fork()
        other.positions = self.positions.copy()
        return other

    def _filled(self) -> int:
        return self.length if self._oldest == 0 else self.capacity

    def reserve(self, count: int) -> None:
        end = self.length + count
        needed = min(end, self._largest)
        if needed <= self.capacity:
            # Behind what is there already, or over the oldest slots.
            if self.lease.claim(*((self.length, end) if end <= self.capacity else (0, self.capacity))):
                return
            capacity = self.capacity
        else:
            # Growing happens only while no slot was reused: position p is in slot p of both rings.
            grown = max(needed, int(self._growth * self.capacity), self.expected)
            capacity = min(self._largest, grown)
        old, old_positions = self.buffer, self.positions
        filled = self._filled()
        self._allocate(old.shape[0], old.shape[2], old.shape[4], capacity)
        if filled:
            self._copy_slots(self.buffer, old, 0, 0, filled)
        self.positions[:, : old_positions.shape[1]] = old_positions
        self._renewed()
        self.lease.claim(0, min(end, capacity))

    def inputs(self) -> dict[str, Array]:
        """Keys and values of each layer, and the slots' positions, by which the graph masks."""
        return {"past_positions": self.positions, **super().inputs()}

    def advance(self, outputs: Mapping[str, Array], count: int) -> None:
        self.append(outputs["new_kv"])

    def append(self, new_kv: Any) -> None:
        """Write new_kv [2 * layers, 1, Hkv, S, head_dim] at the next S positions."""
        count, capacity = new_kv.shape[3], self.capacity
        if count == 1:
            slot = self.length % capacity
            self._copy_slots(self.buffer, new_kv, slot, 0, 1)
            self.positions[0, slot] = self.length
        else:
            kept = min(count, capacity)
            first = self.length + count - kept
            start = first % capacity
            head = min(kept, capacity - start)
            self._copy_slots(self.buffer, new_kv, start, count - kept, head)
            if head < kept:
                self._copy_slots(self.buffer, new_kv, 0, count - kept + head, kept - head)
            numbers = np.arange(first, first + kept)
            self.positions[0, numbers % capacity] = numbers
        self.length += count
        self._oldest = max(self._oldest, self.length - capacity)

    def roll_back(self, length: int) -> None:
        self.positions[self.positions >= length] = -1
        self.length = length

    @property
    def first(self) -> int:
        return self._oldest

    def planes(self) -> Iterator[Floats]:
        slots = np.arange(self._oldest, self.length) % self.capacity
        for plane in self.buffer:
            yield np.asarray(plane)[0][:, slots]

    def room(self, first: int, count: int) -> Floats | None:
        capacity = self._capacity_for(first + count)
        slot = first % capacity
        if not isinstance(self.buffer, np.ndarray) or slot + count > capacity:
            return None
        self._empty(first, capacity)
        self.positions[0, slot : slot + count] = np.arange(first, first + count)
        self.length += count
        there: Floats = self.buffer[:, 0, :, slot : slot + count]
        return there

    def place(self, first: int, keys_values: Floats) -> None:
        self._empty(first, self._capacity_for(first + keys_values.shape[3]))
        self.append(self._upload(keys_values))

    def _capacity_for(self, end: int) -> int:
        # A ring grows only while every position is in the slot of its number, so it must be large enough now.
        return max(self.capacity, min(end, self._largest))

    def _empty(self, first: int, capacity: int) -> None:
        """Hold nothing, in slots that are this cache's own; position `first` comes next."""
        if capacity > self.capacity or not self.lease.claim(0, capacity):
            planes, _, kv_heads, _, head_dim = self.buffer.shape
            self._allocate(planes, kv_heads, head_dim, capacity)
            self._renewed()
        self.positions[...] = -1
        self.length = self._oldest = first


class OrderedCache(StageCache):
    """Position p lies in slot p - base, and base is the oldest position that is held.

    With a window, only the last window - 1 + rollback positions stay when the window is moved, and C stops
    growing at those and what the window slides, or `chunk`, the most positions a call takes. Without, C grows
    by half.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int | None,
        rollback: int,
        limit: int,
        chunk: int,
    ) -> None:
        super().__init__(window)
        self._kept = limit if window is None else window - 1 + rollback
        self._largest = limit if window is None else min(limit, self._kept + max(_SLIDE, chunk))
        self.capacity = min(_FIRST_CAPACITY, self._largest)
        self.buffer = buffers.zeros((2 * layers, 1, kv_heads, self.capacity, head_dim))

    def reserve(self, count: int) -> None:
        self._make_room(count)

    def _make_room(self, count: int) -> None:
        held = self.length - self._oldest
        shift = held - self._kept
        if shift <= 0 or (shift < _SLIDE and held + count <= self._largest):
            shift = 0
        kept = held - shift
        needed, capacity = kept + count, self.capacity
        assert needed <= self._largest, "a call takes more positions than the cache was made for"
        if needed > capacity:
            grown = max(needed, capacity + capacity // 2, self.expected - self._oldest - shift)
            capacity = min(self._largest, grown)
        old = self.buffer
        if capacity > self.capacity or not self.lease.claim(0 if shift else held, needed):
            # A capacity without its buffer would let the graph write past the end of the old one.
            self.buffer = buffers.zeros((*old.shape[:3], capacity, old.shape[4]), old.dtype)
            self.capacity = capacity
            self.buffer[:, :, :, :kept] = old[:, :, :, shift:held]
            self._renewed()
            self.lease.claim(0, needed)
        elif shift:
            for plane in old:  # one by one: where source and target overlap numpy takes a copy
                plane[:, :, :kept] = plane[:, :, shift:held]
        self._oldest += shift

    def _filled(self) -> int:
        return self.length - self._oldest

    def outputs(self) -> dict[str, Array]:
        """The same buffers: the graph writes new keys and values into them."""
        return {name.replace("past.", "present.", 1): plane for name, plane in self.inputs().items()}

    def prepare(self, inputs: Mapping[str, Array], count: int) -> None:
        """Tell the graph how many slots will be full."""
        total = self.length - self._oldest + count
        inputs["past_length"][0] = total - 1
        inputs["total_length"][...] = total

    def advance(self, outputs: Mapping[str, Array], count: int) -> None:
        """The graph has written the new positions already."""
        self.length += count

    def roll_back(self, length: int) -> None:
        assert length >= self._oldest
        self.length = length

    @property
    def first(self) -> int:
        return max(self._oldest, self.length - self._kept)

    def planes(self) -> Iterator[Floats]:
        kept = slice(self.first - self._oldest, self.length - self._oldest)
        for plane in self.buffer:
            yield plane[0][:, kept]

    def pack(self) -> None:
        first, kept = self.first, max(1, self.length - self.first)
        if self.window is None or 4 * kept > 3 * self.capacity:
            return
        shift = first - self._oldest
        self.buffer = buffers.duplicate(self.buffer[:, :, :, shift : shift + kept])
        self._oldest, self.capacity = first, kept
        self._renewed()
        self.lease.claim(0, kept)

    def room(self, first: int, count: int) -> Floats | None:
        if count > self._kept:
            return None
        self.length = self._oldest = first
        self._make_room(count)  # nothing is held: slots from 0 on become this cache's own
        self.length += count
        there: Floats = self.buffer[:, 0, :, :count]
        return there

    def place(self, first: int, keys_values: Floats) -> None:
        surplus = max(0, keys_values.shape[3] - self._kept)
        room = self.room(first + surplus, keys_values.shape[3] - surplus)
        assert room is not None
        room[...] = keys_values[:, 0, :, surplus:]
