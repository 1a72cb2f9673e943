"""Products over weights in blocks as ONNX Runtime's own operator.

Portable graphs spell such a product out: DequantizeLinear over int4 or int8 [K, N] in blocks along K, then
MatMul. Some versions make `com.microsoft.MatMulNBits` of it when a graph is loaded, but an engine does not
leave it to them: older ones do so for 4 bits only, 1.22 cannot save what comes of it, and what 1.31 saves
of 8 bits computes NaN. Written into the graph, the operator is right in all of them:

    weight uint8 [N, K / block, block * bits / 8]   values + 2^(bits-1); of two 4-bit ones the low half first
    scales float32 [N * K / block]

Weights are never held: the new initializers are lazy tensors over the old ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .attention import DOMAIN

__all__ = ["BLOCK_BITS", "PRODUCT", "block_product", "write_block_products"]

PRODUCT = "MatMulNBits"
"""The operator's name."""
BLOCK_BITS = {"int4": 4, "int8w": 8}
"""Precisions with weights in blocks."""

# Inputs are rounded to int8 block by block, each row by itself, as `session_entries` asks of fused ones.
_ACCURACY_LEVEL = 4
_BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Blocks:
    """A weight in blocks, as `calibration.rewrite` writes it."""

    weight: ir.Value
    """int4 or int8 [K, N]."""
    scales: ir.Value
    """float32 [K / block, N]."""
    bits: int
    block: int

    def packed(self) -> Array:
        """The weight as the operator wants it."""
        assert self.weight.const_value is not None
        values = self.weight.const_value.numpy().astype(np.int8) + np.int16(1 << (self.bits - 1))
        columns = np.ascontiguousarray(values.T.astype(np.uint8))
        if self.bits == 4:
            columns = columns[:, 0::2] | (columns[:, 1::2] << 4)
        return columns.reshape(len(columns), -1, self.block * self.bits // 8)

    def column_scales(self) -> Array:
        """The scales likewise."""
        assert self.scales.const_value is not None
        return np.ascontiguousarray(self.scales.const_value.numpy().T).reshape(-1)


def write_block_products(model: ir.Model, bits: int) -> int:
    """Change every product over blocks of 4 or 8 `bits` in place; returns how many there were."""
    graph, changed = model.graph, 0
    for node in list(graph):
        blocks = _blocks_of(node)
        if blocks is not None and blocks.bits == bits:
            _replace(graph, node, blocks)
            changed += 1
    if changed:
        model.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return changed


def _blocks_of(node: ir.Node) -> _Blocks | None:
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    unpack = weight.producer() if weight is not None else None
    if unpack is None or unpack.op_type != "DequantizeLinear" or len(unpack.inputs) != 2:
        return None
    block = unpack.attributes.get_int("block_size", 0)
    values, scales = unpack.inputs
    if values is None or scales is None or not (values.is_initializer() and scales.is_initializer()):
        return None
    bits = _BITS.get(values.dtype or ir.DataType.UNDEFINED)
    if not block or bits is None or unpack.attributes.get_int("axis", 1) != 0:
        return None
    return _Blocks(values, scales, bits, block)


def _replace(graph: ir.Graph, node: ir.Node, blocks: _Blocks) -> None:
    assert blocks.weight.shape is not None
    rows, columns = (int(size) for size in blocks.weight.shape.numpy())
    count = rows // blocks.block
    product = ir.node(
        PRODUCT,
        [
            node.inputs[0],
            _constant(
                graph,
                f"{blocks.weight.name}.packed",
                ir.DataType.UINT8,
                (columns, count, blocks.block * blocks.bits // 8),
                blocks.packed,
            ),
            _constant(
                graph,
                f"{blocks.scales.name}.packed",
                ir.DataType.FLOAT,
                (columns * count,),
                blocks.column_scales,
            ),
        ],
        {
            "K": rows,
            "N": columns,
            "bits": blocks.bits,
            "block_size": blocks.block,
            "accuracy_level": _ACCURACY_LEVEL,
        },
        domain=DOMAIN,
        name=f"{node.name}.blocks",
    )
    graph.insert_before(node, product)
    output, old = product.outputs[0], node.outputs[0]
    output.name, output.shape, output.type = old.name, old.shape, old.type
    old.name = f"{old.name}.spelled_out"
    for user, place in list(old.uses()):
        user.replace_input_with(place, output)
    for place, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[place] = output


def _constant(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Array]
) -> ir.Value:
    tensor = ir.LazyTensor(lambda: ir.tensor(read(), name=name), dtype, ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def block_product(rows: int, block: int, bits: int) -> ir.Model:
    """A graph of one such product over a weight [rows, rows], as portable graphs spell it."""
    random = np.random.default_rng(bits)
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    integers = random.integers(-7, 8, (rows, rows)).astype(dtype.numpy())
    constants = {
        "weight": ir.tensor(integers, dtype=dtype, name="weight"),
        "scales": ir.tensor(
            random.random((rows // block, rows), np.float32) + np.float32(0.1), name="scales"
        ),
    }
    values = {
        name: ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        for name, tensor in constants.items()
    }
    x = ir.Value(name="x", shape=ir.Shape(["rows", rows]), type=ir.TensorType(ir.DataType.FLOAT))
    unpack = ir.node(
        "DequantizeLinear", [values["weight"], values["scales"]], {"axis": 0, "block_size": block}
    )
    product = ir.node("MatMul", [x, unpack.outputs[0]], name="product")
    y = product.outputs[0]
    unpack.outputs[0].name, y.name = "unpacked", "y"
    y.shape, y.type = ir.Shape(["rows", rows]), x.type
    graph = ir.Graph(
        [x],
        [y],
        nodes=[unpack, product],
        initializers=list(values.values()),
        opset_imports={"": 21},
        name="block_product",
    )
    return ir.Model(graph, ir_version=10)
