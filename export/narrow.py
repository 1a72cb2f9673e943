"""Caches in 8 bits for an engine of ONNX Runtime that is there: scales, graphs, a proof, or nothing of it.

The engine's own graphs stay as they are and go on reading prompts in chunks; what is added runs steps. It is
compared with those graphs, over caches that hold what 8 bits can hold, so that what differs is the operator's
own rounding of new keys and values. What that costs in text, `score` and `validate` tell.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from ..calibration.caches import cache_scales
from ..graphs.narrow_caches import narrow_caches
from ..runtime.backends.base import StageBackend
from ..runtime.backends.ort import NarrowGraph, OrtStage
from ..runtime.backends.ort_session import import_onnxruntime
from ..runtime.engines import cache_files, engine_limits, graph_file
from ..runtime.errors import BackendError
from ..runtime.manifest import Manifest
from ..runtime.narrow_cache import SCALES_NAME, write_scales
from ..runtime.self_test import NARROW_SELF_TEST_NAME
from .packed import pack_engine
from .proof import prove_engine

__all__ = ["add_narrow_caches"]

Floats = npt.NDArray[np.float32]

CACHES = "int8"


def add_narrow_caches(
    directory: Path,
    manifest: Manifest,
    engine: Path,
    rows: tuple[int, ...],
    watch: Callable[[str], None] = lambda what: None,
) -> None:
    """Write what the engine of the bundle in `directory` lacks for caches in 8 bits, proven.

    rows: for how many texts at once. watch(what is done). Peak memory is that of a load of the engine.

    Raises BltError where attention is not one operator here, ONNX Runtime has none over such caches, or
    packed graphs can't be had, WrongEngineError where it computes something else, OSError (disk full);
    nothing is left then.
    """
    try:
        backends: dict[str, StageBackend] = {
            stage: OrtStage(directory, manifest, stage, None, optimized=engine / graph_file(stage))
            for stage in manifest.stages
        }
        scales = cache_scales(directory, manifest, backends, watch)
        write_scales(engine / SCALES_NAME, manifest, scales)
        for stage in manifest.stages:
            name = graph_file(stage)
            model = onnx.load(engine / name, load_external_data=False)
            narrow = narrow_caches(model, scales[stage], name)
            (engine / graph_file(stage, CACHES)).write_bytes(narrow.SerializeToString())
        prove_engine(
            directory,
            manifest,
            lambda stage: OrtStage(
                directory,
                manifest,
                stage,
                None,
                optimized=engine / graph_file(stage),
                narrow=NarrowGraph(engine / graph_file(stage, CACHES), scales[stage]),
            ),
            engine_limits(manifest),
            engine / NARROW_SELF_TEST_NAME,
            name=f"ONNX Runtime {import_onnxruntime().__version__} with {CACHES} caches",
            alike=True,
            watch=lambda stage: watch(f"proving the {stage} graph's {CACHES} caches"),
            scales=scales,
            reference=backends.__getitem__,
        )
        refused: list[str] = []
        if not pack_engine(directory, manifest, engine, rows, refused.append, scales):
            raise BackendError(f"{CACHES} caches: {refused[0]}; build with --rows none, or float32 caches")
    except BaseException:
        for file in cache_files(manifest.stages, rows, CACHES):
            (engine / file).unlink(missing_ok=True)
        raise
