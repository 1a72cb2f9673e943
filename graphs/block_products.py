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

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .attention import DOMAIN
from .surgery import add_constant, input_of, made_by

__all__ = ["BLOCK_BITS", "PRODUCT", "block_product", "stored", "unpacked_blocks", "write_block_products"]

PRODUCT = "MatMulNBits"
"""The operator's name."""
BLOCK_BITS = {"int4": 4, "int8w": 8}
"""Precisions with weights in blocks."""

# Inputs are rounded to int8 block by block, each row by itself, as `session_entries` asks of fused ones.
_ACCURACY_LEVEL = 4
_TYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}


def write_block_products(model: ir.Model, bits: int) -> int:
    """Change every product over blocks of 4 or 8 `bits` in place; returns how many there were."""
    graph, changed = model.graph, 0
    for node in list(graph):
        unpack = unpacked_blocks(node, bits)
        if unpack is not None:
            _replace(graph, node, unpack, bits)
            changed += 1
    if changed:
        model.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return changed


def unpacked_blocks(node: ir.Node, bits: int) -> ir.Node | None:
    """What unpacks a product's weight, if that lies in blocks of so many bits."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    unpack = made_by(weight, "DequantizeLinear") if weight is not None else None
    if unpack is None or len(unpack.inputs) != 2:
        return None
    stored = all(value is not None and value.is_initializer() for value in unpack.inputs)
    if not stored or unpack.inputs[0].dtype != _TYPES[bits]:  # type: ignore[union-attr]
        return None
    in_blocks = unpack.attributes.get_int("block_size", 0) and unpack.attributes.get_int("axis", 1) == 0
    return unpack if in_blocks else None


def stored(value: ir.Value) -> ir.TensorProtocol:
    """What a constant of the graph holds."""
    assert value.const_value is not None
    return value.const_value


def _replace(graph: ir.Graph, node: ir.Node, unpack: ir.Node, bits: int) -> None:
    block = unpack.attributes.get_int("block_size", 0)
    weight, scales = input_of(unpack, 0), input_of(unpack, 1)
    integers, factors = stored(weight), stored(scales)
    rows, columns = (int(size) for size in integers.shape.numpy())

    def pack() -> ir.TensorProtocol:
        values = integers.numpy().astype(np.int8) + np.int16(1 << (bits - 1))
        packed = np.ascontiguousarray(values.T.astype(np.uint8))
        if bits == 4:
            packed = packed[:, 0::2] | (packed[:, 1::2] << 4)
        return ir.tensor(packed.reshape(shape))

    def pack_scales() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(factors.numpy().T).reshape(-1))

    shape = (columns, rows // block, block * bits // 8)
    count = (columns * rows // block,)
    operands = [node.inputs[0]]
    for value, load, dtype, size in (
        (weight, pack, ir.DataType.UINT8, shape),
        (scales, pack_scales, ir.DataType.FLOAT, count),
    ):
        name = f"{value.name}.packed"
        operands.append(add_constant(graph, name, ir.LazyTensor(load, dtype, ir.Shape(size), name=name)))
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    attributes["accuracy_level"] = _ACCURACY_LEVEL
    product = ir.node(PRODUCT, operands, attributes, domain=DOMAIN, name=f"{node.name}.blocks")
    replace_nodes_and_values(graph, node, [node], [product], node.outputs, product.outputs)


def block_product(rows: int, block: int, bits: int) -> ir.Model:
    """A graph of one such product over a weight [rows, rows], as portable graphs spell it."""
    random = np.random.default_rng(bits)
    x = ir.val("x", ir.DataType.FLOAT, ["rows", rows])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="block_product")
    integers = random.integers(-7, 8, (rows, rows)).astype(_TYPES[bits].numpy())
    scales = random.random((rows // block, rows), np.float32) + np.float32(0.1)
    weight = [
        add_constant(graph, "weight", ir.tensor(integers, dtype=_TYPES[bits], name="weight")),
        add_constant(graph, "scales", ir.tensor(scales, name="scales")),
    ]
    unpack = ir.node("DequantizeLinear", weight, {"axis": 0, "block_size": block})
    product = ir.node("MatMul", [x, unpack.outputs[0]], name="product")
    unpack.outputs[0].name = "unpacked"
    y = product.outputs[0]
    y.name, y.shape, y.type = "y", x.shape, x.type
    graph.extend([unpack, product])
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)
