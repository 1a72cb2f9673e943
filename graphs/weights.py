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

    def assemble(self, read: Callable[[str], FloatArray]) -> FloatArray:
        """Read the parts with `read(name) -> float32 [out, in] or [n]`, one at a time, and join them."""
        first = _reorder(read(self.parts[0].name), self.parts[0].rope_head_dim)
        if self.table or first.ndim == 1:
            return first
        if len(self.parts) == 1:
            return np.ascontiguousarray(first.T)
        columns = [np.ascontiguousarray(first.T)]
        for part in self.parts[1:]:
            columns.append(np.ascontiguousarray(_reorder(read(part.name), part.rope_head_dim).T))
        return np.concatenate(columns, axis=1)


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
