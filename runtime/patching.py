"""Where patches begin, decided byte by byte.

Position 0 begins a patch; whether position i + 1 does is decided by bytes 0..i, so a text's patches never
change when it grows. In the rules, `H[i]` is the patcher's entropy (nats) at position i; `H[0]` is
never used.

- entropy: 1 starts; for i >= 1, i + 1 starts if H[i] > threshold (the paper's section 2.3, global threshold)
    - monotonic: 1 and 2 start; for i >= 2, i + 1 starts if H[i] - H[i - 1] > threshold
    - threshold_add: 1 and 2 start, 3 does not; for i >= 3, i + 1 starts if H[i] - H[i - 1] > threshold_add
      and H[i] > threshold
- space: 1 starts; for i >= 1, i + 1 starts if id i is special, or byte i is space-like and byte i - 1 is not
- static: 1, 1 + p, 1 + 2p, ... start, for patch size p
- byte: every position starts

With `max_patch_length`, i + 1 also starts when the patch that holds byte i already has that many bytes.
Differences and comparisons of entropies are in float32, as in the reference implementations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import OptionError
from .fields import checked_flag, checked_int, checked_real, shown
from .names import PATCHING_MODES
from .vocabulary import BYTE_OFFSET, VOCAB_SIZE

__all__ = ["PatchBoundaries", "PatchingRule"]


_Ids = NDArray[np.int64]
_Entropies = NDArray[np.float32]
_Flags = NDArray[np.bool_]
_NO_ENTROPIES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class PatchingRule:
    """When a patch begins. Raises OptionError for an unknown mode or a value that is missing or out of range.

    Fields that belong to another mode are checked but have no effect.
    """

    mode: str
    """One of `PATCHING_MODES`."""

    threshold: float | None = None
    """Entropy in nats; needed by mode entropy."""

    threshold_add: float | None = None
    """Mode entropy: least rise of the entropy. None and 0.0 both mean off, and become None."""

    monotonic: bool = False
    """Mode entropy: the threshold is for the entropy's rise. Wins over `threshold_add`."""

    max_patch_length: int | None = None
    """Longest patch in bytes, in any mode; None means no limit."""

    patch_size: int | None = None
    """Mode static: bytes in a patch."""

    def __post_init__(self) -> None:
        if self.mode not in PATCHING_MODES:
            raise OptionError(f"patching mode is {shown(self.mode)}; allowed are {', '.join(PATCHING_MODES)}")
        if self.mode == "entropy" and self.threshold is None:
            raise OptionError("patching mode entropy has no threshold; give one, in nats")
        if self.mode == "static" and self.patch_size is None:
            raise OptionError("patching mode static has no patch_size; give one, in bytes")
        checked_flag("monotonic", self.monotonic)
        for name in ("threshold", "threshold_add"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked_real(f"patching {name}", value))
        for name in ("max_patch_length", "patch_size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked_int(name, value, 1))
        if self.threshold_add == 0.0:
            object.__setattr__(self, "threshold_add", None)

    @property
    def needs_entropy(self) -> bool:
        """Whether boundaries depend on the patcher, so that `PatchBoundaries.extend` needs its entropies."""
        return self.mode == "entropy"


class PatchBoundaries:
    """The patches of one growing text: those of a fresh one on its ids, however it was cut or rolled back."""

    def __init__(self, rule: PatchingRule) -> None:
        self._decider = _decider(rule)
        self._needs_entropy = rule.needs_entropy
        self._limit = rule.max_patch_length
        self._length = 0
        self._starts = [0]

    @property
    def length(self) -> int:
        """Number of ids seen."""
        return self._length

    @property
    def starts(self) -> list[int]:
        """Patch starts, rising from 0, up to and including `length` if a patch starts after the last id.

        Patch p is complete when `starts[p + 1]` exists. This is the live list, as copying it for every byte
        would cost more than the decision: do not change it, and copy it to keep it.
        """
        return self._starts

    @property
    def complete_patches(self) -> int:
        """Number of patches whose end is known."""
        return len(self._starts) - 1

    def extend(self, ids: NDArray[np.int64], entropies: NDArray[np.float32] | None = None) -> None:
        """Takes the next ids, of positions length..length + S - 1, and decides the starts up to length + S.

        `ids` is int64 [S]; `entropies` float32 [S], nats, is needed when the rule `needs_entropy` and not
        looked at otherwise. A NaN entropy starts no patch, as in the reference implementations.
        Raises ValueError, with nothing changed, when entropies are missing or not one per id.
        """
        count = len(ids)
        if not self._needs_entropy:
            entropies = _NO_ENTROPIES
        elif entropies is None:
            raise ValueError(f"no entropies given for {count} ids; this patching rule needs one for each")
        else:
            entropies = np.asarray(entropies, dtype=np.float32)
            if entropies.shape != (count,):
                raise ValueError(
                    f"entropies of shape {entropies.shape} given for {count} ids; allowed is one each"
                )
        if count == 0:
            return
        first = self._length
        decided = self._decider.decide(first, ids, entropies)
        begun = (np.flatnonzero(decided) + (first + 1)).tolist()
        self._length = first + count
        if self._limit is None:
            self._starts += begun
        else:
            self._add_limited(begun, self._limit)

    def _add_limited(self, begun: list[int], limit: int) -> None:
        """Adds the rule's starts, and one wherever the patch before would pass the limit."""
        current = self._starts[-1]
        for start in begun:
            self._starts += range(current + limit, start, limit)
            self._starts.append(start)
            current = start
        self._starts += range(current + limit, self._length + 1, limit)

    def patch_lengths(self) -> list[int]:
        """Length of each patch over the ids seen, all > 0, with sum `length`; the open patch counts as is."""
        ends = [*self._starts[1:], self._length]
        lengths = [end - start for start, end in zip(self._starts, ends, strict=True)]
        if lengths[-1] == 0:
            lengths.pop()
        return lengths

    def patch_index_of_next(self, position: int) -> int:
        """p(i + 1): the index of the patch that position i + 1 belongs to, for 0 <= i < length.

        Raises IndexError for another position.
        """
        if not 0 <= position < self._length:
            raise IndexError(f"position is {position}; allowed is 0 to below {self._length}")
        return bisect_right(self._starts, position + 1) - 1

    def latent_index(self, first: int, count: int) -> NDArray[np.int64]:
        """p(i + 1) - 1 for i = first..first + count - 1: the patch whose latent the byte at i reads.

        int64 [count], never negative. Raises IndexError when a position is not below `length`.
        """
        if first < 0 or count < 0 or first + count > self._length:
            raise IndexError(f"{count} positions from {first} on; allowed are 0 to below {self._length}")
        before = bisect_right(self._starts, first + 1)
        after = bisect_right(self._starts, first + count, lo=before) if count else before
        rises = np.zeros(count, dtype=np.int64)
        if after > before:
            rises[np.asarray(self._starts[before:after]) - (first + 1)] = 1
            np.cumsum(rises, out=rises)
        rises += before - 2
        return rises

    def rollback(self, length: int) -> None:
        """Forgets the ids at positions >= `length`. The start at `length` itself, already decided, stays.

        Raises ValueError when `length` is negative or more than the ids seen.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"roll-back to length {length}; allowed is 0 to {self._length}")
        self._length = length
        del self._starts[bisect_right(self._starts, length) :]
        self._decider.rollback(length)


class _Decider(ABC):
    """The rule without `max_patch_length`: for each new id, whether the next position starts a patch.

    It keeps, for every position, what the decision after the next one reads, so that `rollback` is exact.
    """

    fixed: tuple[bool, ...] = (True,)
    """Decisions after positions 0, 1, ..., whatever the bytes are."""

    def __init__(self, rule: PatchingRule) -> None:
        # float32, because a float32 tensor's comparison with a number rounds the number first
        with np.errstate(over="ignore"):
            self.threshold = np.float32(rule.threshold or 0.0)
            self.threshold_add = np.float32(rule.threshold_add or 0.0)
        self.patch_size = rule.patch_size or 1

    def decide(self, first: int, ids: _Ids, entropies: _Entropies) -> _Flags:
        """bool [S] for ids int64 [S] at positions first..; entropies float32 [S] if the rule needs them."""
        starts = self.by_rule(first, ids, entropies)
        if first < len(self.fixed):
            fixed = self.fixed[first : first + len(ids)]
            starts[: len(fixed)] = fixed
        return starts

    @abstractmethod
    def by_rule(self, first: int, ids: _Ids, entropies: _Entropies) -> _Flags:
        """As `decide`, but for the fixed beginning."""

    def rollback(self, length: int) -> None:  # noqa: B027 (most rules keep nothing)
        """Forgets what was kept of positions >= `length`."""


class _Threshold(_Decider):
    def by_rule(self, first: int, ids: _Ids, entropies: _Entropies) -> _Flags:
        starts: _Flags = entropies > self.threshold
        return starts


class _Rising(_Decider):
    """Rules that compare an entropy with the one before."""

    fixed: tuple[bool, ...] = (True, True)

    def __init__(self, rule: PatchingRule) -> None:
        super().__init__(rule)
        self._past = array("f")

    def rises(self, entropies: _Entropies) -> _Entropies:
        """H[i] - H[i - 1] for the new positions; that of position 0 means nothing."""
        previous = self._past[-1] if self._past else 0.0
        rises = np.array(entropies, dtype=np.float32)
        self._past.frombytes(rises.tobytes())
        rises[1:] -= entropies[:-1]
        rises[0] -= np.float32(previous)
        return rises

    def rollback(self, length: int) -> None:
        del self._past[length:]


class _Monotonic(_Rising):
    def by_rule(self, first: int, ids: _Ids, entropies: _Entropies) -> _Flags:
        starts: _Flags = self.rises(entropies) > self.threshold
        return starts


class _ThresholdAdd(_Rising):
    fixed = (True, True, False)

    def by_rule(self, first: int, ids: _Ids, entropies: _Entropies) -> _Flags:
        starts: _Flags = self.rises(entropies) > self.threshold_add
        starts &= entropies > self.threshold
        return starts


class _Space(_Decider):
    def __init__(self, rule: PatchingRule) -> None:
        super().__init__(rule)
        self._past = bytearray()

    def by_rule(self, first: int, ids: _Ids, entropies: _Entropies) -> _Flags:
        space = _SPACE_LIKE[ids]
        starts: _Flags = space.copy()
        starts[1:] &= ~space[:-1]
        if self._past and self._past[-1]:
            starts[0] = False
        starts |= ids < BYTE_OFFSET
        self._past += space.tobytes()
        return starts

    def rollback(self, length: int) -> None:
        del self._past[length:]


class _Static(_Decider):
    def by_rule(self, first: int, ids: _Ids, entropies: _Entropies) -> _Flags:
        starts: _Flags = np.arange(first, first + len(ids)) % self.patch_size == 0
        return starts


class _EveryByte(_Decider):
    def by_rule(self, first: int, ids: _Ids, entropies: _Entropies) -> _Flags:
        return np.ones(len(ids), dtype=np.bool_)


def _decider(rule: PatchingRule) -> _Decider:
    if rule.mode == "entropy":
        if rule.monotonic:
            return _Monotonic(rule)
        return _Threshold(rule) if rule.threshold_add is None else _ThresholdAdd(rule)
    others: dict[str, type[_Decider]] = {"space": _Space, "static": _Static, "byte": _EveryByte}
    return others[rule.mode](rule)


def _space_like() -> NDArray[np.bool_]:
    """bool [260]: special ids, ASCII but letters and digits, and bytes from 0xC0, which begin a character."""
    table = np.ones(VOCAB_SIZE, dtype=np.bool_)
    for byte in range(256):
        table[BYTE_OFFSET + byte] = byte >= 0xC0 or (byte < 0x80 and not bytes([byte]).isalnum())
    return table


_SPACE_LIKE = _space_like()
