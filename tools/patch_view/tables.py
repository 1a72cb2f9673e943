"""A cut text as tables for programs: one row a byte."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .pieces import characters, escape
from .summary import summarize
from .view import PatchView

__all__ = ["COLUMNS", "byte_rows", "csv_text", "patch_document"]

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
