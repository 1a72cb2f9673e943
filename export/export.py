"""Checkpoint to bundle: the four graphs, the embedding tables and the manifest, written as one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from ..calibration.collect import check_texts
from ..graphs.config import ModelConfig, parse_config
from ..graphs.precision import needs_ranges, parse_precision
from ..graphs.stages import axis_ranges, patch_value_width, stage_names, stage_stack
from ..runtime.embedding_spec import EmbeddingSpec
from ..runtime.errors import OptionError
from ..runtime.files import scratch
from ..runtime.generation_spec import GenerationSpec
from ..runtime.manifest import Manifest, ModelSpec, Source, StageSpec
from ..runtime.names import CHAT_TEMPLATE_NAME
from ..runtime.quantization_spec import QuantizationSpec
from .bundle import Meter, Progress, checkpoint_stage, data_name, finish, graph_name, new_bundle
from .chat_template import NO_TEMPLATE, ChatPlan, find_chat_template
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint_base import EMBEDDING, HASH_EMBEDDING, check_tensors, parameter_counts
from .packed import check_rows, write_packed
from .quantize import QuantizationOptions, StagePlan, calibrated, plan_stages, write_stages
from .tables import table_dtype, table_spec, write_tables

__all__ = ["ExportPlan", "export_checkpoint", "plan_export"]

# Python, numpy, onnx_ir and the graphs themselves.
_BASE_MEMORY = 160 << 20
_TABLE_BLOCK_MEMORY = 96 << 20


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write and need."""

    name: str
    """The checkpoint's."""
    layout: str
    """"huggingface" or "meta"."""
    generation: GenerationSpec
    """How it is meant to generate."""
    chat: ChatPlan | None
    """Its chat template, None where it gets none."""
    folder: Path
    """The checkpoint's: of a hub id, the fetched files'."""
    config: ModelConfig
    parameters: dict[str, int]
    """Parameters by part: the stages and "tables"."""
    precision: str
    """Precision of the graphs as it was asked for: a word or a list of stages."""
    precisions: dict[str, str]
    """Precision of each stage's graph."""
    tables: str
    """Precision of the embedding tables: "fp16", "fp32", "int8" or "int4"."""
    stages: dict[str, StagePlan]
    """What each stage's graph will be."""
    table_bytes: int
    """Embedding tables on disk."""
    peak_memory: int
    """Estimated peak of resident memory while exporting, in bytes; mapped files not counted."""
    quantization: QuantizationSpec | None
    """How its integers will be found, but for ranges that are still to be collected."""

    @property
    def graph_bytes(self) -> dict[str, int]:
        """Weights on disk by stage."""
        return {stage: plan.bytes for stage, plan in self.stages.items()}

    @property
    def total_bytes(self) -> int:
        """Weights and tables on disk."""
        return sum(self.graph_bytes.values()) + self.table_bytes


