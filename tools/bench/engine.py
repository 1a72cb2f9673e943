"""What every measurement needs: medians and spread, the machine's name, and the JSON line at the end.

What a comparison asks of an engine, whatever runs below it: this module knows no engine.

A round is a prompt and a number of bytes to add; a reading is how fast each was. The first new byte, or
token, is chosen from the prompt's own logits, so n new ones are n - 1 steps: decoding speed counts the steps,
for every engine alike. A token model's tokens count as `TokenBudget.bytes_per_token` bytes each.

Engines' readings as a table and as JSON: medians, spread, and how many times as fast each bundle was.

Ratios are paired: each round's two readings are divided first, so that what slowed the machine for a while
slows both sides of a ratio.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..profile.statistics import Spread, machine

__all__ = [
    "BenchError",
    "Card",
    "Engine",
    "EngineSpec",
    "Measured",
    "Reading",
    "Round",
    "Spread",
    "TokenBudget",
    "document",
    "folder_bytes",
    "in_units",
    "machine",
    "need",
    "paired_ratio",
    "print_json",
    "render",
]


def print_json(document: dict[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps({"machine": machine(), **document}))


class BenchError(Exception):
    """One line for the person who asked: what was got, and what to do."""


@dataclass(frozen=True)
class Round:
    """What every engine is asked in turn."""

    prompt: bytes
    """The context. A token model takes as many tokens as these bytes stand for, whichever they are."""
    new_bytes: int
    """Bytes to add, greedily."""
    following: bytes = b""
    """What comes next in the text, for an engine that reads on in it."""


@dataclass(frozen=True)
class Reading:
    """One round's speeds, in bytes a second of wall clock."""

    prefill: float
    """The prompt's bytes over the time until its logits."""
    decode: float
    """The new bytes after the first over the time that they took."""
    bytes_per_patch: float | None = None
    """Of the new bytes: a patched model's speed hangs on it, and random weights patch otherwise than trained
    ones. None for a token model."""


@dataclass(frozen=True)
class Card:
    """What an engine runs."""

    name: str
    parameters: int
    """Trained numbers, tables of which a byte reads a few rows left out."""
    disk_bytes: int
    """Weights on disk, those tables left out."""
    build: str
    """Version and what is special about it."""
    table_parameters: int = 0
    """Trained numbers in such tables."""
    table_bytes: int = 0
    """Those tables on disk."""


class Engine(Protocol):
    """A loaded model."""

    card: Card

    def read(self, task: Round) -> Reading:
        """Run one round from an empty cache."""
        ...


class EngineSpec(Protocol):
    """How to load a model: plain values, because the loading happens in a process of its own."""

    @property
    def name(self) -> str:
        """Unique in a comparison."""
        ...

    @property
    def memory_bytes(self) -> int:
        """About what the loaded model occupies."""
        ...

    def open(self) -> Engine:
        """Load. Raises BenchError when that can't be."""
        ...


@dataclass(frozen=True)
class TokenBudget:
    """What a token model gets, where a byte model gets bytes."""

    threads: int
    bytes_per_token: float
    positions: int
    """Tokens that a context must have room for."""

    def tokens(self, count: int) -> int:
        """Tokens that `count` bytes stand for, 2 at least: decoding needs a step."""
        return max(2, round(count / self.bytes_per_token))

    def bytes_per_second(self, steps: int, seconds: float) -> float:
        """Speed in bytes of `steps` tokens."""
        return steps * self.bytes_per_token / seconds

    def prompt(self, task: Round, vocabulary: int) -> list[int]:
        """Token ids in place of the prompt, different in each round, none of the first (special) ones."""
        start = sum(task.prompt)
        return [100 + (start + 7919 * i) % (vocabulary - 100) for i in range(self.tokens(len(task.prompt)))]


def need(module: str, package: str | None = None) -> Any:
    """Import an optional module. Raises BenchError naming the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = package or module.split(".")[0].replace("_", "-")
        raise BenchError(f"{module}: {error}; install it with: pip install {missing}") from None


def folder_bytes(folder: Path) -> int:
    """Bytes of the files right in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


@dataclass
class Measured:
    """An engine and its readings, one a round."""

    card: Card
    readings: list[Reading] = field(default_factory=list)

    @property
    def decode(self) -> Spread:
        """Bytes a second of decoding."""
        return Spread.of([reading.decode for reading in self.readings])

    @property
    def prefill(self) -> Spread:
        """Bytes a second of reading the prompt."""
        return Spread.of([reading.prefill for reading in self.readings])

    @property
    def bytes_per_patch(self) -> float | None:
        """Median over the rounds; None for a token model."""
        values = [reading.bytes_per_patch for reading in self.readings if reading.bytes_per_patch is not None]
        return Spread.of(values).median if values else None


def paired_ratio(fast: Sequence[float], slow: Sequence[float]) -> Spread:
    """Spread of `fast` over `slow`, round by round; both have one reading a round."""
    return Spread.of([one / other for one, other in zip(fast, slow, strict=True)])


def in_units(number: float) -> str:
    """Three digits with K, M or G: 1_074_000_000 -> "1.07G"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def render(measured: Sequence[Measured], bundles: Sequence[str]) -> str:
    """The table; a column for each name in `bundles` tells how many times as fast it decodes."""
    header = ["engine", "parameters", "on disk", "decode bytes/s", "prefill bytes/s"]
    rows = [header + [f"{name} is ... times as fast" for name in bundles]]
    for row in measured:
        card = row.card
        rows.append(
            [
                card.name,
                _with_tables(card.parameters, card.table_parameters),
                _with_tables(card.disk_bytes, card.table_bytes, "B"),
                str(row.decode),
                str(row.prefill),
                *(str(ratio) for ratio in _ratios(row, measured, bundles).values()),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def document(measured: Sequence[Measured], bundles: Sequence[str]) -> list[dict[str, Any]]:
    """The same for the JSON line, every round's decoding included."""
    return [
        {
            **asdict(row.card),
            "decode_bytes_per_second": row.decode.to_dict(),
            "prefill_bytes_per_second": row.prefill.to_dict(),
            "decode_rounds": [reading.decode for reading in row.readings],
            "bytes_per_patch": row.bytes_per_patch,
            "bundle_times_as_fast": {
                name: ratio.to_dict() for name, ratio in _ratios(row, measured, bundles).items()
            },
        }
        for row in measured
    ]


def _ratios(row: Measured, measured: Sequence[Measured], bundles: Sequence[str]) -> dict[str, Spread]:
    speeds = {other.card.name: [reading.decode for reading in other.readings] for other in measured}
    return {name: paired_ratio(speeds[name], speeds[row.card.name]) for name in bundles}


def _with_tables(number: float, tables: float, unit: str = "") -> str:
    beside = f" + {in_units(tables)}{unit} tables" if tables else ""
    return f"{in_units(number)}{unit}{beside}"
