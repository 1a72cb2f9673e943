"""What a text leaves behind when it is read: complete, exact, and a thing of its own.

A `TextState` is everything that the next byte depends on: the ids and what the patcher thought of them, patch
boundaries, the caches of the stages, the values of recent patches, the byte states of the open patch, and the
last logits; and of each as much more as rolling back needs. A fork of it is another text from there on. The
large parts, caches and patch values, are shared until one of the two goes on (`sharing`); the small ones, a
hundredth of a state at the released sizes, are copied at once.
What this does not know: how a byte is read, files.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from copy import copy

import numpy as np
import numpy.typing as npt

from . import buffers
from .backends.base import CacheLimits, Memory, StageBackend, Tensor, ring_runs
from .cache import StageCache
from .manifest import Manifest
from .names import STAGES
from .patching import PatchBoundaries
from .sharing import Lease
from .stages import next_power_of_two

__all__ = ["ByteStates", "PatchValues", "RecentLogits", "TextState", "memory_of", "new_state"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_FIRST_IDS = 256
# Patches of a byte: of most texts, and from how many ids on a text's own are known.
_FIRST_RATE = 0.25
_RATE_KNOWN = 128


class ByteStates:
    """Encoder states of recent positions, from `base` on, contiguous, so that a patch is a slice."""

    def __init__(self, memory: Memory, width: int) -> None:
        self._memory = memory
        self.buffer = memory.zeros((64, width))
        self.base = 0
        """Position of the first state that is kept."""
        self._offset = 0  # its row

    def append(self, first: int, states: Tensor) -> None:
        """Keep states [S, D] of positions first..; whatever was kept from `first` on is forgotten."""
        live = first - self.base
        needed = live + len(states)
        if self._offset + needed > len(self.buffer):
            kept = self.buffer[self._offset : self._offset + live]
            if 2 * needed > len(self.buffer):
                self.buffer = self._memory.zeros((2 * next_power_of_two(needed), self.buffer.shape[1]))
                self.buffer[:live] = kept
            else:
                self.buffer[:live] = kept.copy()
            self._offset = 0
        row = self._offset + live
        self.buffer[row : row + len(states)] = states

    def get(self, start: int, stop: int) -> Tensor:
        """States [stop - start, D]; a view."""
        assert self.base <= start <= stop
        row = self._offset + start - self.base
        view: Tensor = self.buffer[row : row + stop - start]
        return view

    def place(self, first: int, states: Tensor) -> None:
        """Keep states [S, D] of positions first.. and nothing else."""
        self.base, self._offset = first, 0
        self.append(first, states)

    def drop_before(self, position: int) -> None:
        if position > self.base:
            self._offset += position - self.base
            self.base = position

    def fork(self, length: int) -> ByteStates:
        """The states up to position `length` in memory of their own."""
        other = copy(self)
        live = length - self.base
        other.buffer = self._memory.zeros((max(64, next_power_of_two(live + 1)), self.buffer.shape[1]))
        other.buffer[:live] = self.get(self.base, length)
        other._offset = 0
        return other


class PatchValues:
    """The decoder's keys and values of recent patches: those of patch p are in slot p mod `slots`."""

    def __init__(self, memory: Memory, slots: int, width: int) -> None:
        self._memory, self.slots = memory, slots
        self.tensor: Tensor = memory.zeros((slots, width))
        """[slots, V] in the backend's memory: what the decoder reads."""
        self.oldest = 0
        """The first patch that is kept."""
        self.lease = Lease()
        self._packed = False  # patch p is in row p - oldest

    def put(self, first: int, values: Tensor) -> bool:
        """Keep values [n, V] of patches first..; whether `tensor` is another now."""
        count, slots = len(values), self.slots
        end = first + count
        mine = self.lease.claim(*((first, end) if end <= slots else (0, slots)))
        if not mine:
            shared, kept = self.tensor, min(first, slots)
            self.tensor = self._memory.zeros((slots, shared.shape[1]))
            for there, _ in ring_runs(first - kept, kept, slots):
                self.tensor[there] = shared[there]
            self.lease = Lease()
            self.lease.claim(0, min(end, slots))
        for there, which in ring_runs(first, count, slots):
            self.tensor[there] = values[which]
        self.oldest = max(self.oldest, end - slots)
        return not mine

    def place(self, first: int, values: Tensor) -> None:
        """Keep the last of values [n, V] of patches first.., and nothing else."""
        surplus = max(0, len(values) - self.slots)
        self.oldest = first + surplus
        self.put(first + surplus, values[surplus:])

    def get(self, patches: range) -> Floats:
        """Values [n, V] of patches that are kept; a copy."""
        values = np.empty((len(patches), self.tensor.shape[1]), np.float32)
        if self._packed:
            values[:] = self.tensor[patches.start - self.oldest : patches.stop - self.oldest]
            return values
        for slots, which in ring_runs(patches.start, len(patches), self.slots):
            values[which] = self.tensor[slots]
        return values

    def fork(self, closed: int) -> PatchValues:
        """Those of patches 0 .. closed - 1, in the same memory until one of the two may not."""
        other = copy(self)
        if self._packed:
            other.tensor = self._memory.zeros((self.slots, self.tensor.shape[1]))
            for there, which in ring_runs(self.oldest, closed - self.oldest, self.slots):
                other.tensor[there] = self.tensor[which]
            other.lease, other._packed = Lease(), False
            other.lease.claim(0, min(closed, self.slots))
            return other
        other.lease = self.lease.fork(closed if self.oldest == 0 else self.slots)
        return other

    def pack(self, first: int, closed: int) -> None:
        """Keep those of patches first .. closed - 1 alone, in no more memory than they take."""
        first = max(first, self.oldest)
        count, whole = closed - first, self.tensor
        if self._packed or 2 * count > self.slots:
            return
        self.tensor = self._memory.zeros((max(1, count), whole.shape[1]))
        for there, which in ring_runs(first, count, self.slots):
            self.tensor[which] = whole[there]
        self.oldest, self.lease, self._packed = first, Lease(), True


