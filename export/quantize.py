"""Bundle to bundle: a float32 bundle's graphs and tables at lower precision, weights streamed one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..calibration.collect import DEFAULT_METHOD, DEFAULT_WINDOWS
from ..calibration.precision import format_precision, needs_ranges, parse_precision
from ..calibration.ranges import Ranges
from ..calibration.rewrite import rewrite_stage
from ..runtime.errors import BundleError, OptionError
from ..runtime.integrity import check_files
from ..runtime.manifest import EmbeddingSpec, Manifest, StageSpec, load_manifest
from .bundle import finish, new_bundle
from .progress import Meter, Progress
from .quantization import AnyRange, QuantizationOptions, calibrated
from .stage_files import data_name, graph_name, save_stage, saved_bytes
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

    Raises OptionError (options, texts, a bundle whose stages are quantized already, nothing to change),
    BundleError, or BltError (existing output, disk full, a weight beyond float16, no usable range).
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
    path = source / spec.file
    try:
        model = ir.load(path)
    except Exception as error:  # a damaged graph can fail in many ways
        raise BundleError(f"{path} is not a graph that can be read ({type(error).__name__})") from error
    end = (source / spec.data).stat().st_size
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        # A graph is untrusted: its weights come from the one file that the manifest lists.
        offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
        inside = tensor.location == spec.data and 0 <= offset <= offset + length <= end
        if not inside or length != tensor.nbytes:
            raise BundleError(
                f"{path}: weight {str(value.name)[:60]!r} does not lie in {spec.data}; "
                "copy the bundle again or export the checkpoint again"
            )
        value.const_value = _lazy(tensor)
    return model


def _lazy(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    def load() -> ir.TensorProtocol:
        # A copy, so that the mapped file can go: its pages would count as this process's memory.
        values = np.array(tensor.numpy())
        tensor.release()
        return ir.tensor(values, name=tensor.name)

    return ir.LazyTensor(load, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name)
