"""Checkpoint to bundle: the four graphs, the embedding tables and the manifest, written as one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from ..graphs.config import ModelConfig, parse_config
from ..graphs.latent import patch_value_width
from ..graphs.stages import axis_ranges, stage_names, stage_stack
from ..runtime.errors import OptionError
from ..runtime.manifest import Axis, EmbeddingSpec, Manifest, ModelSpec, Source, StageSpec
from .bundle import finish, new_bundle
from .checkpoint import Checkpoint, open_checkpoint
from .stage_files import data_name, graph_name, stage_bytes, write_stage
from .tables import write_tables
from .tensors import EMBEDDING, HASH_EMBEDDING, check_tensors, parameter_counts

__all__ = ["PRECISIONS", "TABLE_DTYPES", "ExportPlan", "export_checkpoint", "plan_export"]

PRECISIONS = ("fp32",)
"""Precisions of the graphs that this version writes."""

TABLE_DTYPES = {"fp16": "float16", "fp32": "float32"}
"""Precisions of the embedding tables."""

# Python, numpy, onnx_ir and the graphs themselves.
_BASE_MEMORY = 160 << 20
_TABLE_BLOCK_MEMORY = 96 << 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write and need."""

    name: str
    """The checkpoint's name."""
    layout: str
    """"huggingface" or "meta"."""
    config: ModelConfig
    """The model."""
    parameters: dict[str, int]
    """Parameters by part: the stages and "tables"."""
    precision: str
    """Precision of the graphs."""
    tables: str
    """"fp16" or "fp32"."""
    graph_bytes: dict[str, int]
    """Weights on disk by stage."""
    table_bytes: int
    """Embedding tables on disk."""
    peak_memory: int
    """Estimated peak of resident memory while exporting, in bytes; mapped files not counted."""

    @property
    def total_bytes(self) -> int:
        """Weights and tables on disk."""
        return sum(self.graph_bytes.values()) + self.table_bytes


def plan_export(source: str, *, precision: str = "fp32", tables: str = "auto") -> ExportPlan:
    """What exporting `source` would write; nothing is written. Raises like `export_checkpoint`."""
    with open_checkpoint(source) as checkpoint:
        return _plan(checkpoint, precision, tables)


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    tables: str = "auto",
    context: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the bundle directory `output` from a checkpoint folder, a hub id or "demo"; returns it.

    tables: fp32, fp16, or auto = fp16 unless the checkpoint's own tables are float32. context: ids of a
    scoring window, None takes the config's. force: replace an existing bundle. progress(what, bytes
    done, bytes in all), of the writing and then of the hashing. The directory appears whole or not at all.

    Raises CheckpointError, ConfigError, OptionError, or BltError (existing output, disk full).
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(source))
        plan = _plan(checkpoint, precision, tables)
        trained = _context(context, plan.config)
        directory = stack.enter_context(new_bundle(output, force=force, needed=plan.total_bytes))
        meter = _Meter(progress, plan.total_bytes)
        for stage in plan.graph_bytes:
            write_stage(directory, plan.config, stage, checkpoint, meter.of(f"{stage} graph"))
        written = meter.up_to("embedding tables")
        tables_path = directory / "tables.bin"
        spec = write_tables(tables_path, checkpoint, plan.config, TABLE_DTYPES[plan.tables], written)
        finish(
            directory,
            _manifest(checkpoint, plan, trained, spec),
            partial(progress, "hashes") if progress else None,
        )
    return Path(output)


def _plan(checkpoint: Checkpoint, precision: str, tables: str) -> ExportPlan:
    if precision not in PRECISIONS:
        raise OptionError(f"precision: got {precision!r}, this version writes {' or '.join(PRECISIONS)}")
    config = parse_config(checkpoint.config)
    check_tensors(checkpoint, config)
    kind = _table_kind(checkpoint, tables)
    sizes = {stage: stage_bytes(config, stage) for stage in stage_names(config)}
    parameters = parameter_counts(config)
    item = 2 if kind == "fp16" else 4
    # The largest weight is held as it is read, joined and transposed, and once more as it is written.
    peak = _BASE_MEMORY + max(_TABLE_BLOCK_MEMORY, 3 * max(largest for _, largest in sizes.values()))
    return ExportPlan(
        name=checkpoint.name,
        layout=checkpoint.layout,
        config=config,
        parameters=parameters,
        precision=precision,
        tables=kind,
        graph_bytes={stage: total for stage, (total, _) in sizes.items()},
        table_bytes=item * parameters["tables"],
        peak_memory=peak,
    )


def _table_kind(checkpoint: Checkpoint, tables: str) -> str:
    if tables == "auto":
        wide = {checkpoint.dtype(EMBEDDING), checkpoint.dtype(HASH_EMBEDDING)} == {"float32"}
        return "fp32" if wide else "fp16"
    if tables not in TABLE_DTYPES:
        raise OptionError(f"tables: got {tables!r}, allowed are auto, {', '.join(TABLE_DTYPES)}")
    return tables


def _context(context: int | None, config: ModelConfig) -> int:
    size = config.trained_context if context is None else context
    if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= _max_positions(config):
        raise OptionError(
            f"context: got {size!r}, a whole number from 2 to {_max_positions(config)} is needed"
        )
    return size


def _max_positions(config: ModelConfig) -> int:
    return min(config.encoder.max_positions, config.decoder.max_positions)


def _manifest(checkpoint: Checkpoint, plan: ExportPlan, context: int, tables: EmbeddingSpec) -> Manifest:
    config = plan.config
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
        stages={stage: _stage_spec(plan, stage) for stage in plan.graph_bytes},
        axes={name: Axis(**asdict(size)) for name, size in axis_ranges(config).items()},
        validation=None,
        files={},
    )


def _stage_spec(plan: ExportPlan, stage: str) -> StageSpec:
    stack = stage_stack(plan.config, stage)
    return StageSpec(
        file=graph_name(stage),
        data=data_name(stage),
        precision=plan.precision,
        layers=stack.layers,
        kv_heads=stack.kv_heads,
        head_dim=stack.head_dim,
        window=stack.window,
        max_positions=stack.max_positions,
        parameters=plan.parameters[stage],
        patch_values=patch_value_width(plan.config) if stage in ("latent", "decoder") else None,
    )


class _Meter:
    """Adds up what the parts have written, for one progress display."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def of(self, what: str) -> Callable[[int], None]:
        """A callback for one part: bytes written since its last call."""

        def advance(count: int) -> None:
            self._done += count
            if self._progress is not None:
                self._progress(what, min(self._done, self._total), self._total)

        return advance

    def up_to(self, what: str) -> Callable[[int, int], None]:
        """A callback for one part that reports (bytes written of the part, bytes of the part)."""
        advance, before = self.of(what), self._done

        def reached(done: int, _all: int) -> None:
            advance(before + done - self._done)

        return reached
