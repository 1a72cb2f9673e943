"""Bundle to bundle: a float32 bundle's graphs and tables at lower precision, weights streamed one by one.

How the integers are found is said by the options that `quantize` and `export` share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

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
from ..graphs.precision import check_block_size, format_precision, parse_precision
from ..graphs.quantize import ActivationRanges, Recipe, WeightFactors, block_sizes, rewrite_stage
from ..graphs.surgery import foreign_graph
from ..runtime.embedding_spec import EmbeddingSpec
from ..runtime.errors import OptionError
from ..runtime.files import read_plain, scratch
from ..runtime.integrity import check_files
from ..runtime.manifest import Manifest, load_manifest
from ..runtime.names import BLOCK_PRECISIONS, CHAT_TEMPLATE_NAME, SEARCHES
from ..runtime.quantization_spec import CalibrationSpec, MixSpec, QuantizationSpec
from .bundle import (
    Meter,
    Progress,
    bundle_stage,
    data_name,
    finish,
    graph_name,
    new_bundle,
    planned_bytes,
    save_stage,
)
from .packed import write_packed
from .patcher_mix import MixTexts, Tell, check_mix, check_target, find_mix
from .tables import requantize_tables, table_dtype

__all__ = [
    "OpenStage",
    "QuantizationOptions",
    "StagePlan",
    "calibrated",
    "plan_stages",
    "quantize_bundle",
    "write_stages",
]

OpenStage = Callable[[str], ir.Model]
"""A stage's float32 graph, new each time, over weights that are read when they are written."""


@dataclass(frozen=True)
class QuantizationOptions:
    """How weights and activations become integers."""

    block_size: int | None = None
    """Inputs that share a weight scale in int8w and int4 stages; None goes by the matrix
    (`precision.block_size_for`)."""
    search: str = "mse"
    """How weight scales are found: one of `names.SEARCHES`."""
    texts: Sequence[str | Path] | None = None
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
    target_boundaries: float | None = None
    """Share of patch boundaries that a patcher in int8w or int4 must have in common with float32, from the
    texts: a search puts as much of it in 4 bits as that allows. None does not search."""
    mix: MixSpec | None = None
    """What that search found."""

    @property
    def mix_texts(self) -> MixTexts:
        """What a search for a mix reads."""
        return MixTexts(self.texts, self.windows, self.seed)

    def check(self) -> None:
        """Raises OptionError for a value that is not allowed."""
        check_block_size(self.block_size)
        if self.search not in SEARCHES:
            raise OptionError(f"search: got {self.search!r}, allowed are {', '.join(SEARCHES)}")
        check_method(self.method)
        if self.target_boundaries is not None:
            check_target(self.target_boundaries)
        if self.smooth is not None:
            check_strength(self.smooth)
            if self.ranges is not None and not self.factors:
                raise OptionError("smoothing: ranges were given, smoothing has to collect its own; drop one")

    def recipe(self, precision: str, ranges: ActivationRanges | None = None) -> Recipe:
        """The recipe for a stage of this precision; `ranges` stand in where none were collected."""
        factors = self.factors if precision == "int8" else {}
        wider = frozenset(self.mix.int8w) if self.mix is not None else frozenset()
        return Recipe(precision, self.block_size, self.search, self.ranges or ranges, factors, wider)

    def spec(self, precisions: Mapping[str, str], plans: Mapping[str, StagePlan]) -> QuantizationSpec | None:
        """What the manifest says of it; None when no stage holds integers."""
        words = set(precisions.values())
        if not words & {"int8", *BLOCK_PRECISIONS}:
            return None
        calibration = None
        if "int8" in words and self.ranges is not None:
            calibration = CalibrationSpec(self.ranges.method, **asdict(self.ranges.run), smooth=self.smooth)
        sizes = {stage: plan.block_sizes for stage, plan in plans.items() if plan.block_sizes}
        return QuantizationSpec.of(self.search, sizes, calibration, self.mix)


@dataclass(frozen=True)
class StagePlan:
    """What a stage will be at its precision."""

    bytes: int
    """Weights on disk."""
    largest: int
    """Bytes of its largest float32 weight."""
    block_sizes: tuple[int, ...]
    """How many inputs share a scale in its matrices, each number once, ascending; empty without blocks."""


class _AnyRange:
    """Stands in for ranges where a graph is rewritten only to see whether it can be and its size."""

    def scale(self, weight_name: str) -> float:
        return 1.0


def calibrated(
    bundle: Path, precisions: Mapping[str, str], options: QuantizationOptions, progress: Progress | None
) -> QuantizationOptions:
    """The options with ranges of a float32 bundle, collected for its stages that will be int8.

    Options that bring ranges, or need none, stay as they are. Raises like `collect.collect_observations`.
    """
    stages = [stage for stage, word in precisions.items() if word == "int8"]
    if options.ranges is not None or not stages:
        return options
    collect = partial(
        collect_observations,
        bundle,
        options.texts,
        windows=options.windows,
        seed=options.seed,
        stages=stages,
        progress=partial(progress, "calibration") if progress else None,
    )
    ranges = collect().ranges(options.method)
    if options.smooth is None:
        return replace(options, ranges=ranges)
    # Limits of activations as smoothing leaves them: the same texts are read again.
    smoothing = find_smoothing(bundle, ranges, strength=options.smooth, stages=stages)
    ranges = collect(divisors=smoothing.divisors).ranges(options.method)
    return replace(options, ranges=ranges, factors=smoothing.factors)


