"""How the integers of a bundle were found: scales, blocks, and ranges of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .fields import Fields, by, if_there, record
from .names import SEARCHES, STAGES

__all__ = ["CalibrationSpec", "QuantizationSpec"]

_COUNT = 2**63 - 1
_WIDTH = 1_000_000
_MOST_SIZES = 16

_Positive = Annotated[int, by(Fields.whole, 1, _COUNT)]


def _block_sizes(fields: Fields) -> dict[str, tuple[int, ...]]:
    return {stage: fields.wholes(stage, 1, _WIDTH, _MOST_SIZES) for stage in STAGES if stage in fields}


@dataclass(frozen=True)
class CalibrationSpec:
    """Where the ranges of int8 activations come from."""

    method: Annotated[str, Fields.text]
    """How a range was read from what was seen, such as "minmax" or "mse"."""
    texts: Annotated[tuple[str, ...], by(Fields.texts, 10_000)]
    """Names of the texts; the package's own begin with "bundled:"."""
    windows: _Positive
    """Windows that were read, each from BOS."""
    window_bytes: _Positive
    seed: Annotated[int, by(Fields.whole, 0, _COUNT)]
    """What chose them."""
    smooth: Annotated[float | None, Fields.number_or_none] = None
    """Strength with which activations' ranges were moved into weights before; None = not."""


@dataclass(frozen=True)
class QuantizationSpec:
    """How the integers in the graphs were found."""

    search: Annotated[str, by(Fields.choice, SEARCHES)]
    """How weight scales were found: "mse" or "rtn"."""
    block_size: Annotated[int | None, by(Fields.whole_or_none, 1, _WIDTH)]
    """Inputs that share a weight scale in int8w and int4 stages, the most where they differ; None when no
    stage is one."""
    calibration: Annotated[CalibrationSpec | None, by(Fields.part_or_none, record(CalibrationSpec))]
    """None when no stage has int8 activations."""
    block_sizes: Annotated[dict[str, tuple[int, ...]] | None, if_there(by(Fields.part, _block_sizes))] = None
    """The sizes by stage, ascending; None when `block_size` is that of every matrix in blocks."""

    @classmethod
    def of(
        cls, search: str, sizes: dict[str, tuple[int, ...]], calibration: CalibrationSpec | None
    ) -> QuantizationSpec:
        """Of stages whose matrices have blocks of these sizes."""
        used = {size for each in sizes.values() for size in each}
        return cls(search, max(used, default=None), calibration, sizes if len(used) > 1 else None)
