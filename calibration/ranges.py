"""The outcome of calibration: one limit for every activation that enters a weight product, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.errors import BltError
from .observers import METHODS, CalibrationError, Observer

__all__ = ["CalibrationRun", "Observations", "Ranges"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CalibrationRun:
    """What was read."""

    texts: tuple[str, ...]
    """Names of the texts."""
    windows: int
    """Windows read, each from BOS."""
    window_bytes: int
    """Bytes of a window."""
    seed: int
    """What chose them."""


@dataclass(frozen=True)
class Ranges:
    """Limits and channel maxima by weight name (the initializer of the product's matrix)."""

    method: str
    """How the limits were chosen, one of `observers.METHODS`."""
    run: CalibrationRun
    """What was read."""
    limits: Mapping[str, float]
    """The magnitude that 127 stands for, > 0, for the activation that meets this weight."""
    channels: Mapping[str, Floats]
    """float32 [K]: the largest magnitude of each channel of that activation."""

    def scale(self, weight: str) -> float:
        """Magnitude at the end of the symmetric int8 grid (its step is this / 127), > 0."""
        return self.limits[self._known(weight)]

    def channel_max(self, weight: str) -> Floats:
        """float32 [K]: the largest magnitude of each channel."""
        return self.channels[self._known(weight)]

    def _known(self, weight: str) -> str:
        if weight not in self.limits:
            raise CalibrationError(f"no range was collected for {weight}; calibrate its stage too")
        return weight

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "method": self.method,
            "run": {**asdict(self.run), "texts": list(self.run.texts)},
            "limits": dict(self.limits),
            "channels": {name: array.tolist() for name, array in self.channels.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Ranges:
        """The inverse of `to_dict`. Raises BltError for anything else."""
        try:
            run = CalibrationRun(**{**raw["run"], "texts": tuple(raw["run"]["texts"])})
            limits = {str(name): float(limit) for name, limit in raw["limits"].items()}
            channels = {str(name): np.asarray(row, np.float32) for name, row in raw["channels"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BltError(f"these are no calibration ranges ({error!r}); calibrate again") from None
        return cls(str(raw.get("method")), run, limits, channels)


@dataclass(frozen=True)
class Observations:
    """Everything a run has seen; every method reads its ranges from here."""

    run: CalibrationRun
    """What was read."""
    observers: Mapping[str, Observer]
    """By weight name, in graph order."""

    def ranges(self, method: str) -> Ranges:
        """Limits by one of `observers.METHODS`."""
        assert method in METHODS, method
        return Ranges(
            method=method,
            run=self.run,
            limits={name: observer.limit(method) for name, observer in self.observers.items()},
            channels={name: observer.channel_max.copy() for name, observer in self.observers.items()},
        )
