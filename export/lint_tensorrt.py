"""What a version of TensorRT would refuse in a bundle's graphs, found without TensorRT and without weights.

A graph's structure is compared with a table for each version's ONNX parser: opset, operators and domains,
types, quantization, inputs that must be constants, attributes that are not taken. Only what a graph file
itself holds is read, so values in the weights' file (the sign of scales) are not seen. No finding does not
mean that an engine builds: layers, shapes and memory are the builder's.

Where the tables come from, all in the repository onnx/onnx-tensorrt but for the last two:

- Operators and their types: `docs/operators.md` of 10.6 (commit 0137504e) and of 10.15 (commit fa5aa9f6).
- The table for 10.3 is that of 10.6 without what `docs/Changelog.md` says came after 10.3: windows (10.4),
  STFT (10.5), constant axes of Pad (10.4), Squeeze and Unsqueeze (10.7) and CumSum (10.8), Pow over whole
  numbers (10.8, 10.12), opset 21's GroupNormalization (10.9).
- Opsets: operators.md gives 9 to 20 for 10.0, 9 to 22 for 10.6, whose ONNX came with it (Changelog). A newer
  number by itself is not refused (`ModelImporter.cpp`), and opset 21's DequantizeLinear is read by the shape
  of its scales (`QuantDequantLinearHelper` in `onnxOpImporters.cpp`), so 21 counts as known to 10.3.
- Blocks: NVIDIA's page of the operator Dequantize for 10.x, docs.nvidia.com/deeplearning/tensorrt/operators/
  docs/Dequantize.html, "a 2-D tensor for block quantization (supported for DataType::kINT4 only)"; builders
  say "Block quantization is supported only for DataType::kINT4" and "... only for 2D inputs". The page of
  11 (latest/_static/operators/Quantize.html) adds FP4, FP8 and INT8. docs.nvidia.com's ONNX Opset Guide gives
  opset 25 as the newest of 11.
- Packed graphs: 10.6's `Split` takes computed sizes (`onnxOpImporters.cpp` makes a shape tensor of them), and
  so does TensorRT-RTX, so packing a graph adds nothing that is refused.
- TensorRT-RTX 1.7: its own parser was asked about every operator (`OnnxParser.supports_operator`); what it
  would take from a plugin library, which it has not, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ..graphs.surgery import foreign_graph
from ..runtime.errors import OptionError
from ..runtime.manifest import Manifest

__all__ = ["RULES", "Finding", "Rules", "lint_bundle", "lint_graph", "rules_of_old"]

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ANYTHING = _NUMBERS | {"BOOL"}
_OLDEST_OPSET = 9
_STANDARD = ("", "ai.onnx")
_ONE_OUTPUT = ("Attention", "BatchNormalization", "LayerNormalization", "MaxPool")
_KNOWN_TYPES = _ANYTHING | {"INT8", "INT4", "UINT8", "FLOAT8E4M3FN", "FLOAT4E2M1", "UNDEFINED"}
_FLOAT_WEIGHTS = "keep the stage fp32 or fp16"
_STANDARD_FORM = "use the portable graphs that `blt-edge export` and `quantize` write"

_FLOAT_OPERATORS = """
    Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh
    CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    GroupNormalization GRU HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf
    LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool
    MeanVarianceNormalization ParametricSoftplus Pow PRelu QuantizeLinear RandomNormalLike RandomUniformLike
    Reciprocal Resize RNN Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh
    ThresholdedRelu Upsample
"""
_NUMBER_OPERATORS = """
    Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean
    Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub
    Sum TopK
"""
_ANY_OPERATORS = """
    Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop
    OneHot RandomNormal RandomUniform Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose
    Trilu Unsqueeze Where
"""


def _operators(types: frozenset[str], names: str) -> dict[str, frozenset[str]]:
    return dict.fromkeys(names.split(), types)


# Operators of which every input is data of the types that the tables give; of others, it is the first.
_ALL_DATA = """
    Add And Concat Div Einsum Equal Gemm Greater GreaterOrEqual Less LessOrEqual MatMul Max Mean Min Mod Mul
    Or Pow Sub Sum Xor
