"""How the integers of a bundle were found: scales, blocks, and ranges of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .fields import Fields, by, fault, if_there, record
from .names import SEARCHES, STAGES

__all__ = ["CalibrationSpec", "MixSpec", "QuantizationSpec"]

_COUNT = 2**63 - 1
_WIDTH = 1_000_000
_MOST_SIZES = 16
_MOST_MATRICES = 100_000

_Positive = Annotated[int, by(Fields.whole, 1, _COUNT)]


def _share(fields: Fields, key: str) -> float:
    value = fields.number(key)
    if not 0 <= value <= 1:
        raise fault(fields.path(key), value, "a number from 0 to 1")
    return value


_Share = Annotated[float, _share]


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
class MixSpec:
    """Which matrices of a patcher a search put in 4 bits, and what that was found by."""

    int4: Annotated[tuple[str, ...], by(Fields.texts, _MOST_MATRICES)]
    """Names of the weights in 4 bits, in the graph's order; with any the patcher is int4, else int8w."""
    int8w: Annotated[tuple[str, ...], by(Fields.texts, _MOST_MATRICES)]
    """Those in 8."""
    target: _Share
    """Share of patch boundaries that was asked for."""
    boundaries: _Share
    """Share that float32 has, too, in the windows of the texts that had no say."""
    texts: Annotated[tuple[str, ...], by(Fields.texts, 10_000)]
    """Names of the texts; the package's own begin with "bundled:"."""
    windows: _Positive
    """Windows that were read, each from BOS: one half found the mix, the other confirmed it."""
    window_bytes: _Positive
    seed: Annotated[int, by(Fields.whole, 0, _COUNT)]
    """What chose them."""


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

    mix: Annotated[MixSpec | None, if_there(by(Fields.part, record(MixSpec)))] = None
    """Of a patcher that was searched; None where each stage has one precision throughout."""

    @classmethod
    def of(
        cls,
        search: str,
        sizes: dict[str, tuple[int, ...]],
        calibration: CalibrationSpec | None,
        mix: MixSpec | None,
    ) -> QuantizationSpec:
        """Of stages whose matrices have blocks of these sizes."""
        used = {size for each in sizes.values() for size in each}
        return cls(search, max(used, default=None), calibration, sizes if len(used) > 1 else None, mix)
