"""Figures of a cut text: counts, and how long its patches are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import mean, median

import numpy as np

from .pieces import characters
from .view import PatchView

__all__ = ["Summary", "counted", "histogram_rows", "summarize"]


@dataclass(frozen=True)
class Summary:
    """What is counted in a text; BOS and the patch it is alone in are left out."""

    bytes: int
    """Bytes of the text."""
    characters: int
    """Characters; bytes that are no UTF-8 are not among them."""
    invalid_bytes: int
    """Bytes that are no UTF-8."""
    patches: int
    """Patches, the last one included though it may not be complete."""
    mean_length: float
    """Bytes a patch."""
    median_length: float
    """Likewise."""
    longest: int
    """Bytes of the longest patch."""
    lengths: dict[int, int]
    """Patches by their length in bytes, rising."""
    mean_entropy: float | None
    """Nats a byte; None without a patcher."""
    over_threshold: float | None
    """Of the bytes that the threshold decides about, the share whose entropy (monotonic rules: its rise) is
    over it; None when it decides about none."""


def summarize(view: PatchView) -> Summary:
    """Count."""
    seen = [character.text for character in characters(view.data)]
    over = view.over_threshold
    return Summary(
        bytes=len(view.data),
        characters=sum(text is not None for text in seen),
        invalid_bytes=seen.count(None),
        patches=len(view.lengths),
        mean_length=mean(view.lengths),
        median_length=float(median(view.lengths)),
        longest=max(view.lengths),
        lengths=dict(sorted(Counter(view.lengths).items())),
        mean_entropy=None if view.entropies is None else float(np.mean(view.entropies[:-1])),
        over_threshold=float(over.mean()) if over is not None and len(over) else None,
    )


def counted(summary: Summary) -> str:
    """What there is how many of: "79 bytes, 75 characters, 22 patches"."""
    parts = [_count(summary.bytes, "byte"), _count(summary.characters, "character")]
    if summary.invalid_bytes:
        parts.append(_count(summary.invalid_bytes, "invalid byte"))
    return ", ".join([*parts, f"{summary.patches:,} patch{'es' * (summary.patches != 1)}"])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def histogram_rows(summary: Summary, single: int = 8) -> list[tuple[str, int]]:
    """Lengths and how many patches have them: 1 to `single` one by one, longer ones in doubling ranges.

    Ends with the range of the longest patch; ranges before it may be empty.
    """
    found = [
        (str(length), summary.lengths.get(length, 0)) for length in range(1, min(single, summary.longest) + 1)
    ]
    low = single + 1
    while low <= summary.longest:
        high = 2 * (low - 1)
        found.append(
            (f"{low}-{high}", sum(n for length, n in summary.lengths.items() if low <= length <= high))
        )
        low = high + 1
    return found
