"""A stage's graph and its weights as files: built over a checkpoint, loaded from a bundle, written.

Weights stream: one tensor at a time is read, rearranged and written as ONNX external data; the graph file
itself holds only structure and small constants. Peak memory is the largest weight, about twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..graphs.config import ModelConfig
from ..graphs.layers import Weight
from ..graphs.quantize import Recipe, rewrite_stage
from ..graphs.stages import build_stage
from ..runtime.errors import BundleError
from ..runtime.manifest import StageSpec
from .checkpoint_base import Checkpoint, CheckpointError

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


def checkpoint_stage(checkpoint: Checkpoint, config: ModelConfig, stage: str) -> ir.Model:
    """A stage's graph as it is built, float32, over weights that are read when they are written.

    Reading raises CheckpointError for a weight that is not finite.
    """

    def finite(name: str) -> np.ndarray:
        array = checkpoint.tensor(name)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name} holds NaN or infinity; the model is damaged"
            )
        return array

    def lazy(weight: Weight) -> ir.LazyTensor:
        def load() -> ir.TensorProtocol:
            return ir.tensor(weight.source.assemble(finite, tuple(weight.shape.numpy())), name=weight.name)

        return ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape(weight.shape), name=weight.name)

    model = build_stage(config, stage)
    for value in model.graph.initializers.values():
        if isinstance(value, Weight):
            value.const_value = lazy(value)
    return model


def bundle_stage(bundle: Path, spec: StageSpec) -> ir.Model:
    """`load_stage`, with weights that are read when they are written, and let go again."""

    def lazy(tensor: ir.ExternalTensor) -> ir.LazyTensor:
        def load() -> ir.TensorProtocol:
            # A copy, so that the mapped file can go: its pages would count as this process's memory.
            values = np.array(tensor.numpy())
            tensor.release()
            return ir.tensor(values, name=tensor.name)

        return ir.LazyTensor(load, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name)

    model = load_stage(bundle, spec)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = lazy(value.const_value)
    return model


def planned_bytes(model: ir.Model, recipe: Recipe) -> tuple[int, int]:
    """(bytes of all weights on disk, bytes of the largest one now) of a stage rewritten by the recipe.

    No weight is read. Raises like `rewrite_stage`.
    """
    largest = max((tensor.nbytes for tensor in _tensors(model)), default=0)
    rewrite_stage(model, recipe)
    return sum(tensor.nbytes for tensor in _tensors(model) if tensor.nbytes > _INLINE_BYTES), largest


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    values = model.graph.initializers.values()
    return [value.const_value for value in values if value.const_value is not None]


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
