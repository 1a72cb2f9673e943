"""Figures of a cut text: counts, and how long its patches are.

A cut text as tables for programs: one row a byte.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from .pieces import characters, escape
from .view import PatchView

__all__ = [
    "COLUMNS",
    "Summary",
    "byte_rows",
    "counted",
    "csv_text",
    "histogram_rows",
    "patch_document",
    "summarize",
]


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


COLUMNS = (
    "position",
    "byte",
    "character",
    "character_position",
    "entropy",
    "patch",
    "starts_patch",
    "reason",
)
"""Of a row: position of the byte in the text, from 0; the byte; the character it belongs to (None: it is no
UTF-8) and the position of that character's first byte; entropy in nats before the byte (None: no patcher);
number of its patch, from 1 (the runtime's number 0 is that of BOS, which is left out); whether a patch starts
with it, and why (see `PatchView.reasons`), else None."""


def byte_rows(view: PatchView) -> Iterator[dict[str, Any]]:
    """A row for each byte, keys as in `COLUMNS`."""
    reasons = dict(zip(view.starts, view.reasons, strict=True))
    for character in characters(view.data):
        for position in range(character.start, character.end):
            yield {
                "position": position,
                "byte": view.data[position],
                "character": character.text,
                "character_position": character.start,
                "entropy": _entropy(view, position),
                "patch": view.patches[position],
                "starts_patch": position in reasons,
                "reason": reasons.get(position),
            }


def csv_text(view: PatchView) -> str:
    r"""The rows with a header, each on one line. None is an empty cell; a character that can't be seen is
    written as \n, \x00, \u00a0 or \U000e0001 (a backslash itself is one backslash)."""
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in byte_rows(view):
        text = row["character"]
        if text is not None and text != " " and not text.isprintable():
            row["character"] = escape(text)
        row["starts_patch"] = int(row["starts_patch"])
        table.writerow(row)
    return out.getvalue()


def patch_document(view: PatchView) -> dict[str, Any]:
    """Everything: the text, the rule, the figures, a row for each byte, and what comes behind the text."""
    return {
        "text": view.data.decode("utf-8", "replace"),
        "conventions": "positions count the text's bytes from 0; BOS, a patch of its own, is left out, and "
        "patches count from 1; entropy is in nats, before the byte is known",
        "rule": asdict(view.rule),
        "summary": asdict(summarize(view)),
        "next": {"entropy": _entropy(view, len(view.data)), "starts_patch": view.next_starts},
        "bytes": list(byte_rows(view)),
    }


def _entropy(view: PatchView, position: int) -> float | None:
    """Without the digits that float32 does not have."""
    return None if view.entropies is None else float(str(view.entropies[position]))