"""

_BASE: dict[str, frozenset[str]] = {
    **_operators(_FLOATS, _FLOAT_OPERATORS),
    **_operators(_FLOATS - {"BFLOAT16"}, "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"),
    **_operators(_NUMBERS, _NUMBER_OPERATORS),
    **_operators(_ANYTHING, _ANY_OPERATORS),
    **_operators(frozenset({"BOOL"}), "And Not Or Xor"),
    **_operators(_ANYTHING | {"UINT8"}, "Cast CastLike"),
    "DequantizeLinear": frozenset(),  # see quantized_types
}
_LATER: dict[str, frozenset[str]] = {
    **_operators(_FLOATS, "Attention RMSNormalization RotaryEmbedding STFT"),
    # The types that are documented for windows are the window's, not those of its size.
    **_operators(_ANYTHING, "BlackmanWindow HammingWindow HannWindow"),
    "TensorScatter": _FLOATS | {"INT32"},
    "Pow": _NUMBERS,
}
_REDUCTIONS = dict.fromkeys([name for name in _BASE if name.startswith("Reduce")], 1)


@dataclass(frozen=True)
class Rules:
    """What one parser takes."""

    title: str
    """The version, and where one meets it."""
    operators: Mapping[str, frozenset[str]]
    """Operators of the standard domain, and the types their data may have."""
    newest_opset: int
    """The newest opset whose operators it knows."""
    constants: Mapping[str, int]
    """Operators, and the place of the input that must be a constant."""
    quantized_types: frozenset[str]
    """What DequantizeLinear may read."""
    block_types: frozenset[str]
    """Which of them may have a scale for each block."""
    block_ranks: frozenset[int]
    """Dimensions that a weight in blocks may have."""
    scatter_reduction: frozenset[str]
    """Scatter operators that may reduce."""
    unsorted: bool = False
    """Whether TopK may leave its results unsorted."""
    device_lacks: Mapping[str, str] = field(default_factory=dict)
    """Types that the parser takes and the devices of this version lack, each with the reason."""


_10_3 = Rules(
    title="TensorRT 10.3 (JetPack 6.1 and 6.2)",
    operators=_BASE,
    newest_opset=21,
    constants={**_REDUCTIONS, "Squeeze": 1, "Unsqueeze": 1, "CumSum": 1, "OneHot": 1, "Pad": 3},
    quantized_types=frozenset({"INT8", "INT4", "FLOAT8E4M3FN"}),
    block_types=frozenset({"INT4"}),
    block_ranks=frozenset({2}),
    scatter_reduction=frozenset({"ScatterElements"}),
    device_lacks={"FLOAT8E4M3FN": "Orin's GPU (compute capability 8.7) has no float8"},
)
_11 = Rules(
    title="TensorRT 11",
    operators={**_BASE, **_LATER},
    newest_opset=25,
    constants={**_REDUCTIONS, "Squeeze": 1, "Unsqueeze": 1},
    quantized_types=frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}),
    block_types=frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}),
    block_ranks=frozenset({2, 3, 4}),
    scatter_reduction=frozenset({"ScatterElements"}),
)
_NO_PLUGINS = ("DeformConv", "NonZero", "RoiAlign")
_RTX = replace(
    _11,
    title="TensorRT-RTX 1.7",
    operators={
        **{name: types for name, types in _11.operators.items() if name not in _NO_PLUGINS},
        **_operators(_FLOATS, "Swish CausalConvWithState LinearAttention"),
    },
    newest_opset=26,
    scatter_reduction=frozenset(),
    unsorted=True,
)

RULES: Mapping[str, Rules] = {"tensorrt-10.3": _10_3, "tensorrt-11": _11, "tensorrt-rtx": _RTX}
"""By the name that a user gives."""


def rules_of_old(version: str) -> str | None:
    """The name of the rules that full TensorRT of this version follows, where it is as old as JetPack 6's.

    None from 10.13 on, of which NVIDIA's pages do not say what 10.3's refuse, and for what is no version.
    """
    numbers = version.split(".")[:2]
    known = len(numbers) == 2 and all(number.isdecimal() for number in numbers)
    return "tensorrt-10.3" if known and tuple(map(int, numbers)) < (10, 13) else None


@dataclass(frozen=True)
class Finding:
    """Something that would be refused."""

    stage: str
    node: str
    """The node's name, or what else in the graph it is about."""
    operator: str
    """The node's operator; empty when it is about no node."""
    reason: str
    remedy: str


