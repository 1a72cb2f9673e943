"""Writing a stage's graph and streaming its weights from the checkpoint beside it.

One tensor at a time is read, rearranged and written as ONNX external data; the graph file itself holds
only structure and small constants. Peak memory is the largest weight, about twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graphs.config import ModelConfig
from ..graphs.stages import build_stage
from ..graphs.weights import Weight
from .checkpoint_base import Checkpoint, CheckpointError

__all__ = ["data_name", "graph_name", "stage_bytes", "write_stage"]

# Below this a tensor stays inside the graph file: shapes, scalars and RoPE frequencies.
_INLINE_BYTES = 1024
# Pages: engines map each weight where it lies.
_ALIGNMENT = 4096


def graph_name(stage: str) -> str:
    """File name of a stage's graph."""
    return f"{stage}.onnx"


def data_name(stage: str) -> str:
    """File name of a stage's weights."""
    return f"{stage}.onnx.data"


def stage_bytes(config: ModelConfig, stage: str) -> tuple[int, int]:
    """(bytes of all weights, bytes of the largest one) of a stage in float32, without writing anything."""
    sizes = [4 * math.prod(weight.shape.numpy()) for weight in _weights(build_stage(config, stage))]
    return sum(sizes), max(sizes)


def write_stage(
    directory: Path,
    config: ModelConfig,
    stage: str,
    checkpoint: Checkpoint,
    progress: Callable[[int], None],
) -> None:
    """Write `stage`'s two files into `directory`; progress(bytes) after each weight.

    Raises CheckpointError for a weight that is not finite, OSError when the disk refuses.
    """
    model = build_stage(config, stage)
    for weight in _weights(model):
        weight.const_value = _lazy(weight, checkpoint)
    ir.save(
        model,
        directory / graph_name(stage),
        external_data=data_name(stage),
        size_threshold_bytes=_INLINE_BYTES,
        alignment=_ALIGNMENT,
        align_threshold=_INLINE_BYTES,
        callback=lambda tensor, _info: progress(tensor.nbytes),
    )


def _weights(model: ir.Model) -> list[Weight]:
    return [value for value in model.graph.initializers.values() if isinstance(value, Weight)]


def _lazy(weight: Weight, checkpoint: Checkpoint) -> ir.LazyTensor:
    def read(name: str) -> npt.NDArray[np.float32]:
        array = checkpoint.tensor(name)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name} holds NaN or infinity; the model is damaged"
            )
        return array

    def load() -> ir.TensorProtocol:
        return ir.tensor(weight.source.assemble(read, tuple(weight.shape.numpy())), name=weight.name)

    return ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape(weight.shape), name=weight.name)
