"""Writing a stage's graph and streaming its weights from the checkpoint beside it.

One tensor at a time is read, rearranged and written as ONNX external data; the graph file itself holds
only structure and small constants. Peak memory is the largest weight, about twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graphs.config import ModelConfig
from ..graphs.layers import Weight
from ..graphs.quantize import Recipe, rewrite_stage
from ..graphs.stages import build_stage
from ..runtime.errors import BundleError
from ..runtime.manifest import StageSpec
from .checkpoint_base import Checkpoint, CheckpointError

__all__ = [
    "FLOAT32",
    "data_name",
    "graph_name",
    "load_stage",
    "save_stage",
    "saved_bytes",
    "stage_bytes",
    "write_stage",
]

FLOAT32 = Recipe("fp32")
"""The graph as it is built."""

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


def stage_bytes(config: ModelConfig, stage: str, recipe: Recipe = FLOAT32) -> tuple[int, int]:
    """(bytes of all weights on disk, float32 bytes of the largest one) of a stage; nothing is written.

    Raises like `rewrite_stage`.
    """
    model = build_stage(config, stage)
    largest = 0
    for weight in _weights(model):
        shape = ir.Shape(weight.shape)
        weight.const_value = ir.LazyTensor(_never, dtype=ir.DataType.FLOAT, shape=shape, name=weight.name)
        largest = max(largest, weight.const_value.nbytes)
    rewrite_stage(model, recipe)
    return saved_bytes(model), largest


def write_stage(
    directory: Path,
    config: ModelConfig,
    stage: str,
    checkpoint: Checkpoint,
    progress: Callable[[int], None],
    recipe: Recipe = FLOAT32,
) -> None:
    """Write `stage`'s two files into `directory` by the recipe; progress(bytes) after each weight.

    Raises CheckpointError for a weight that is not finite, OSError when the disk refuses, and like
    `rewrite_stage`.
    """
    model = build_stage(config, stage)
    for weight in _weights(model):
        weight.const_value = _lazy(weight, checkpoint)
    rewrite_stage(model, recipe)
    save_stage(directory, stage, model, progress)


def saved_bytes(model: ir.Model) -> int:
    """Bytes of a graph's weights on disk."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None and tensor.nbytes > _INLINE_BYTES)


def load_stage(bundle: Path, spec: StageSpec) -> ir.Model:
    """A stage's graph from a bundle; its weights stay in their file until they are read.

    Raises BundleError for a file that is no graph, or weights that do not lie in the stage's own file.
    """
    path = bundle / spec.file
    try:
        model = ir.load(path)
    except Exception as error:  # a damaged graph can fail in many ways
        raise BundleError(f"{path} is not a graph that can be read ({type(error).__name__})") from error
    end = (bundle / spec.data).stat().st_size
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
    return model


def save_stage(directory: Path, stage: str, model: ir.Model, progress: Callable[[int], None]) -> None:
    """Write a stage's graph and its weights, one by one in their order; progress(bytes) after each."""
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


def _never() -> ir.TensorProtocol:
    raise AssertionError("a planned weight has no values")


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