def lint_bundle(directory: Path, manifest: Manifest, version: str) -> list[Finding]:
    """Everything in a bundle's stages that `version`, a name of `RULES`, would refuse.

    Raises OptionError for another version, BundleError for a file that is no graph.
    """
    if version not in RULES:
        raise OptionError(f"lint: got {version!r}, known are {', '.join(RULES)}")
    found: list[Finding] = []
    for stage, spec in manifest.stages.items():
        path = directory / spec.file
        with foreign_graph(path):
            found += lint_graph(onnx.load(path, load_external_data=False), stage, RULES[version])
    return found


def lint_graph(model: onnx.ModelProto, stage: str, rules: Rules) -> list[Finding]:
    """Everything in one graph that these rules refuse, in the graph's order."""
    known = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    if any(name not in known for node in model.graph.node for name in node.output if name):
        with suppress(Exception):  # a graph that can't be typed is looked at as it is
            model = onnx.shape_inference.infer_shapes(model)
    return [
        Finding(stage, node, operator, reason, remedy.replace("{stage}", stage))
        for node, operator, reason, remedy in _Linter(ir.from_proto(model), rules).findings()
    ]


_Found = tuple[str, str, str, str]
"""Node, operator, reason, remedy."""
_Shape = tuple[int | None, ...]
"""Dimensions, None where unknown."""


