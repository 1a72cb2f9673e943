"""Lower precision for a float32 stage graph: the products of its weights, and nothing else.

Every `MatMul` whose second input is a weight [K, N] (inputs, outputs) is rewritten in standard, explicit
form, which ONNX Runtime fuses into its integer kernels and TensorRT builds as it stands:

- fp16: Cast -> MatMul over a float16 weight -> Cast
- int8: QuantizeLinear -> DequantizeLinear of the input, on one static scale; DequantizeLinear of the weight
  along its outputs. No scale depends on a call's data: a row's result does not depend on the rows beside it.
- int8w, int4: DequantizeLinear of the weight in blocks of inputs (opset 21)

Integers are signed and symmetric, with one scale for each block of inputs and each output. A block is
`block_size` consecutive inputs of one output; one block of K inputs is per-channel quantization. A scale is
found by `search`:

- "rtn": the largest magnitude of the block lies on the last level, everything else is rounded to nearest.
- "mse": of a range of smaller scales, which cut off the largest weights, the one with the least squared
  error; then the scale that fits the chosen integers best, by least squares.

Weights are never held: the rewritten graph's initializers are lazy tensors over the old ones, a quantized
weight directly followed by its scales, so that writing them in order reads every weight once.
What it does not know: checkpoints, bundles, where ranges come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..runtime.errors import BltError, OptionError
from ..runtime.names import BLOCK_PRECISIONS, PRECISIONS, SEARCHES
from .precision import BLOCK_SIZES, block_size_for
from .surgery import add_constant, input_of

__all__ = [
    "ActivationRanges",
    "Quantized",
    "Recipe",
    "WeightFactors",
    "block_sizes",
    "linear_products",
    "quantize_weight",
    "rewrite_stage",
]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int8]

_LEVELS = {4: (-8, 7), 8: (-127, 127)}
_SHARES = {4: np.linspace(0.5, 1.04, 19, dtype=np.float32), 8: np.linspace(0.8, 1, 9, dtype=np.float32)}
"""Scales that the search tries, as shares of the one that cuts nothing off."""

_SMALLEST = np.finfo(np.float32).tiny
_FLOAT16_MAX = float(np.finfo(np.float16).max)

# Weights looked at together: they, their integers and one product stay in the cache.
_TILE = 1 << 15

# The first opset with block-wise DequantizeLinear.
_BLOCK_OPSET = 21


# 1. Weights to integers.


@dataclass(frozen=True)
class Quantized:
    """A weight as integers; `values[k, n] * scales[k // block_size, n]` comes close to it."""

    values: Integers
    """int8 [K, N]; int4 values in -8..7 take a byte each here."""
    scales: Floats
    """float32 [K / block_size, N], above 0."""


def quantize_weight(weight: Floats, bits: int, block_size: int, search: str = "mse") -> Quantized:
    """float32 [K, N] to integers of 4 or 8 bits; `block_size` must divide K.

    int8 uses -127..127, int4 -8..7. Takes the integers and a little more memory beside the weight.
    """
    inputs, outputs = weight.shape
    assert inputs % block_size == 0, f"{block_size} does not divide {inputs}"
    assert search in SEARCHES, search
    blocks = np.ascontiguousarray(weight).reshape(-1, block_size, outputs)
    values = np.empty(blocks.shape, np.int8)
    scales = np.empty((len(blocks), outputs), np.float32)
    columns = max(8, _TILE // block_size)
    for index, block in enumerate(blocks):
        for first in range(0, outputs, columns):
            part = slice(first, first + columns)
            values[index, :, part], scales[index, part] = _tile(block[:, part], bits, search)
    return Quantized(values.reshape(weight.shape), scales)


def _tile(block: Floats, bits: int, search: str) -> tuple[Integers, Floats]:
    """One block of inputs for some outputs: int8 [block, n] and float32 [n]."""
    low, high = _LEVELS[bits]
    largest = np.abs(block).max(axis=0)
    # A block of zeros keeps any scale; one of subnormals must not divide by zero.
    scales = np.maximum(largest / np.float32(high), _SMALLEST)
    scales[largest == 0] = 1.0
    if search == "mse":
        # In units of the plain scale nothing overflows, whatever the weights are.
        scales = np.maximum(scales * _search(block / scales, bits), _SMALLEST)
    return np.clip(np.rint(block / scales), low, high).astype(np.int8), scales


def _search(block: Floats, bits: int) -> Floats:
    """Scales [n] for a block whose plain scale is 1."""
    # With w the block and q its integers, the best scale is w.q / |q|^2, where the squared error is
    # |w|^2 - (w.q)^2 / |q|^2: the last term alone says which q is best.
    best = np.full(block.shape[1], -1, np.float32)
    fit = np.ones_like(best)
    for share in _SHARES[bits]:
        gain, candidate = _gain(block, share, bits)
        fit = np.where(gain > best, candidate, fit)
        best = np.maximum(gain, best)
    # Rounding again at the fitted scale may find still better integers, and their own best scale.
    for _ in range(2):
        gain, candidate = _gain(block, fit, bits)
        fit = np.where(gain >= best, candidate, fit)
        best = np.maximum(gain, best)
    # The weights are rounded at the fitted scale in the end: keep it only where it beats the plain one.
    one = np.float32(1)
    return np.where(_error(block, fit, bits) < _error(block, one, bits), fit, one)


def _gain(block: Floats, scale: Floats | np.float32, bits: int) -> tuple[Floats, Floats]:
    """What integers rounded at `scale` explain of the block at their best scale, and that scale."""
    integers = np.clip(np.rint(block / scale), *_LEVELS[bits])
    product = np.einsum("kn,kn->n", block, integers)
    square = np.einsum("kn,kn->n", integers, integers)
    fit: Floats = product / np.maximum(square, 1)
    return product * fit, np.where(fit > 0, fit, 1)


def _error(block: Floats, scale: Floats | np.float32, bits: int) -> Floats:
    rest = block - np.clip(np.rint(block / scale), *_LEVELS[bits]) * scale
    return np.einsum("kn,kn->n", rest, rest)


# 2. The graph.


class ActivationRanges(Protocol):
    """Calibrated ranges of the inputs of weight products."""

    def scale(self, weight_name: str) -> float:
        """Largest magnitude that the int8 grid of this weight's input must hold."""


