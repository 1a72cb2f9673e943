"""What is told of each text of a corpus, and of all together.

Totals don't depend on the order in which texts come, to the last bit: their bits are summed exactly. What it
does not know: files, tables, engines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...runtime.errors import OptionError
from .texts import EMPTY

__all__ = ["Result", "Totals", "bytes_per_patch"]


@dataclass(frozen=True)
class Result:
    """What is told of one text."""

    name: str
    """The file that it is from, "stdin" for that."""
    line: int | None
    """Its line there, from 1; None where the file is one text."""
    bytes: int
    """Scored; 0 with a note."""
    words: int
    patches: int
    """Without the one that BOS is in each window."""
    windows: int
    bits: float
    """Over all 260 classes, of all its bytes."""
    sha256: str | None
    """Of its bytes; of a line that holds no text, of the line; None where reading it failed."""
    note: str | None = None
    """Why it has no figures: "empty", or "unreadable: " and why; None = it was scored."""
    seconds: float | None = None
    """Wall clock of this text alone, no part of what is kept; None where it has none."""

    @property
    def bits_per_byte(self) -> float | None:
        return self.bits / self.bytes if self.bytes else None

    @property
    def shown_name(self) -> str:
        """The file, with the line where there is one."""
        return self.name if self.line is None else f"{self.name}:{self.line}"

    @property
    def unread(self) -> bool:
        """It could not be read."""
        return self.note is not None and self.note != EMPTY

    def to_dict(self) -> dict[str, Any]:
        """What a line of JSON says, whose figures are those of the text and the model: no times.

        "line" is there where there is one; the figures where it was scored, else "bytes" 0 and "note".
        """
        told: dict[str, Any] = {"file": self.name}
        if self.line is not None:
            told["line"] = self.line
        told["bytes"] = self.bytes
        if self.note is None:
            told["words"], told["patches"] = self.words, self.patches
            told["bytes_per_patch"] = bytes_per_patch(self.bytes, self.patches)
            told["bits"], told["bits_per_byte"] = self.bits, self.bits_per_byte
            told["windows"] = self.windows
        else:
            told["note"] = self.note
        if self.sha256 is not None:
            told["sha256"] = self.sha256
        return told

    @classmethod
    def from_dict(cls, data: object) -> Result:
        """What `to_dict` wrote. Raises OptionError for anything else."""
        if not isinstance(data, Mapping):
            raise OptionError("it is no JSON object")
        name, line, note, sha256 = (data.get(key) for key in ("file", "line", "note", "sha256"))
        counts = [data.get(key) if note is None else 0 for key in ("bytes", "words", "patches", "windows")]
        bits = data.get("bits") if note is None else 0.0
        if not (
            isinstance(name, str)
            and (line is None or _is_count(line))
            and (note is None or isinstance(note, str))
            and (_is_sha256(sha256) or (sha256 is None and note not in (None, EMPTY)))
            and all(map(_is_count, counts))
            and (note is not None or counts[0] != 0)
            and isinstance(bits, float)
            and math.isfinite(bits)
        ):
            raise OptionError("it is no text's line")
        size, words, patches, windows = (int(one or 0) for one in counts)
        return cls(name, line, size, words, patches, windows, bits, sha256, note)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def bytes_per_patch(size: int, patches: int) -> float:
    """Mean bytes of a patch."""
    return size / max(1, patches)


class Totals:
    """Figures of all texts together."""

    def __init__(self) -> None:
        self.texts = self.empty = self.unread = 0
        """Texts scored; those without a byte; those that could not be read."""
        self.bytes = self.words = self.patches = self.windows = 0
        self._bits = Fraction()

    def add(self, result: Result) -> None:
        """Count a text."""
        self._count(result, 1)

    def remove(self, result: Result) -> None:
        """Count a text no more."""
        self._count(result, -1)

    def _count(self, result: Result, sign: int) -> None:
        if result.note is not None:
            self.empty += sign * (not result.unread)
            self.unread += sign * result.unread
            return
        self.texts += sign
        self._bits += sign * Fraction(result.bits)
        for name in ("bytes", "words", "patches", "windows"):
            setattr(self, name, getattr(self, name) + sign * getattr(result, name))

    @property
    def bits(self) -> float:
        return float(self._bits)

    @property
    def bits_per_byte(self) -> float:
        """Weighted by bytes; nan without any."""
        return float(self._bits / self.bytes) if self.bytes else math.nan

    @property
    def byte_perplexity(self) -> float:
        """2 to the bits per byte."""
        return _power(self.bits_per_byte)

    @property
    def word_perplexity(self) -> float | None:
        """2 to the bits per word, white space paid for by the words; None without words, and where it is
        more than a double holds."""
        found = _power(float(self._bits / self.words)) if self.words else math.inf
        return found if math.isfinite(found) else None

    def to_dict(self) -> dict[str, Any] | None:
        """What JSON says of all, the same in whatever order and by whatever engine; None without a text."""
        if not self.texts:
            return None
        return {
            "texts": self.texts,
            "empty": self.empty,
            "unread": self.unread,
            "bytes": self.bytes,
            "words": self.words,
            "patches": self.patches,
            "bytes_per_patch": bytes_per_patch(self.bytes, self.patches),
            "bits": self.bits,
            "bits_per_byte": self.bits_per_byte,
            "byte_perplexity": self.byte_perplexity,
            "word_perplexity": self.word_perplexity,
            "windows": self.windows,
        }


def _power(bits: float) -> float:
    try:
        return math.pow(2.0, bits)
    except OverflowError:
        return math.inf
