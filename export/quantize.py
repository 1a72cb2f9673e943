"""Bundle to bundle: a float32 bundle's graphs and tables at lower precision, weights streamed one by one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..calibration.collect import DEFAULT_METHOD, DEFAULT_WINDOWS, check_texts
from ..calibration.precision import format_precision, needs_ranges, parse_precision
from ..calibration.ranges import Ranges
from ..calibration.rewrite import rewrite_stage
from ..runtime.errors import OptionError
from ..runtime.integrity import check_files
from ..runtime.manifest import EmbeddingSpec, Manifest, StageSpec, load_manifest
from .bundle import finish, new_bundle
from .progress import Meter, Progress
from .quantization import AnyRange, QuantizationOptions, calibrated
from .stage_files import data_name, graph_name, load_stage, save_stage, saved_bytes
from .tables import requantize_tables, table_dtype

__all__ = ["quantize_bundle"]


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