def plan_export(
    source: str,
    *,
    precision: str = "fp32",
    tables: str = "auto",
    quantization: QuantizationOptions | None = None,
    chat_template: str | Path | None = None,
) -> ExportPlan:
    """What exporting `source` would write; nothing is written. Raises like `export_checkpoint`."""
    with open_checkpoint(source) as checkpoint:
        return _plan(checkpoint, precision, tables, quantization or QuantizationOptions(), chat_template)


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    tables: str = "auto",
    context: int | None = None,
    quantization: QuantizationOptions | None = None,
    rows: tuple[int, ...] = (),
    chat_template: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the bundle directory `output` from a checkpoint folder, a hub id or "demo"; returns it.

    precision: see `precision.parse_precision`; quantization: how integers are found, None takes the defaults.
    Where activations are quantized and it brings no ranges, a float32 bundle is written beside the output,
    calibrated, and removed.
    tables: fp32, fp16, int8, int4, or auto = int8 where a stage becomes integers, else fp16 unless the
    checkpoint's own tables are float32. context: ids of a scoring window, None takes the config's. rows: for
    how many texts at once to write packed graphs, each 2 to MOST_ROWS. chat_template: a file that becomes the
    bundle's, "none" for a bundle without one; None takes the checkpoint's own where there is one. force:
    replace an existing bundle. progress(what, bytes done, bytes in all), of the writing and then of the
    hashing. The directory appears whole or not at all.

    Raises CheckpointError, ConfigError, OptionError, or BltError (existing output, disk full).
    """
    options, rows = quantization or QuantizationOptions(), check_rows(rows)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(source))
        plan = _plan(checkpoint, precision, tables, options, chat_template)
        trained = _context(context, plan.config)
        directory = stack.enter_context(new_bundle(output, force=force, needed=plan.total_bytes))
        if needs_ranges(plan.precisions) and options.ranges is None:
            # On the output's disk: a bundle of gigabytes may not fit where temporary files usually go.
            with scratch(Path(output).absolute(), "calibration") as folder:
                # With the checkpoint's own tables, as a float32 bundle that `quantize` starts from has.
                bundle = export_checkpoint(
                    source, folder / "fp32", chat_template=NO_TEMPLATE, progress=progress
                )
                options = calibrated(bundle, plan.precisions, options, progress)
        meter = Meter(progress, plan.total_bytes)
        open_stage = partial(checkpoint_stage, checkpoint, plan.config)
        write_stages(directory, plan.precisions, options, open_stage, meter)
        write_packed(directory, plan.precisions, rows)
        written, dtype = meter.up_to("embedding tables"), table_dtype(plan.tables)
        spec = write_tables(directory / "tables.bin", checkpoint, plan.config, dtype, written)
        if plan.chat is not None:
            (directory / CHAT_TEMPLATE_NAME).write_bytes(plan.chat.text.encode())
        manifest = replace(_manifest(checkpoint, plan, trained, spec, options), rows=rows)
        finish(directory, manifest, partial(progress, "hashes") if progress else None)
    return Path(output)


def _plan(
    checkpoint: Checkpoint,
    precision: str,
    tables: str,
    options: QuantizationOptions,
    chat_template: str | Path | None,
) -> ExportPlan:
    config = parse_config(checkpoint.config)
    precisions = parse_precision(precision, stage_names(config))
    options.check()
    if options.target_boundaries is not None:
        raise OptionError(
            "target boundaries: a mix is searched in a float32 bundle; export one, and quantize that"
        )
    if options.ranges is None:
        check_texts(options.texts, options.windows, _context(None, config), options.seed)
    check_tensors(checkpoint, config)
    kind = _table_kind(checkpoint, tables, set(precisions.values()))
    stages = plan_stages(precisions, options, partial(checkpoint_stage, checkpoint, config))
    # The largest weight is held as it is read, joined and transposed, and once more as it is written.
    peak = _BASE_MEMORY + max(_TABLE_BLOCK_MEMORY, 3 * max(plan.largest for plan in stages.values()))
    return ExportPlan(
        name=checkpoint.name,
        layout=checkpoint.layout,
        generation=checkpoint.generation,
        chat=find_chat_template(checkpoint.folder, chat_template),
        folder=checkpoint.folder,
        config=config,
        parameters=parameter_counts(config),
        precision=precision,
        precisions=precisions,
        tables=kind,
        stages=stages,
        table_bytes=table_spec(config, table_dtype(kind)).bytes,
        peak_memory=peak,
        quantization=options.spec(precisions, stages),
    )


def _table_kind(checkpoint: Checkpoint, tables: str, words: set[str]) -> str:
    if tables == "auto":
        if words - {"fp32", "fp16"}:  # integers in the stages: in the tables too, as `quantize` does
            return "int8"
        wide = {checkpoint.dtype(EMBEDDING), checkpoint.dtype(HASH_EMBEDDING)} == {"float32"}
        return "fp32" if wide else "fp16"
    table_dtype(tables)
    return tables


def _context(context: int | None, config: ModelConfig) -> int:
    size, most = config.trained_context if context is None else context, _max_positions(config)
    if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= most:
        raise OptionError(f"context: got {size!r}, a whole number from 2 to {most} is needed")
    return size


def _max_positions(config: ModelConfig) -> int:
    return min(config.encoder.max_positions, config.decoder.max_positions)


def _manifest(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    context: int,
    tables: EmbeddingSpec,
    options: QuantizationOptions,
) -> Manifest:
    config = plan.config
    stages = {}
    for stage, precision in plan.precisions.items():
        stack = stage_stack(config, stage)
        stages[stage] = StageSpec(
            file=graph_name(stage),
            data=data_name(stage),
            precision=precision,
            layers=stack.layers,
            kv_heads=stack.kv_heads,
            head_dim=stack.head_dim,
            window=stack.window,
            max_positions=stack.max_positions,
            parameters=plan.parameters[stage],
            patch_values=patch_value_width(config) if stage in ("latent", "decoder") else None,
        )
    return Manifest(
        generator=version("blt-edge"),
        source=Source(checkpoint.name, checkpoint.layout, checkpoint.sha256(), checkpoint.config),
        model=ModelSpec(
            vocab_size=config.vocab_size,
            width=config.encoder.width,
            cross_attn_k=config.cross_attn_k,
            max_positions=_max_positions(config),
            trained_context=context,
            parameters={part: count for part, count in plan.parameters.items() if count},
        ),
        patching=config.patching,
        embedding=tables,
        stages=stages,
        generation=plan.generation,
        chat=None if plan.chat is None else plan.chat.spec,
        axes=axis_ranges(config),
        files={},
        quantization=options.spec(plan.precisions, plan.stages),
    )
