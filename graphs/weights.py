"""Where a graph's weight comes from: names and rearrangements, no files and no data.

A graph keeps a checkpoint's tensor names but not always its shapes: projections that read the same
input are one product, weights are stored [in, out] as MatMul wants them, and the rows of queries
and keys are reordered so that interleaved RoPE becomes the half-split kind (attention scores do
not change when queries and keys are permuted alike). `WeightSource` says how to get from one to
the other; whoever reads checkpoints calls `assemble`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import nn

__all__ = ["Weight", "WeightPart", "WeightSource"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WeightPart:
    """One checkpoint tensor inside a graph's weight."""

    name: str
    """Checkpoint name, Hugging Face spelling."""
    rope_head_dim: int | None = None
    """Reorder the rows of each head of this many rows from interleaved pairs to two halves; None: leave."""


@dataclass(frozen=True)
class WeightSource:
    """A graph weight as checkpoint tensors, joined along their output rows.

    A matrix is assembled as float32 [in, out] (the transpose of the checkpoint's [out, in]);
    with `table`, or for a vector, the tensor is taken as it is.
    """

    parts: tuple[WeightPart, ...]
    table: bool = False

    def assemble(self, read: Callable[[str], FloatArray], shape: tuple[int, ...]) -> FloatArray:
        """The weight, of `shape`; its parts are read one by one, `read(name) -> float32 [out, in] or [n]`."""
        if self.table or len(shape) == 1:
            return read(self.parts[0].name)
        joined = np.empty(shape, np.float32)
        column = 0
        for part in self.parts:
            rows = _reorder(read(part.name), part.rope_head_dim)
            _transpose_into(joined[:, column : column + len(rows)], rows)
            column += len(rows)
        assert column == shape[1], f"{self.parts[0].name}: {column} of {shape[1]} outputs"
        return joined


def _transpose_into(target: FloatArray, source: FloatArray, block: int = 16) -> None:
    # A few rows at a time stay in the cache: six times as fast as one strided copy of a large matrix.
    for start in range(0, len(source), block):
        target[:, start : start + block] = source[start : start + block].T


def _reorder(array: FloatArray, head_dim: int | None) -> FloatArray:
    if head_dim is None:
        return array
    heads = array.reshape(-1, head_dim // 2, 2, array.shape[-1])
    return heads.transpose(0, 2, 1, 3).reshape(array.shape)


class Weight(nn.Parameter):
    """A float32 graph parameter that knows which checkpoint tensors it is made of."""

    def __init__(self, shape: tuple[int, ...], source: WeightSource, name: str = "weight") -> None:
        super().__init__(shape, dtype=ir.DataType.FLOAT, name=name)
        self.source = source
