"""How the integers of a bundle are found: the options that export and quantize share.

Bundle to bundle: a float32 bundle's graphs and tables at lower precision, weights streamed one by one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..calibration.collect import (
    DEFAULT_METHOD,
    DEFAULT_WINDOWS,
    check_method,
    check_texts,
    collect_observations,
)
from ..calibration.observers import Ranges
from ..calibration.smooth import check_strength, find_smoothing
from ..graphs.precision import check_block_size, format_precision, needs_ranges, parse_precision
from ..graphs.quantize import ActivationRanges, Recipe, WeightFactors, rewrite_stage
from ..runtime.errors import OptionError
from ..runtime.integrity import check_files
from ..runtime.manifest import (
    CalibrationSpec,
    EmbeddingSpec,
    Manifest,
    QuantizationSpec,
    StageSpec,
    load_manifest,
)
from ..runtime.names import BLOCK_PRECISIONS, SEARCHES
from .bundle import Meter, Progress, finish, new_bundle
from .stage_files import data_name, graph_name, load_stage, save_stage, saved_bytes
from .tables import requantize_tables, table_dtype

__all__ = ["AnyRange", "QuantizationOptions", "calibrated", "quantize_bundle"]


@dataclass(frozen=True)
class QuantizationOptions:
    """How weights and activations become integers."""

    block_size: int = 32
    """Inputs that share a weight scale in int8w and int4 stages."""
    search: str = "mse"
    """How weight scales are found: one of `names.SEARCHES`."""
    texts: tuple[Path, ...] | None = None
    """Calibration texts; None takes the bundled ones."""
    method: str = DEFAULT_METHOD
    """How ranges are read from what was seen: one of `names.CALIBRATION_METHODS`."""
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

    Options that bring ranges stay as they are. Raises like `collect.collect_observations`.
    """
    if options.ranges is not None:
        return options

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("calibration", done, total)

    stages = [stage for stage, word in precisions.items() if word == "int8"]
    collect = partial(
        collect_observations,
        bundle,
        options.texts,
        windows=options.windows,
        seed=options.seed,
        stages=stages,
        progress=report,
    )
    ranges = collect().ranges(options.method)
    if options.smooth is None:
        return replace(options, ranges=ranges)
    # Limits of activations as smoothing leaves them: the same texts are read again.
    smoothing = find_smoothing(bundle, ranges, strength=options.smooth, stages=stages)
    ranges = collect(divisors=smoothing.divisors).ranges(options.method)
    return replace(options, ranges=ranges, factors=smoothing.factors)


def quantize_bundle(
    bundle: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    tables: str | None = None,
    block_size: int = 32,
    search: str = "mse",
    calibration: Sequence[str | Path] | None = None,
    calibration_method: str = DEFAULT_METHOD,
    windows: int = DEFAULT_WINDOWS,
    smooth: float | None = None,
    ranges: Ranges | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write `output`, the float32 bundle `bundle` at another precision; returns it.

    precision: see `precision.parse_precision`. tables: fp32, fp16, int8 or int4; None keeps what they are.
    calibration: texts for int8 activations, None takes the bundled ones; ranges: collected before, instead.
    The others are the fields of `QuantizationOptions`. force: replace an existing bundle. progress(what,
    done, in all). The directory appears whole or not at all; peak memory is a few times the largest weight.

    Raises OptionError (options, texts, a bundle whose stages are quantized already, nothing to change, an
    output that is the bundle itself), BundleError, or BltError (existing output, disk full, a weight beyond
    float16, no usable range).
    """
    texts = None if calibration is None else tuple(Path(text) for text in calibration)
    options = QuantizationOptions(
        block_size, search, texts, calibration_method, windows, seed, smooth, ranges
    )
    options.check()
    source = Path(bundle)
    manifest = load_manifest(source)
    precisions = parse_precision(precision, list(manifest.stages))
    _check_source(source, manifest, precisions, tables)
    _check_apart(source, Path(output))
    if options.ranges is None:
        check_texts(options.texts, options.windows, manifest.model.trained_context, options.seed)
    check_files(source, manifest)
    sizes = {stage: _planned_bytes(source, manifest, stage, precisions, options) for stage in manifest.stages}
    target = _table_target(manifest.embedding, tables)
    total = sum(sizes.values()) + target.bytes
    with new_bundle(output, force=force, needed=total) as directory:
        if needs_ranges(precisions):
            options = calibrated(source, precisions, options, progress)
        meter = Meter(progress, total)
        for stage, spec in manifest.stages.items():
            model = _load(source, spec)
            rewrite_stage(model, options.recipe(precisions[stage]))
            save_stage(directory, stage, model, meter.of(f"{stage} graph"))
        written = meter.up_to("embedding tables")
        path = directory / target.file
        embedding = requantize_tables(source, manifest.embedding, path, target.dtype, written)
        changed = _changed(manifest, precisions, embedding, options)
        finish(directory, changed, partial(progress, "hashes") if progress else None)
    return Path(output)


def _check_source(
    source: Path, manifest: Manifest, precisions: Mapping[str, str], tables: str | None
) -> None:
    quantized = {name: spec.precision for name, spec in manifest.stages.items() if spec.precision != "fp32"}
    if quantized:
        raise OptionError(
            f"{source} is quantized already ({format_precision(quantized)}); "
            "give the float32 bundle it was made from"
        )
    unchanged = tables is None or table_dtype(tables) == manifest.embedding.dtype
    if set(precisions.values()) == {"fp32"} and unchanged:
        raise OptionError(f"{source} has this precision and these tables already: nothing to change")


def _check_apart(source: Path, output: Path) -> None:
    # Even with `force`: no way leads back from integers to the weights they were made from.
    final = Path(os.path.abspath(output))  # noqa: PTH100 - as in `new_bundle`
    if final.exists() and final.samefile(source):
        raise OptionError(
            f"output {output} is the bundle that is read, and would be lost; give the name of a new directory"
        )


def _planned_bytes(
    source: Path, manifest: Manifest, stage: str, precisions: Mapping[str, str], options: QuantizationOptions
) -> int:
    # Whatever cannot be rewritten is refused here, before minutes of calibration.
    model = _load(source, manifest.stages[stage])
    rewrite_stage(model, options.recipe(precisions[stage], AnyRange()))
    return saved_bytes(model)


def _table_target(spec: EmbeddingSpec, tables: str | None) -> EmbeddingSpec:
    return replace(spec, file="tables.bin", dtype=spec.dtype if tables is None else table_dtype(tables))


def _changed(
    manifest: Manifest,
    precisions: Mapping[str, str],
    embedding: EmbeddingSpec,
    options: QuantizationOptions,
) -> Manifest:
    stages = {
        stage: replace(spec, file=graph_name(stage), data=data_name(stage), precision=precisions[stage])
        for stage, spec in manifest.stages.items()
    }
    return replace(
        manifest,
        stages=stages,
        embedding=embedding,
        validation=None,
        files={},
        quantization=options.spec(precisions),
    )


# Reading a stage's graph, with weights that are read when they are written.


def _load(source: Path, spec: StageSpec) -> ir.Model:
    model = load_stage(source, spec)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _lazy(value.const_value)
    return model


def _lazy(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    def load() -> ir.TensorProtocol:
        # A copy, so that the mapped file can go: its pages would count as this process's memory.
        values = np.array(tensor.numpy())
        tensor.release()
        return ir.tensor(values, name=tensor.name)

    return ir.LazyTensor(load, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name)