class _Linter:
    """One graph, its functions and the graphs inside."""

    def __init__(self, model: ir.Model, rules: Rules) -> None:
        self._model, self._rules = model, rules
        self._functions = {(domain, name) for domain, name, _overload in model.functions}

    def findings(self) -> Iterator[_Found]:
        """What is about the whole, then what is about each node."""
        newest = self._rules.newest_opset
        for domain, version in self._model.opset_imports.items():
            if domain in _STANDARD and not _OLDEST_OPSET <= version <= newest:
                known = f"known are {_OLDEST_OPSET} to {newest}"
                yield "the graph", "", f"opset {version}; {known}", _STANDARD_FORM
        yield from self._graph(self._model.graph)
        for function in self._model.functions.values():
            yield from self._nodes(function)

    def _graph(self, graph: ir.Graph) -> Iterator[_Found]:
        for value in graph.inputs:
            yield from self._type(f"input {value.name}", "", _kind(value))
        for value in graph.initializers.values():
            yield from self._type(f"weight {value.name}", "", _kind(value))
        yield from self._nodes(graph)

    def _nodes(self, nodes: Iterable[ir.Node]) -> Iterator[_Found]:
        for node in nodes:
            yield from self._operator(node)
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    yield from self._graph(attribute.as_graph())
                elif attribute.type == ir.AttributeType.GRAPHS:
                    for graph in attribute.as_graphs():
                        yield from self._graph(graph)

    def _operator(self, node: ir.Node) -> Iterator[_Found]:
        if (node.domain, node.op_type) in self._functions:
            return
        if node.domain not in _STANDARD:
            yield _found(node, f"domain {node.domain} is unknown", _STANDARD_FORM)
        elif node.op_type not in self._rules.operators:
            yield _found(node, "there is no such operator", _STANDARD_FORM)
        else:
            for check in (self._inputs, self._constant_inputs, self._quantized, self._attributes):
                yield from check(node)
            for name in ("to", "dtype", "output_dtype"):
                kind = _attribute(node, name)
                if isinstance(kind, int) and kind:
                    yield from self._type(_name(node), node.op_type, ir.DataType(kind).name)

    def _type(self, name: str, operator: str, kind: str) -> Iterator[_Found]:
        if kind not in _KNOWN_TYPES:
            yield name, operator, f"the type {kind.lower()} is unknown", "take float32, int32 or int64"
        elif kind == "FLOAT4E2M1" and kind not in self._rules.quantized_types:
            yield name, operator, "the type float4e2m1 is unknown", _FLOAT_WEIGHTS
        elif kind in self._rules.device_lacks:
            yield name, operator, self._rules.device_lacks[kind], _FLOAT_WEIGHTS

    def _inputs(self, node: ir.Node) -> Iterator[_Found]:
        if node.op_type == "DequantizeLinear":
            return
        allowed = self._rules.operators[node.op_type]
        for value in node.inputs if node.op_type in _ALL_DATA.split() else node.inputs[:1]:
            kind = _kind(value)
            if kind in _KNOWN_TYPES and kind not in allowed and kind != "UNDEFINED":
                yield _found(node, f"reads {kind.lower()}; it takes {_words(allowed)}", "cast it before")
                return

    def _constant_inputs(self, node: ir.Node) -> Iterator[_Found]:
        place = self._rules.constants.get(node.op_type)
        if place is None or _input(node, place) is None or _constant(_input(node, place)) is not None:
            return
        reason = f"input {place} is computed; a constant is needed"
        yield _found(node, reason, "write its value into the graph")

    def _quantized(self, node: ir.Node) -> Iterator[_Found]:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return
        yield from self._zero_point(node)
        data, kind = _input(node, 0), _kind(_input(node, 0))
        if node.op_type == "DequantizeLinear":
            if kind not in self._rules.quantized_types | {"UNDEFINED"}:
                reason = f"reads {kind.lower()}; it takes {_words(self._rules.quantized_types)}"
                yield _found(node, reason, "quantize to signed integers")
            if kind == "INT4" and _constant(data) is None:
                reason = "computed int4; only weights may be int4"
                yield _found(node, reason, "keep activations in int8 or float")
            elif kind == "INT4" and prod(size or 0 for size in _shape(data) or (0,)) % 2:
                yield _found(node, "an odd number of int4 values", "pad the weight")
        yield from self._scales(node)

    def _zero_point(self, node: ir.Node) -> Iterator[_Found]:
        symmetric = "quantize symmetrically, with zero points of zero"
        zero = _input(node, 2)
        if zero is None:
            if node.op_type == "QuantizeLinear" and not _attribute(node, "output_dtype"):
                reason = "no zero point means uint8, which is not taken"
                yield _found(node, reason, "give an int8 zero point")
        elif _kind(zero) not in self._rules.quantized_types | {"UNDEFINED"}:
            yield _found(node, f"its zero point is {_kind(zero).lower()}", "quantize to signed integers")
        elif _constant(zero) is None:
            yield _found(node, "its zero point is computed", symmetric)
        elif (values := _values(zero)) is not None and np.any(values.astype(np.float32)):
            yield _found(node, "its zero point is not zero", symmetric)

    def _scales(self, node: ir.Node) -> Iterator[_Found]:
        again = "quantize the stage again"
        values, shape, scales = _values(_input(node, 1)), _shape(_input(node, 0)), _shape(_input(node, 1))
        if values is not None and not np.all(values > 0):
            yield _found(node, "a scale is not positive", again)
        if scales is None:
            return
        sizes = [size for size in scales if size is not None]
        if len(sizes) < len(scales):
            yield _found(node, "its scales have a dynamic shape", "write the scales into the graph")
        elif prod(sizes) == 1 or shape is None:
            return
        elif len(sizes) == 1:
            axis = _attribute(node, "axis", 1)
            channels = shape[axis] if -len(shape) <= axis < len(shape) else None
            if channels is not None and channels != sizes[0]:
                yield _found(node, f"{sizes[0]} scales for {channels} channels", again)
        else:
            yield from self._blocks(node, shape, sizes)

    def _blocks(self, node: ir.Node, shape: _Shape, scales: list[int]) -> Iterator[_Found]:
        rules, kind = self._rules, _kind(_input(node, 0))
        if kind in rules.quantized_types and kind not in rules.block_types:
            words = " and ".join(sorted(map(str.lower, rules.block_types)))
            remedy = "quantize with fp16, int8 or int4 here, such as --precision int4,{stage}=fp16"
            yield _found(node, f"{kind.lower()} has a scale for each block; only {words} may", remedy)
        if len(shape) not in rules.block_ranks:
            ranks = " or ".join(map(str, sorted(rules.block_ranks)))
            yield _found(node, f"blocks in {len(shape)} dimensions; {ranks} are taken", "reshape the weight")
        elif len(scales) != len(shape):
            yield _found(node, f"{len(scales)} dimensions of scales for {len(shape)}", "quantize it again")
        elif None not in shape:
            blocked = [axis for axis, size in enumerate(shape) if size != scales[axis]]
            if len(blocked) > 1:
                yield _found(node, "blocks along more than one axis", "quantize the stage again")
            elif blocked and blocked[0] < len(shape) - 2:
                yield _found(node, "blocks along neither of the last two axes", "quantize the stage again")
            elif any((shape[axis] or 0) % max(1, scales[axis]) for axis in blocked):
                yield _found(node, "blocks that do not divide the weight", "choose another --block-size")

    def _attributes(self, node: ir.Node) -> Iterator[_Found]:
        operator = node.op_type
        reduction = _attribute(node, "reduction", "none")
        scatters = operator in ("ScatterElements", "ScatterND")
        if scatters and reduction != "none" and operator not in self._rules.scatter_reduction:
            yield _found(node, f"reduction {reduction!r} is not taken", "gather, then reduce")
        elif operator == "TopK" and not (_attribute(node, "sorted", 1) or self._rules.unsorted):
            yield _found(node, "unsorted results are not taken", "ask for sorted ones")
        elif operator in _ONE_OUTPUT and any(output.name for output in node.outputs[1:]):
            yield _found(node, "only its first output is taken", "drop the other outputs")
        elif operator == "BatchNormalization" and _attribute(node, "training_mode", 0):
            yield _found(node, "training mode is not taken", "export the model for inference")
        elif operator == "Attention" and any(_input(node, place) for place in (4, 5, 6)):
            yield _found(node, "a cache inside Attention is not taken", "concatenate keys and values before")
        elif operator == "Attention" and _attribute(node, "softcap", 0.0):
            yield _found(node, "softcap is not taken", "write attention as products and Softmax")
        elif operator == "TensorScatter" and _attribute(node, "axis", -2) != -2:
            remedy = "lay the cache out as [batch, heads, positions, width]"
            yield _found(node, "only axis -2 is taken", remedy)
        elif operator == "EyeLike" and None in (_shape(_input(node, 0)) or ()):
            yield _found(node, "its size is dynamic", "write the matrix into the graph")
        elif operator == "Constant":
            for name in ("value_string", "value_strings"):
                if name in node.attributes:
                    yield _found(node, f"{name} is not taken", "give a dense tensor of numbers")


# Reading graphs.


def _name(node: ir.Node) -> str:
    return node.name or f"the node that makes {node.outputs[0].name if node.outputs else 'nothing'}"


def _found(node: ir.Node, reason: str, remedy: str) -> _Found:
    return _name(node), node.op_type, reason, remedy


def _input(node: ir.Node, place: int) -> ir.Value | None:
    """None where an optional input is left out."""
    return node.inputs[place] if place < len(node.inputs) else None


def _attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.value


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)


def _values(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """What a constant holds, where the graph file itself has it."""
    tensor = _constant(value)
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy()


def _kind(value: ir.Value | None) -> str:
    tensor = _constant(value)
    kind = tensor.dtype if tensor is not None else value.dtype if value is not None else None
    return "UNDEFINED" if kind is None else kind.name


def _shape(value: ir.Value | None) -> _Shape | None:
    """None where unknown as a whole."""
    tensor = _constant(value)
    shape = tensor.shape if tensor is not None else value.shape if value is not None else None
    return None if shape is None else tuple(size if isinstance(size, int) else None for size in shape)


def _words(kinds: Iterable[str]) -> str:
    return ", ".join(sorted(map(str.lower, kinds)))
