"""Chunks in products of integers, for an engine of ONNX Runtime that is there: graphs, a proof, or nothing.

The engine's own graphs stay as they are and go on running steps and drafts. What is added takes over where a
pass brings more rows, and is compared with them there. `operators` says whether the products are exact here;
what rounding to whole integers costs in text, `score` and `validate` tell, which read chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..graphs.attention import fuse_attention
from ..graphs.prefill_products import write_prefill_products
from ..graphs.surgery import foreign_graph
from ..runtime.backends.ort import OrtStage
from ..runtime.backends.ort_session import import_onnxruntime
from ..runtime.engines import engine_limits, graph_file, prefill_files
from ..runtime.errors import BackendError, OptionError
from ..runtime.fields import shown
from ..runtime.files import clear_abandoned, scratch
from ..runtime.manifest import Manifest
from ..runtime.names import BLOCK_PRECISIONS, prefill_graph_file
from .bundle import check_one_name, graph_name, load_stage, save_stage
from .operators import multiplies_integers, prefill_bits, save_for_prefill, window_offset
from .proof import prove_engine

__all__ = ["add_prefill", "check_prefill", "prefill_bytes", "rotation_bytes"]

_BLOCKS = ", ".join(BLOCK_PRECISIONS)


def check_prefill(manifest: Manifest, wanted: Iterable[str]) -> tuple[str, ...]:
    """The stages meant, in their order; ("all",) are those with weights in blocks.

    Raises OptionError for what is no stage of the bundle, or one without weights in blocks.
    """
    able = [stage for stage in manifest.stages if _in_blocks(manifest, stage)]
    named: list[Any] = list(wanted) if isinstance(wanted, (tuple, list)) else [wanted]
    if named == ["all"]:
        named = able
        if not able:
            raise OptionError(
                f"int8 prefill: no stage of this bundle has weights in blocks ({_BLOCKS}); "
                "quantize it to int4 or int8w first"
            )
    for stage in named:
        if not isinstance(stage, str) or stage not in manifest.stages:
            allowed = ", ".join([*manifest.stages, "all"])
            raise OptionError(f"int8 prefill: got {shown(stage)}, allowed are {allowed}")
        if stage not in able:
            raise OptionError(
                f"int8 prefill: the {stage} is {manifest.stages[stage].precision}, and only weights in "
                f"blocks ({_BLOCKS}) are read so; "
                + (f"name {' and '.join(able)}" if able else "quantize the bundle to int4 or int8w first")
            )
    return tuple(stage for stage in manifest.stages if stage in named)


def prefill_bytes(manifest: Manifest, stages: Iterable[str]) -> int:
    """Disk that the graphs of these stages take: a byte for each weight, and their rotations."""
    return sum(manifest.stages[stage].parameters + rotation_bytes(manifest, stage) for stage in stages)


def rotation_bytes(manifest: Manifest, stage: str) -> int:
    """Of cosines and sines of every position, float32, half a head wide each: in every fused graph."""
    return 4 * manifest.model.max_positions * manifest.stages[stage].head_dim


def _in_blocks(manifest: Manifest, stage: str) -> bool:
    return any(word in BLOCK_PRECISIONS for word in manifest.precisions_of(stage))


def add_prefill(
    directory: Path,
    manifest: Manifest,
    engine: Path,
    stages: Collection[str],
    watch: Callable[[str], None] = lambda what: None,
) -> None:
    """Write what the engine of the bundle in `directory` lacks so that `stages` read chunks in int8, proven.

    watch(what is done). Peak memory is that of the largest matrix in float32, and of a load of the stage.

    Raises BackendError where ONNX Runtime has no such products or they are inexact here, WrongEngineError
    where a stage computes something else than the engine's own graph, WriteError or OSError (disk full);
    nothing is left then.
    """
    if not stages:
        return
    if not multiplies_integers():
        raise BackendError(
            f"int8 prefill: products of integers are inexact in ONNX Runtime "
            f"{import_onnxruntime().__version__} on this processor, or missing; leave --int8-prefill out"
        )
    # While a stage is written its weights lie there twice.
    sizes = [prefill_bytes(manifest, [stage]) for stage in stages]
    clear_abandoned(engine)
    with scratch(engine, "partial", "int8 prefill", sum(sizes) + max(sizes)) as folder:
        for stage in (each for each in manifest.stages if each in stages):
            watch(f"{stage} graph for chunks")
            _write(directory, manifest, stage, folder)

        def own(stage: str, *, prefill: bool = False) -> OrtStage:
            graph = folder / prefill_graph_file(stage) if prefill else None
            optimized = engine / graph_file(stage)
            return OrtStage(directory, manifest, stage, None, optimized=optimized, prefill=graph)

        prove_engine(
            directory,
            manifest,
            partial(own, prefill=True),
            engine_limits(manifest),
            None,
            name=f"ONNX Runtime {import_onnxruntime().__version__} with int8 prefill",
            alike=False,
            watch=lambda stage: watch(f"proving the {stage} graph for chunks"),
            reference=own,
            int8_prefill=stages,
        )
        for name in prefill_files(stages):
            (folder / name).replace(engine / name)


def _write(directory: Path, manifest: Manifest, stage: str, folder: Path) -> None:
    spec, offset = manifest.stages[stage], window_offset()
    model = load_stage(directory, spec)
    check_one_name((directory / spec.data).resolve())
    with foreign_graph(directory / spec.file):
        if spec.fusable and offset is not None:
            fuse_attention(model, spec, offset)
        write_prefill_products(model, prefill_bits())
    with TemporaryDirectory(dir=folder) as name:
        weights = Path(name)
        save_stage(weights, stage, model, lambda _count: None)
        graph = (weights / graph_name(stage)).read_bytes()
        save_for_prefill(graph, weights, folder / prefill_graph_file(stage))