@dataclass(frozen=True)
class WeightFactors:
    """What smoothing multiplies a weight with before it is quantized; None: nothing."""

    rows: Floats | None = None
    """float32 [K]: one for each input."""
    columns: Floats | None = None
    """float32 [N]: one for each output; for a vector, one for each element."""

    def apply(self, weight: Floats) -> Floats:
        """`weight` [K, N] or [N] times its factors."""
        if self.rows is not None:
            weight = weight * self.rows[:, None]
        return weight if self.columns is None else weight * self.columns


@dataclass(frozen=True)
class Recipe:
    """How to change a graph's precision."""

    precision: str
    """One of `names.PRECISIONS`."""
    block_size: int | None = None
    """Inputs that share a weight scale in int8w and int4; None goes by the matrix
    (`precision.block_size_for`)."""
    search: str = "mse"
    """How weight scales are found: one of `names.SEARCHES`."""
    ranges: ActivationRanges | None = None
    """Needed by int8."""
    factors: Mapping[str, WeightFactors] = field(default_factory=dict)
    """By the name of a weight or norm: what smoothing multiplies it with first."""
    wider: frozenset[str] = frozenset()
    """Weights that an int4 stage keeps in int8w."""

    def of(self, weight: str, block_size: int | None) -> Recipe:
        """The recipe of one product."""
        wider = self.precision == "int4" and weight in self.wider
        return replace(self, precision="int8w" if wider else self.precision, block_size=block_size)


def linear_products(graph: ir.Graph) -> list[ir.Node]:
    """The MatMul nodes that `rewrite_stage` changes: those over a weight [K, N], but for the heads."""

    def is_linear(node: ir.Node) -> bool:
        if node.op_type != "MatMul" or node.domain:
            return False
        weight = node.inputs[1]
        return (
            weight is not None
            and weight.is_initializer()
            and weight.dtype == ir.DataType.FLOAT
            and weight.shape is not None
            and len(weight.shape) == 2
            and not str(weight.name).endswith("lm_head.weight")
        )

    return [node for node in graph if is_linear(node)]


