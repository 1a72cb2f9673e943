"""The patches of one text, and why each begins: the data behind every way of showing them.

Positions are those of bytes in the text, from 0; the runtime's are one higher, because a text begins with
BOS. BOS is a patch of its own and appears nowhere here, so patches are numbered from 1. The entropy of a byte
is the patcher's uncertainty before it has seen that byte, in nats: it decides whether a patch starts there.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...runtime.patching import PatchBoundaries, PatchingRule
from ...runtime.vocabulary import encode
from .pieces import Piece, pieces

if TYPE_CHECKING:
    from ...runtime import BltModel

__all__ = ["Floats", "PatchView", "cut", "fixed_starts", "look", "rule_words"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PatchView:
    """A text of n >= 1 bytes and its patches."""

    data: bytes
    """The text."""
    rule: PatchingRule
    """What cut it."""
    entropies: Floats | None
    """float32 [1 + n], nats: that of byte i at i, and after the text at n; None without a patcher."""
    starts: tuple[int, ...]
    """Positions that a patch starts at, rising from 0; never n."""
    reasons: tuple[str, ...]
    """Why each does: "first" (the rule always begins so), "entropy", "space", "static", "byte" or
    "max_patch_length"."""
    next_starts: bool
    """Whether a byte behind the text would start a patch; if not, the last patch is still open."""

    @cached_property
    def pieces(self) -> list[Piece]:
        """What the text is shown as."""
        return pieces(self.data)

    @cached_property
    def start_set(self) -> frozenset[int]:
        """`starts`, to ask for one."""
        return frozenset(self.starts)

    @cached_property
    def lengths(self) -> list[int]:
        """Bytes of each patch; their sum is n."""
        ends = (*self.starts[1:], len(self.data))
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    @cached_property
    def patches(self) -> list[int]:
        """Of each byte the number of its patch, from 1."""
        return [number for number, length in enumerate(self.lengths, 1) for _ in range(length)]

    @cached_property
    def visible_patches(self) -> list[int]:
        """Of each piece a number that differs from its neighbour's where their first bytes' patches do.

        A patch that lies inside one piece takes no number, so even and odd ones alternate as pieces do.
        """
        numbers: list[int] = []
        number, last = -1, 0
        for piece in self.pieces:
            number += self.patches[piece.start] != last
            last = self.patches[piece.start]
            numbers.append(number)
        return numbers

    @cached_property
    def top(self) -> float:
        """Where scales of entropy end: at least 1 nat, and no entropy or threshold of the text is over it."""
        if self.entropies is None:
            return 1.0
        seen = self.entropies[np.isfinite(self.entropies)]
        line = self.level or 0.0
        return max(1.0, line, float(seen.max())) if len(seen) else max(1.0, line)

    @property
    def level(self) -> float | None:
        """The entropy over which a patch may start; None when the rule has no such level."""
        return self.rule.threshold if self.rule.needs_entropy and not self.rule.monotonic else None

    @cached_property
    def rises(self) -> Floats | None:
        """float32 [n]: how much higher each byte's entropy is than the one before; NaN at 0.

        None when the rule does not look at it.
        """
        if self.entropies is None or fixed_starts(self.rule) == 1:
            return None
        return np.diff(self.entropies[:-1], prepend=np.float32(np.nan))

    @cached_property
    def over_threshold(self) -> NDArray[np.bool_] | None:
        """bool: whether each byte's entropy, or in a monotonic rule its rise, is over the threshold; without
        the bytes of the rule's fixed beginning. None when the rule has no threshold."""
        if self.entropies is None or not self.rule.needs_entropy or self.rule.threshold is None:
            return None
        seen = self.rises if self.rule.monotonic and self.rises is not None else self.entropies[:-1]
        over: NDArray[np.bool_] = seen[fixed_starts(self.rule) :] > np.float32(self.rule.threshold)
        return over

    def inner_starts(self, piece: Piece) -> int:
        """How many patches start inside a piece, behind its first byte."""
        return bisect_right(self.starts, piece.end - 1) - bisect_right(self.starts, piece.start)

    def starts_with(self, piece: Piece) -> bool:
        """Whether a patch starts with a piece's first byte."""
        return piece.start in self.start_set

    def entropy(self, piece: Piece) -> float | None:
        """The highest entropy of a piece's bytes; None without a patcher."""
        if self.entropies is None:
            return None
        return float(self.entropies[piece.start : piece.end].max())


def look(model: BltModel, data: bytes, rule: PatchingRule) -> PatchView:
    """Read `data` with the model's patcher, and with no other stage, and cut it by `rule`.

    Raises PromptTooLongError when the model has no position for it, BundleError when the rule needs entropies
    and the model has no patcher.
    """
    model.limits.check_positions(1 + len(data))
    has_patcher = "patcher" in model.manifest.stages
    entropies = model.entropies(data) if has_patcher or rule.needs_entropy else None
    return cut(data, rule, entropies)


def cut(data: bytes, rule: PatchingRule, entropies: Floats | None) -> PatchView:
    """Cut `data` by `rule`; entropies as in `PatchView`. Raises ValueError for no bytes or no entropies."""
    if not data:
        raise ValueError("there is no patch in an empty text")
    starts = _starts(data, rule, entropies)
    unlimited = replace(rule, max_patch_length=None)
    by_rule = set(starts if unlimited == rule else _starts(data, unlimited, entropies))
    reasons = [
        "first" if start < fixed_starts(rule) else rule.mode if start in by_rule else "max_patch_length"
        for start in starts
        if start < len(data)
    ]
    within = tuple(start for start in starts if start < len(data))
    return PatchView(data, rule, entropies, within, tuple(reasons), starts[-1] == len(data))


def _starts(data: bytes, rule: PatchingRule, entropies: Floats | None) -> list[int]:
    """Positions in the text that start a patch, n among them if the next byte would."""
    boundaries = PatchBoundaries(rule)
    boundaries.extend(encode(data), entropies)
    return [start - 1 for start in boundaries.starts[1:]]


def fixed_starts(rule: PatchingRule) -> int:
    """How many first bytes start a patch whatever they are: 2 where a rule looks at rises, else 1."""
    return 2 if rule.needs_entropy and (rule.monotonic or rule.threshold_add is not None) else 1


def rule_words(rule: PatchingRule) -> str:
    """The rule as the end of a sentence: "a patch starts ..."."""
    if rule.mode == "entropy":
        threshold, add = f"{rule.threshold or 0.0:.4g}", rule.threshold_add
        words = f"where entropy is over {threshold} nats"
        if rule.monotonic:
            words = f"where entropy rises by more than {threshold} nats"
        elif add is not None:
            words += f" and rises by more than {add:.4g}"
    else:
        words = {
            "space": "behind the first of some spaces or signs",
            "static": f"every {rule.patch_size} bytes",
            "byte": "with every byte",
        }[rule.mode]
    if rule.max_patch_length is not None:
        words += f", and after {rule.max_patch_length} bytes at the latest"
    return words
