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

from array import array
from bisect import bisect_right
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import OptionError
from .fields import checked_flag, checked_int, checked_real, shown
from .names import PATCHING_MODES
from .vocabulary import BYTE_OFFSET

__all__ = ["PatchBoundaries", "PatchingRule"]


_Flags = NDArray[np.bool_]
_Value = TypeVar("_Value", np.float32, np.bool_)
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
        self._rule = rule
        # float32, because a float32 tensor's comparison with a number rounds the number first
        with np.errstate(over="ignore"):
            self._threshold = np.float32(rule.threshold or 0.0)
            self._threshold_add = np.float32(rule.threshold_add or 0.0)
        # Whether positions 1, 2, ... start a patch, where that does not depend on the text.
        self._fixed: tuple[bool, ...] = (True,)
        if rule.needs_entropy and (rule.monotonic or rule.threshold_add is not None):
            self._fixed = (True, True) if rule.monotonic else (True, True, False)
        # Of every position what the decision after the next one reads: its entropy, or whether it is a space.
        self._past = array("f" if rule.needs_entropy else "B")
        self.length = 0
        """Number of ids seen."""
        self.starts = [0]
        """Patch starts, rising from 0, up to and including `length` if a patch starts after the last id.

        Patch p is complete when `starts[p + 1]` exists. This is the live list, as copying it for every byte
        would cost more than the decision: do not change it, and copy it to keep it."""

    def copy(self) -> PatchBoundaries:
        """Those of another text that begins with the same ids."""
        other = copy(self)
        other._past, other.starts = self._past[:], self.starts.copy()
        return other

    @property
    def bytes(self) -> int:
        """Memory, in bytes; a start is a number of its own."""
        return len(self._past) * self._past.itemsize + 40 * len(self.starts)

    @property
    def count(self) -> int:
        """Number of patches of the ids seen, the open one included."""
        return len(self.starts) - (self.starts[-1] == self.length)

    def extend(self, ids: NDArray[np.int64], entropies: NDArray[np.float32] | None = None) -> None:
        """Takes the next ids, of positions length..length + S - 1, and decides the starts up to length + S.

        `ids` is int64 [S]; `entropies` float32 [S], nats, is needed when the rule `needs_entropy` and not
        looked at otherwise. A NaN entropy starts no patch, as in the reference implementations.
        Raises ValueError, with nothing changed, when entropies are missing or not one per id.
        """
        count = len(ids)
        if not self._rule.needs_entropy:
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
        first = self.length
        decided = self._decide(first, ids, entropies)
        if first < len(self._fixed):
            fixed = self._fixed[first : first + count]
            decided[: len(fixed)] = fixed
        begun = (np.flatnonzero(decided) + (first + 1)).tolist()
        self.length = first + count
        limit = self._rule.max_patch_length
        if limit is None:
            self.starts += begun
            return
        # The rule's starts, and one wherever the patch before would pass the limit.
        current = self.starts[-1]
        for start in begun:
            self.starts += range(current + limit, start, limit)
            self.starts.append(start)
            current = start
        self.starts += range(current + limit, self.length + 1, limit)

    def _decide(self, first: int, ids: NDArray[np.int64], entropies: NDArray[np.float32]) -> _Flags:
        """bool [S]: whether the rule starts a patch after each id, without `_fixed` and longest patch."""
        rule = self._rule
        if rule.mode == "byte":
            return np.ones(len(ids), dtype=np.bool_)
        starts: _Flags
        if rule.mode == "static":
            starts = np.arange(first, first + len(ids)) % (rule.patch_size or 1) == 0
        elif rule.mode == "space":
            space = _SPACE_LIKE[ids]
            starts = space > self._before(space)
            starts |= ids < BYTE_OFFSET
        elif rule.monotonic:
            starts = entropies - self._before(entropies) > self._threshold
        elif rule.threshold_add is not None:
            starts = entropies - self._before(entropies) > self._threshold_add
            starts &= entropies > self._threshold
        else:
            starts = entropies > self._threshold
        return starts

    def _before(self, values: NDArray[_Value]) -> NDArray[_Value]:
        """Values [S] of the new positions -> those of the positions before; that before 0 means nothing."""
        before = np.empty_like(values)
        before[0] = self._past[-1] if self._past else 0
        before[1:] = values[:-1]
        self._past.frombytes(values.tobytes())
        return before

    def patch_lengths(self) -> list[int]:
        """Length of each patch over the ids seen, all > 0, with sum `length`; the open patch counts as is."""
        lengths = [end - start for start, end in pairwise([*self.starts, self.length])]
        return lengths[: self.count]

    def latent_index(self, first: int, count: int) -> NDArray[np.int64]:
        """p(i + 1) - 1 for i = first..first + count - 1: the patch whose latent the byte at i reads, where
        p(i + 1) is the patch that position i + 1 belongs to.

        int64 [count], never negative. Raises IndexError when a position is not below `length`.
        """
        if first < 0 or count < 0 or first + count > self.length:
            raise IndexError(f"{count} positions from {first} on; allowed are 0 to below {self.length}")
        before = bisect_right(self.starts, first + 1)
        after = bisect_right(self.starts, first + count, lo=before) if count else before
        rises = np.zeros(count, dtype=np.int64)
        if after > before:
            rises[np.asarray(self.starts[before:after]) - (first + 1)] = 1
            np.cumsum(rises, out=rises)
        rises += before - 2
        return rises

    def rollback(self, length: int) -> None:
        """Forgets the ids at positions >= `length`. The start at `length` itself, already decided, stays.

        Raises ValueError when `length` is negative or more than the ids seen.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"roll-back to length {length}; allowed is 0 to {self.length}")
        self.length = length
        del self.starts[bisect_right(self.starts, length) :]
        del self._past[length:]


# bool [260]: special ids, ASCII but letters and digits, and bytes from 0xC0, which begin a character.
_SPACE_LIKE = np.array(
    [True] * BYTE_OFFSET
    + [byte >= 0xC0 or (byte < 0x80 and not bytes([byte]).isalnum()) for byte in range(256)]
)