def rewrite_stage(model: ir.Model, recipe: Recipe) -> None:
    """Change the precision of a float32 stage graph in place; its weights have values, which may be lazy.

    Raises OptionError naming a weight whose inputs the block size does not divide, BltError for a range that
    was not collected; later, when values are read, BltError for a weight beyond float16.
    """
    assert recipe.precision in PRECISIONS, recipe.precision
    graph = model.graph
    for name, factors in recipe.factors.items():
        if name in graph.initializers:
            _apply_factors(graph.initializers[name], factors)
    if recipe.precision == "fp32":
        return
    products = [_Product(graph, node) for node in linear_products(graph)]
    sizes = block_sizes(graph, recipe)
    if sizes:
        graph.opset_imports[""] = max(_BLOCK_OPSET, graph.opset_imports[""])
    for product in products:
        own = recipe.of(product.name, sizes.get(product.name))
        _REWRITES[own.precision](product, own)


def block_sizes(graph: ir.Graph, recipe: Recipe) -> dict[str, int]:
    """By weight, how many of its inputs would share a scale; empty where nothing is in blocks.

    Of a float32 stage graph. Raises OptionError naming a weight whose inputs the block size does not divide.
    """
    if recipe.precision not in BLOCK_PRECISIONS:
        return {}
    shapes = {str(input_of(node, 1).name): _shape(input_of(node, 1)) for node in linear_products(graph)}
    sizes = {}
    for name, (inputs, outputs) in shapes.items():
        size = recipe.block_size or block_size_for(inputs, outputs)
        if size is None or inputs % size:
            smaller = "choose a smaller block size, or" if recipe.block_size else "choose"
            raise OptionError(
                f"block size: {size or BLOCK_SIZES[0]} does not divide the {inputs} inputs of {name}; "
                f"{smaller} another precision for this stage"
            )
        sizes[name] = size
    return sizes


def _shape(weight: ir.Value) -> tuple[int, int]:
    assert weight.shape is not None
    inputs, outputs = (int(size) for size in weight.shape.numpy())
    return inputs, outputs


def _apply_factors(value: ir.Value, factors: WeightFactors) -> None:
    source = value.const_value
    assert source is not None
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(factors.apply(_read(source)), name=value.name),
        ir.DataType.FLOAT,
        ir.Shape(source.shape.numpy()),
        name=value.name,
    )