class RecentLogits:
    """Next-byte logits after recent positions: those after position i are in row i mod `len(rows)`."""

    def __init__(self, kept: int, width: int) -> None:
        self.rows = buffers.zeros((kept, width))
        self.oldest = 0
        """The first position whose logits are kept."""

    def put(self, first: int, logits: Floats) -> None:
        """Keep the last of logits [S, 260] after positions first..."""
        end = first + len(logits)
        kept = min(len(logits), len(self.rows))
        self.rows[np.arange(end - kept, end) % len(self.rows)] = logits[len(logits) - kept :]
        self.oldest = max(self.oldest, end - len(self.rows))

    def after(self, position: int) -> Floats:
        """Logits [260]; a view."""
        row: Floats = self.rows[position % len(self.rows)]
        return row

    def fork(self) -> RecentLogits:
        other = copy(self)
        other.rows = buffers.duplicate(self.rows)
        return other


class TextState:
    """All that is kept of one text."""

    def __init__(
        self,
        boundaries: PatchBoundaries,
        caches: dict[str, StageCache],
        patch_values: PatchValues,
        byte_states: ByteStates,
        logits: RecentLogits,
    ) -> None:
        """Of a text of which nothing was read, from parts that are empty. caches: by stage."""
        self.length = 0
        """Ids read, BOS included."""
        self.ids: Ids = np.zeros(_FIRST_IDS, np.int64)
        """int64 [length or more]: the ids, then room."""
        self.entropies: Floats = np.zeros(_FIRST_IDS, np.float32)
        """float32, nats, as many: what the patcher said after each, where there is one."""
        self.boundaries, self.caches = boundaries, caches
        self.patch_values, self.byte_states, self.logits = patch_values, byte_states, logits
        self.packed = False
        """Whether it is kept only: see `pack`."""

    def store_ids(self, first: int, ids: Ids) -> None:
        """Put int64 ids [S] at positions first.., with room for their entropies."""
        needed = first + len(ids)
        if needed > len(self.ids):
            self.ids = np.resize(self.ids, max(needed, 2 * len(self.ids)))
            self.entropies = np.resize(self.entropies, len(self.ids))
        self.ids[first:needed] = ids

    def expect(self, length: int) -> None:
        """Let the caches grow to what so many ids need at once, when they grow next.

        How many patches those will be is foretold by the patches so far.
        """
        closed = self.caches["latent"].length
        rate = closed / self.length if self.length >= _RATE_KNOWN else _FIRST_RATE
        # A text is not the same all over: with an eighth more, growing once more is seldom needed.
        patches = min(length, closed + int(max(0, length - self.length) * rate * 9 / 8) + 1)
        for stage, cache in self.caches.items():
            cache.expected = patches if stage == "latent" else length

    def can_roll_back(self, length: int) -> bool:
        """Whether everything that a text of so many ids needs is still here."""
        starts = self.boundaries.starts
        opened = bisect_right(starts, length) - 1  # the patch that position `length` would be in
        return (
            all(
                cache.can_roll_back(opened if stage == "latent" else length)
                for stage, cache in self.caches.items()
            )
            and opened - 1 >= self.patch_values.oldest
            and starts[opened] >= self.byte_states.base
            and length - 1 >= self.logits.oldest
        )

    def roll_back(self, length: int) -> None:
        """Forget everything after the first `length` ids; the caller has asked `can_roll_back`."""
        self.boundaries.rollback(length)
        closed = len(self.boundaries.starts) - 1
        for stage, cache in self.caches.items():
            cache.roll_back(closed if stage == "latent" else length)
        self.length = length

    def drop_before(self, length: int) -> None:
        """Drop byte states that no text of at least so many ids needs."""
        starts = self.boundaries.starts
        # A roll-back may open again the patch that holds the byte behind it.
        self.byte_states.drop_before(starts[bisect_right(starts, max(0, length)) - 1])

    def fork(self) -> TextState:
        """The state of another text that begins like this one: neither ever sees what the other reads."""
        other, length = copy(self), self.length
        other.ids, other.entropies = self.ids[:length].copy(), self.entropies[:length].copy()
        other.boundaries = self.boundaries.copy()
        other.caches = {stage: cache.fork() for stage, cache in self.caches.items()}
        other.patch_values = self.patch_values.fork(self.caches["latent"].length)
        other.byte_states = self.byte_states.fork(length)
        other.logits = self.logits.fork()
        other.packed = False
        return other

    def pack(self, rollback: int) -> None:
        """Give up memory that going on, after taking back up to `rollback` ids, has no need of.

        A state that is packed is there to be forked, and saved, not read on; its forks are like any others.
        """
        starts = self.boundaries.starts
        opened = bisect_right(starts, max(0, self.length - rollback)) - 1
        self.patch_values.pack(max(0, opened - 1), self.caches["latent"].length)
        for cache in self.caches.values():
            cache.pack()
        self.packed = True

    @property
    def bytes(self) -> int:
        """Memory of caches and recent states, in bytes, what others share with it included."""
        return sum(size for _, size, _ in self.parts())

    @property
    def own_bytes(self) -> int:
        """What of it nobody shares: bytes that are free again when this state is dropped."""
        return sum(size for _, size, alone in self.parts() if alone)

    @property
    def saved_bytes(self) -> int:
        """What its arrays take in a file, in bytes."""
        length, starts = self.length, self.boundaries.starts
        values, states, logits = self.patch_values, self.byte_states, self.logits
        numbers = (
            (length if "patcher" in self.caches else 0)  # entropies
            + (len(starts) - 1 - values.oldest) * values.tensor.shape[1]
            + (length - states.base) * states.buffer.shape[1]
            + (length - logits.oldest) * logits.rows.shape[1]
        )
        for cache in self.caches.values():
            numbers += math.prod(cache.buffer.shape) // cache.capacity * (cache.length - cache.first)
        return int(2 * length + 4 * len(starts) + 4 * numbers)

    def parts(self) -> Iterator[tuple[object, int, bool]]:
        """(what it is, bytes, whether nobody else holds it) of each part; forks share objects."""
        yield self.ids, self.ids.nbytes, True
        yield self.entropies, self.entropies.nbytes, True
        yield self.boundaries, self.boundaries.bytes, True
        yield self.logits.rows, self.logits.rows.nbytes, True
        yield self.byte_states.buffer, self.byte_states.buffer.nbytes, True
        yield self.patch_values.tensor, self.patch_values.tensor.nbytes, self.patch_values.lease.alone
        for cache in self.caches.values():
            yield cache.buffer, cache.buffer.nbytes, cache.lease.alone
            yield cache, cache.bytes - cache.buffer.nbytes, True


def new_state(manifest: Manifest, backends: Mapping[str, StageBackend], limits: CacheLimits) -> TextState:
    """The state of a text of which nothing was read, in the backends' memory."""
    memory, decoder = backends["encoder"].memory, manifest.stages["decoder"]
    assert decoder.patch_values is not None
    # A chunk's bytes may read one patch each and the last `rollback` bytes too, plus the patch before.
    slots = limits.chunk + limits.rollback + 2
    idle = None if manifest.patching.needs_entropy else "patcher"
    return TextState(
        PatchBoundaries(manifest.patching),
        {stage: backends[stage].new_cache(limits) for stage in STAGES if stage != idle},
        PatchValues(memory, slots, decoder.patch_values),
        ByteStates(memory, manifest.model.width),
        RecentLogits(limits.rollback + 1, manifest.model.vocab_size),
    )


def memory_of(states: Iterable[TextState]) -> int:
    """Bytes that states hold together: what some of them share counts once."""
    sizes = {id(part): size for state in states for part, size, _ in state.parts()}
    return sum(sizes.values())
