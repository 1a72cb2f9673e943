"""Products of many rows over weights in blocks, as products of integers: for reading prompts.

`MatMulNBits` unpacks every block of a weight for every row it is multiplied with, which costs little where
reading the weight is what takes time, and half of it or more where a chunk brings a hundred rows. Here such a
product becomes one of whole integers, which processors have instructions for:

    row scale  s = max |x| / 127        a row of inputs at a time, as it comes: nothing is calibrated
    inputs     q = round(x / s) + 128   uint8
    weight     W = round(w / t)         int8 [K, N], w what the blocks stand for, t a scale for each output
    output     y = (q - 128) W * s * t  `MatMulIntegerToFloat`

Weights lose to one scale an output what 8 bits lose, a tenth of what 4 bits lost before; inputs are rounded
to 8 bits by both operators, here a row at a time and there a block of a row. With `bits` = 7 the integers
stay within -63..63: two products then fit 16 bits whatever the inputs, as x86 without VNNI needs.

A weight's float32 values are held one matrix at a time, when the graph is written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .attention import DOMAIN
from .block_products import BLOCK_BITS, stored, unpacked_blocks
from .surgery import add_constant, input_of

__all__ = ["ROW_STEPS", "write_prefill_products"]

Floats = npt.NDArray[np.float32]

ROW_STEPS = 127
"""What a row's largest value becomes."""

_ZERO = 128
# Rows of nothing but zeros have a scale, too.
_LEAST = 1e-30


def write_prefill_products(model: ir.Model, bits: int) -> int:
    """Change every product over blocks in place; returns how many there were. bits: of a weight, 7 or 8."""
    graph, changed = model.graph, 0
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        unpack = next(
            (found for width in BLOCK_BITS.values() if (found := unpacked_blocks(node, width))), None
        )
        if unpack is None:
            continue
        x = input_of(node, 0)
        if x not in rounded:
            rounded[x] = _round_rows(graph, node, x)
        _replace(graph, node, unpack, rounded[x], bits)
        changed += 1
    if changed:
        model.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return changed


def _constant(graph: ir.Graph, name: str, value: npt.NDArray[Any] | np.generic) -> ir.Value:
    name = f"prefill.{name}"
    return graph.initializers.get(name) or add_constant(graph, name, ir.tensor(np.asarray(value), name=name))


def _round_rows(graph: ir.Graph, before: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Integers [..., K] for the rows of x, and each row's scale [..., 1]; nodes go before a node."""

    def new(op_type: str, inputs: list[ir.Value], suffix: str, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.name = node.outputs[0].name = f"{x.name}.{suffix}"
        graph.insert_before(before, node)
        return node.outputs[0]

    largest = new(
        "ReduceMax", [new("Abs", [x], "sizes"), _constant(graph, "last", np.array([-1]))], "largest"
    )
    above = new("Max", [largest, _constant(graph, "least", np.float32(_LEAST))], "above_zero")
    scale = new("Mul", [above, _constant(graph, "step", np.float32(1 / ROW_STEPS))], "scale")
    one, zero = _constant(graph, "one", np.float32(1)), _constant(graph, "zero", np.uint8(_ZERO))
    return new("QuantizeLinear", [new("Div", [x, scale], "scaled"), one, zero], "rounded"), scale


def _replace(
    graph: ir.Graph, node: ir.Node, unpack: ir.Node, rounded: tuple[ir.Value, ir.Value], bits: int
) -> None:
    block = unpack.attributes.get_int("block_size", 0)
    weight = input_of(unpack, 0)
    integers, factors = stored(weight), stored(input_of(unpack, 1))
    rows, columns = (int(size) for size in integers.shape.numpy())
    waiting: list[Floats] = []

    def quantize() -> tuple[npt.NDArray[np.int8], Floats]:
        return _by_output(integers.numpy().astype(np.float32), factors.numpy(), block, bits)

    def load_values() -> ir.TensorProtocol:
        values, steps = quantize()
        waiting[:] = [steps]
        return ir.tensor(values)

    def load_steps() -> ir.TensorProtocol:
        return ir.tensor(waiting.pop() if waiting else quantize()[1])

    name = f"{weight.name}.prefill"
    values = ir.LazyTensor(load_values, ir.DataType.INT8, ir.Shape((rows, columns)), name=name)
    steps = ir.LazyTensor(load_steps, ir.DataType.FLOAT, ir.Shape((columns,)), name=f"{name}_scales")
    operands = [
        rounded[0],
        add_constant(graph, name, values),
        _constant(graph, "one", np.float32(1)),
        add_constant(graph, f"{name}_scales", steps),
        _constant(graph, "zero", np.uint8(_ZERO)),
    ]
    product = ir.node("MatMulIntegerToFloat", operands, domain=DOMAIN, name=f"{node.name}.integers")
    product.outputs[0].name = f"{node.outputs[0].name}.of_steps"
    back = ir.node("Mul", [product.outputs[0], rounded[1]], name=f"{node.name}.prefill")
    replace_nodes_and_values(graph, node, [node], [product, back], node.outputs, back.outputs)


def _by_output(
    integers: Floats, factors: Floats, block: int, bits: int
) -> tuple[npt.NDArray[np.int8], Floats]:
    """int8 [K, N] and float32 [N] for a weight in blocks, integers [K, N] times factors [K / block, N]."""
    rows, columns = integers.shape
    values = integers.reshape(rows // block, block, columns)
    values *= factors[:, np.newaxis]
    flat = values.reshape(rows, columns)
    most = (1 << (bits - 1)) - 1
    steps = np.abs(flat).max(axis=0, initial=0.0)
    steps /= np.float32(most)
    steps[steps == 0] = 1
    flat /= steps
    return np.rint(flat, out=flat).astype(np.int8), steps.astype(np.float32)