class _Product:
    """One MatMul and its weight; new nodes go right before it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        weight = input_of(node, 1)
        assert weight.const_value is not None
        self.graph, self.node, self.weight = graph, node, weight
        self.source: ir.TensorProtocol = weight.const_value
        self.name = str(weight.name)
        rows, columns = weight.const_value.shape.numpy()
        self.shape: tuple[int, int] = (rows, columns)

    @property
    def input(self) -> ir.Value:
        """What the weight is multiplied with, as rewriting the products before has left it."""
        return input_of(self.node, 0)

    def constant(self, suffix: str, tensor: ir.TensorProtocol) -> ir.Value:
        return add_constant(self.graph, f"{self.name}.{suffix}", tensor)

    def before(self, op_type: str, inputs: list[ir.Value], suffix: str, **attributes: Any) -> ir.Value:
        """A new node before the product; returns its output."""
        node = ir.node(op_type, inputs, attributes)
        node.name = node.outputs[0].name = f"{self.name}.{suffix}"
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def use(self, x: ir.Value, weight: ir.Value) -> None:
        """Let the product read these instead. The old weight is gone."""
        self.node.replace_input_with(0, x)
        self.node.replace_input_with(1, weight)
        if not self.weight.uses():
            del self.graph.initializers[self.name]

    def integers(
        self, suffix: str, bits: int, block_size: int, search: str, scales_shape: tuple[int, ...]
    ) -> list[ir.Value]:
        """The weight's integers and their scales: two lazy constants over one computation.

        The scales wait from the writing of the integers until they are written themselves.
        """
        dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        waiting: list[Floats] = []

        def quantize() -> Quantized:
            return quantize_weight(_read(self.source), bits, block_size, search)

        def load_values() -> ir.TensorProtocol:
            quantized = quantize()
            waiting[:] = [quantized.scales]
            return ir.tensor(quantized.values.astype(dtype.numpy(), copy=False), dtype=dtype)

        def load_scales() -> ir.TensorProtocol:
            scales = waiting.pop() if waiting else quantize().scales
            return ir.tensor(scales.reshape(scales_shape))

        values = ir.LazyTensor(load_values, dtype, ir.Shape(self.shape))
        scales = ir.LazyTensor(load_scales, ir.DataType.FLOAT, ir.Shape(scales_shape))
        return [self.constant(suffix, values), self.constant("scales", scales)]


def _read(tensor: ir.TensorProtocol) -> Floats:
    """A float32 copy; nothing of a mapped file stays behind."""
    array: Floats = np.array(tensor.numpy(), np.float32)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def _to_float16(product: _Product, recipe: Recipe) -> None:
    def load() -> ir.TensorProtocol:
        values = _read(product.source)
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= _FLOAT16_MAX:
            raise BltError(
                f"{product.name} holds {largest:.6g}, fp16 reaches {_FLOAT16_MAX:.6g}; "
                "choose another precision for this stage"
            )
        return ir.tensor(values.astype(np.float16))

    half = ir.DataType.FLOAT16
    weight = product.constant("fp16", ir.LazyTensor(load, half, ir.Shape(product.shape)))
    product.use(product.before("Cast", [product.input], "input_fp16", to=int(half)), weight)
    # The public name of a result stays with its float32 form.
    node, result = product.node, product.node.outputs[0]
    back = ir.node("Cast", [result], {"to": int(ir.DataType.FLOAT)})
    back.name = back.outputs[0].name = f"{product.name}.output_fp32"
    product.graph.insert_after(node, back)
    for user, place in list(result.uses()):
        if user is not back:
            user.replace_input_with(place, back.outputs[0])
    result.type = ir.TensorType(half)


def _to_blocks(product: _Product, recipe: Recipe) -> None:
    (rows, columns), size = product.shape, recipe.block_size
    assert size is not None
    bits = 4 if recipe.precision == "int4" else 8
    pair = product.integers(recipe.precision, bits, size, recipe.search, (rows // size, columns))
    blocks = product.before("DequantizeLinear", pair, "blocks", axis=0, block_size=size)
    product.use(product.input, blocks)


def _to_int8(product: _Product, recipe: Recipe) -> None:
    assert recipe.ranges is not None, "int8 needs ranges"
    limit = float(recipe.ranges.scale(product.name))
    if not 0 <= limit < np.inf:
        raise BltError(f"{product.name}: the calibrated range is {limit}; calibrate with other texts")
    rows, columns = product.shape
    step = product.constant("input_scale", ir.tensor(np.float32(limit / 127 if limit > 1e-30 else 1.0)))
    zero = product.constant("input_zero", ir.tensor(np.int8(0)))
    x = product.before("QuantizeLinear", [product.input, step, zero], "input_int8")
    x = product.before("DequantizeLinear", [x, step, zero], "input_rounded")
    pair = product.integers("int8", 8, rows, recipe.search, (columns,))
    # Zeros are the default, but ONNX Runtime before 1.30 ends the process without them: where it turns int8
    # weights into uint8 ones, on x86 without VNNI, it writes to this input whether or not it is there.
    zeros = product.constant("zeros", ir.tensor(np.zeros(columns, np.int8)))
    product.use(x, product.before("DequantizeLinear", [*pair, zeros], "outputs", axis=1))


_REWRITES: dict[str, Callable[[_Product, Recipe], None]] = {
    "fp16": _to_float16,
    "int8": _to_int8,
    "int8w": _to_blocks,
    "int4": _to_blocks,
}