def plan_stages(
    precisions: Mapping[str, str], options: QuantizationOptions, open_stage: OpenStage
) -> dict[str, StagePlan]:
    """What each stage will be at these precisions.

    Raises OptionError for a graph that can't be rewritten so: before minutes of calibration.
    """
    plans = {}
    for stage, precision in precisions.items():
        model, recipe = open_stage(stage), options.recipe(precision, _AnyRange())
        sizes = tuple(sorted(set(block_sizes(model.graph, recipe).values())))
        plans[stage] = StagePlan(*planned_bytes(model, recipe), sizes)
    return plans


def write_stages(
    directory: Path,
    precisions: Mapping[str, str],
    options: QuantizationOptions,
    open_stage: OpenStage,
    meter: Meter,
) -> None:
    """Write the graphs and weights of all stages. Raises like `rewrite_stage`, and OSError."""
    for stage, precision in precisions.items():
        model = open_stage(stage)
        rewrite_stage(model, options.recipe(precision))
        save_stage(directory, stage, model, meter.of(f"{stage} graph"))


def quantize_bundle(
    bundle: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    tables: str | None = None,
    quantization: QuantizationOptions | None = None,
    force: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Path:
    """Write `output`, the float32 bundle `bundle` at another precision; returns it.

    precision: see `precision.parse_precision`. tables: fp32, fp16, int8 or int4; None keeps what they are.
    Packed graphs are written for as many texts at once as the bundle has them.
    quantization: how integers are found, None takes the defaults. force: replace an existing bundle.
    progress(what, done, in all); tell(figures) of each mix that a search for `target_boundaries` measured.
    The directory appears whole or not at all; peak memory is a few times the largest weight, and with such a
    search the patcher's own, twice.

    Raises OptionError (options, texts, a bundle whose stages are quantized already, nothing to change, an
    output that is the bundle itself), BundleError, or BltError (existing output, disk full, a weight beyond
    float16, no usable range, a target out of reach).
    """
    options = quantization or QuantizationOptions()
    options.check()
    source = Path(bundle)
    manifest = load_manifest(source)
    precisions = parse_precision(precision, list(manifest.stages))
    dtype = manifest.embedding.dtype if tables is None else table_dtype(tables)
    _check_source(source, manifest, Path(output))
    if set(precisions.values()) == {"fp32"} and dtype == manifest.embedding.dtype:
        raise OptionError(f"{source} has this precision and these tables already: nothing to change")
    if options.ranges is None:
        check_texts(options.texts, options.windows, manifest.model.trained_context, options.seed)
    if options.target_boundaries is not None:
        check_mix(manifest, precisions, options.mix_texts)
    check_files(source, manifest)

    def open_stage(stage: str) -> ir.Model:
        return bundle_stage(source, manifest.stages[stage])

    with foreign_graph(f"{source}: a stage"):
        planned = plan_stages(precisions, options, open_stage)
    total = sum(plan.bytes for plan in planned.values()) + replace(manifest.embedding, dtype=dtype).bytes
    # A search has the patcher in both precisions, and a candidate, beside the bundle while it lasts.
    search = 3 * planned["patcher"].bytes if options.target_boundaries is not None else 0
    with new_bundle(output, force=force, needed=total + search) as directory:
        options = calibrated(source, precisions, options, progress)
        if options.target_boundaries is not None:
            precisions, options = _mixed(source, manifest, precisions, options, Path(output), progress, tell)
            with foreign_graph(f"{source}: a stage"):
                planned = plan_stages(precisions, options, open_stage)
        meter = Meter(progress, total)
        write_stages(directory, precisions, options, open_stage, meter)
        write_packed(directory, precisions, manifest.rows)
        if manifest.chat is not None:
            (directory / CHAT_TEMPLATE_NAME).write_bytes(read_plain(source / CHAT_TEMPLATE_NAME))
        written = meter.up_to("embedding tables")
        embedding = requantize_tables(source, manifest.embedding, directory / "tables.bin", dtype, written)
        changed = _described(manifest, precisions, embedding, options.spec(precisions, planned))
        finish(directory, changed, partial(progress, "hashes") if progress else None)
    return Path(output)


def _described(
    manifest: Manifest,
    precisions: Mapping[str, str],
    embedding: EmbeddingSpec,
    quantization: QuantizationSpec | None,
) -> Manifest:
    """The manifest of the new bundle, but for its files."""
    stages = {
        stage: replace(spec, file=graph_name(stage), data=data_name(stage), precision=precisions[stage])
        for stage, spec in manifest.stages.items()
    }
    return replace(
        manifest, stages=stages, embedding=embedding, validation=(), files={}, quantization=quantization
    )


def _mixed(
    source: Path,
    manifest: Manifest,
    precisions: Mapping[str, str],
    options: QuantizationOptions,
    output: Path,
    progress: Progress | None,
    tell: Tell | None,
) -> tuple[dict[str, str], QuantizationOptions]:
    """The precisions and the options with what a search found for the patcher."""
    target, silent = options.target_boundaries, lambda *_: None
    assert target is not None
    with scratch(output.absolute(), "mix") as folder:
        mix = find_mix(
            source,
            manifest,
            options.recipe("int4"),
            target,
            options.mix_texts,
            folder,
            tell=tell or silent,
            progress=progress or silent,
        )
    return {**precisions, "patcher": "int4" if mix.int4 else "int8w"}, replace(options, mix=mix)


def _check_source(source: Path, manifest: Manifest, output: Path) -> None:
    quantized = {name: spec.precision for name, spec in manifest.stages.items() if spec.precision != "fp32"}
    if quantized:
        raise OptionError(
            f"{source} is quantized already ({format_precision(quantized)}); "
            "give the float32 bundle it was made from"
        )
    # Even with `force`: no way leads back from integers to the weights they were made from.
    final = Path(os.path.abspath(output))  # noqa: PTH100 - as in `new_bundle`
    if final.exists() and final.samefile(source):
        raise OptionError(
            f"output {output} is the bundle that is read, and would be lost; give the name of a new directory"
        )
