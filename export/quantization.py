"""How the integers of a bundle are found: the options that export and quantize share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..calibration.collect import DEFAULT_METHOD, DEFAULT_WINDOWS, check_method, collect_ranges
from ..calibration.precision import BLOCK_PRECISIONS, check_block_size
from ..calibration.ranges import Ranges
from ..calibration.rewrite import ActivationRanges, Recipe
from ..calibration.smooth import check_strength, find_smoothing
from ..calibration.weights import SEARCHES, WeightFactors
from ..runtime.errors import OptionError
from ..runtime.specs import CalibrationSpec, QuantizationSpec
from .progress import Progress

__all__ = ["AnyRange", "QuantizationOptions", "calibrated"]


@dataclass(frozen=True)
class QuantizationOptions:
    """How weights and activations become integers."""

    block_size: int = 32
    """Inputs that share a weight scale in int8w and int4 stages."""
    search: str = "mse"
    """How weight scales are found: one of `weights.SEARCHES`."""
    texts: tuple[Path, ...] | None = None
    """Calibration texts; None takes the bundled ones."""
    method: str = DEFAULT_METHOD
    """How ranges are read from what was seen: one of `observers.METHODS`."""
    windows: int = DEFAULT_WINDOWS
    """Windows of the texts that are read."""
    seed: int = 0
    """What chooses them."""
    smooth: float | None = None
    """Strength (0 to 1) with which activations' ranges move into the weights before; None = not at all."""
    ranges: Ranges | None = None
    """Ranges collected before; None collects them where they are needed."""
    factors: Mapping[str, WeightFactors] = field(default_factory=dict)
    """What smoothing multiplies weights and norms with; belongs to `ranges`."""

    def check(self) -> None:
        """Raises OptionError for a value that is not allowed."""
        check_block_size(self.block_size)
        if self.search not in SEARCHES:
            raise OptionError(f"search: got {self.search!r}, allowed are {', '.join(SEARCHES)}")
        check_method(self.method)
        if self.smooth is not None:
            check_strength(self.smooth)
            if self.ranges is not None and not self.factors:
                raise OptionError("smoothing: ranges were given, smoothing has to collect its own; drop one")

    def recipe(self, precision: str, ranges: ActivationRanges | None = None) -> Recipe:
        """The recipe for a stage of this precision; `ranges` stand in where none were collected."""
        factors = self.factors if precision == "int8" else {}
        return Recipe(precision, self.block_size, self.search, self.ranges or ranges, factors)

    def spec(self, precisions: Mapping[str, str]) -> QuantizationSpec | None:
        """What the manifest says of it; None when no stage holds integers."""
        words = set(precisions.values())
        if not words & {"int8", *BLOCK_PRECISIONS}:
            return None
        return QuantizationSpec(self.search, self.block_size, self._calibration(words))

    def _calibration(self, words: Collection[str]) -> CalibrationSpec | None:
        if "int8" not in words or self.ranges is None:
            return None
        run = self.ranges.run
        return CalibrationSpec(
            self.ranges.method, run.texts, run.windows, run.window_bytes, run.seed, self.smooth
        )


class AnyRange:
    """Stands in for ranges where a graph is rewritten only to see whether it can be and its size."""

    def scale(self, weight_name: str) -> float:
        """Any."""
        return 1.0


def calibrated(
    bundle: Path, precisions: Mapping[str, str], options: QuantizationOptions, progress: Progress | None
) -> QuantizationOptions:
    """The options with ranges of a float32 bundle, collected for its stages that will be int8.

    Options that bring ranges stay as they are. Raises like `collect.collect_ranges`.
    """
    if options.ranges is not None:
        return options

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("calibration", done, total)

    stages = [stage for stage, word in precisions.items() if word == "int8"]
    collect = partial(
        collect_ranges,
        bundle,
        options.texts,
        options.method,
        windows=options.windows,
        seed=options.seed,
        stages=stages,
        progress=report,
    )
    ranges = collect()
    if options.smooth is None:
        return replace(options, ranges=ranges)
    # Limits of activations as smoothing leaves them: the same texts are read again.
    smoothing = find_smoothing(bundle, ranges, strength=options.smooth, stages=stages)
    return replace(options, ranges=collect(divisors=smoothing.divisors), factors=smoothing.factors)
