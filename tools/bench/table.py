"""Engines' readings as a table and as JSON: medians, spread, and how many times as fast each bundle was.

Ratios are paired: each round's two readings are divided first, so that what slowed the machine for a while
slows both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .common import Spread
from .engine import Card, Reading

__all__ = ["Measured", "document", "in_units", "paired_ratio", "render"]


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
