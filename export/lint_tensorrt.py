"""What the ONNX parsers of TensorRT's versions take: one table for each version; no graph is read here.

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
- TensorRT-RTX 1.7: its own parser was asked about every operator (`OnnxParser.supports_operator`); what it
  would take from a plugin library, which it has not, is left out.

What a version of TensorRT would refuse in a bundle's graphs, found without TensorRT and without weights.

A graph's structure is compared with the tables of `tensorrt_rules`, which says where they come from: opset,
operators and domains, types, quantization, inputs that must be constants, attributes that are not taken.
Only what a graph file itself holds is read, so values in the weights' file (the sign of scales) are not seen.
No finding does not mean that an engine builds: layers, shapes and memory are the builder's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from ..runtime.errors import BundleError, OptionError
from ..runtime.manifest import Manifest

__all__ = ["ALL_DATA", "ANYTHING", "RULES", "Finding", "Rules", "lint_bundle", "lint_graph", "rules_of_old"]

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
NUMBERS = FLOATS | {"INT32", "INT64"}
ANYTHING = NUMBERS | {"BOOL"}
LOGICAL = frozenset({"BOOL"})

_FLOAT_OPERATORS = """
    Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh
    CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
    GroupNormalization GRU HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf
    LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool
    MeanVarianceNormalization ParametricSoftplus Pow PRelu QuantizeLinear RandomNormalLike RandomUniformLike
    Reciprocal Resize RNN Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh
    ThresholdedRelu Upsample
"""
_HALF_OPERATORS = "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"
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
_LOGICAL_OPERATORS = "And Not Or Xor"


def _operators(types: frozenset[str], names: str) -> dict[str, frozenset[str]]:
    return dict.fromkeys(names.split(), types)


ALL_DATA = frozenset(
    _operators(
        ANYTHING,
        "Add And Concat Div Einsum Equal Gemm Greater GreaterOrEqual Less LessOrEqual MatMul Max Mean Min "
        "Mod Mul Or Pow Sub Sum Xor",
    )
)
"""Operators of which every input is data of the types that the tables give; of others, it is the first."""

_BASE: dict[str, frozenset[str]] = {
    **_operators(FLOATS, _FLOAT_OPERATORS),
    **_operators(FLOATS - {"BFLOAT16"}, _HALF_OPERATORS),
    **_operators(NUMBERS, _NUMBER_OPERATORS),
    **_operators(ANYTHING, _ANY_OPERATORS),
    **_operators(LOGICAL, _LOGICAL_OPERATORS),
    **_operators(ANYTHING | {"UINT8"}, "Cast CastLike"),
    "DequantizeLinear": frozenset(),  # see quantized_types
}
_LATER: dict[str, frozenset[str]] = {
    **_operators(FLOATS, "Attention RMSNormalization RotaryEmbedding STFT"),
    # The types that are documented for windows are the window's, not those of its size.
    **_operators(ANYTHING, "BlackmanWindow HammingWindow HannWindow"),
    "TensorScatter": FLOATS | {"INT32"},
    "Pow": NUMBERS,
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
    oldest_opset: int = 9
    """The oldest opset that is documented."""
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
        **_operators(FLOATS, "Swish CausalConvWithState LinearAttention"),
    },
    newest_opset=26,
    scatter_reduction=frozenset(),
    unsorted=True,
)

RULES: Mapping[str, Rules] = {"tensorrt-10.3": _10_3, "tensorrt-11": _11, "tensorrt-rtx": _RTX}
"""By the name that a user gives."""

_OLD = (10, 13)


def rules_of_old(version: str) -> str | None:
    """The name of the rules that full TensorRT of this version follows, where it is as old as JetPack 6's.

    None from 10.13 on, of which NVIDIA's pages do not say what 10.3's refuse, and for what is no version.
    """
    numbers = version.split(".")[:2]
    known = len(numbers) == 2 and all(number.isdecimal() for number in numbers)
    return "tensorrt-10.3" if known and tuple(map(int, numbers)) < _OLD else None


_STANDARD = ("", "ai.onnx")
_KNOWN_TYPES = ANYTHING | {"INT8", "INT4", "UINT8", "FLOAT8E4M3FN", "FLOAT4E2M1", "UNDEFINED"}
_FLOAT_WEIGHTS = "keep the stage fp32 or fp16"
_STANDARD_FORM = "use the portable graphs that `blt-edge export` and `quantize` write"


@dataclass(frozen=True)
class Finding:
    """Something that would be refused."""

    stage: str
    """The bundle's stage."""
    node: str
    """The node's name, or what else in the graph it is about."""
    operator: str
    """The node's operator; empty when it is about no node."""
    reason: str
    """What is not taken."""
    remedy: str
    """What to do instead."""


def lint_bundle(directory: Path, manifest: Manifest, version: str) -> list[Finding]:
    """Everything in a bundle's stages that `version`, a name of `RULES`, would refuse.

    Raises OptionError for another version, BundleError for a file that is no graph.
    """
    if version not in RULES:
        raise OptionError(f"lint: got {version!r}, known are {', '.join(RULES)}")
    found: list[Finding] = []
    for stage, spec in manifest.stages.items():
        path = directory / spec.file
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf raises several kinds
            raise BundleError(f"{path} is not a graph that can be read ({type(error).__name__})") from error
        found += lint_graph(model, stage, RULES[version])
    return found


def lint_graph(model: ModelProto, stage: str, rules: Rules) -> list[Finding]:
    """Everything in one graph that these rules refuse, in the graph's order."""
    return [
        Finding(stage, node, operator, reason, remedy.replace("{stage}", stage))
        for node, operator, reason, remedy in _Linter(_typed(model), rules).findings()
    ]


def _typed(model: ModelProto) -> ModelProto:
    """The model with the types of what its nodes make, as far as they can be told."""
    known = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    if all(name in known for node in model.graph.node for name in node.output if name):
        return model
    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # a graph that can't be typed is looked at as it is
        return model


_Found = tuple[str, str, str, str]
"""Node, operator, reason, remedy."""


@dataclass(frozen=True)
class _Value:
    """What is known of a value."""

    type: str = "UNDEFINED"
    shape: tuple[int | None, ...] | None = None
    """None where unknown, as a whole or a dimension."""
    constant: bool = False
    data: TensorProto | None = None
    """Its constant value, where the graph file holds it."""


_UNKNOWN = _Value()


class _Linter:
    """One graph, its functions and the graphs inside."""

    def __init__(self, model: ModelProto, rules: Rules) -> None:
        self._model, self._rules = model, rules
        self._functions = {(function.domain, function.name): function for function in model.functions}

    def findings(self) -> Iterator[_Found]:
        """What is about the whole, then what is about each node."""
        yield from self._opset()
        yield from self._graph(self._model.graph, {})
        for function in self._model.functions:
            yield from self._nodes(function.node, {})

    def _opset(self) -> Iterator[_Found]:
        rules = self._rules
        for entry in self._model.opset_import:
            if entry.domain not in _STANDARD:
                continue
            if not rules.oldest_opset <= entry.version <= rules.newest_opset:
                yield (
                    "the graph",
                    "",
                    f"opset {entry.version}; known are {rules.oldest_opset} to {rules.newest_opset}",
                    _STANDARD_FORM,
                )

    def _graph(self, graph: onnx.GraphProto, outer: Mapping[str, _Value]) -> Iterator[_Found]:
        values = {**outer, **dict(_declared(graph))}
        for value in graph.input:
            yield from self._type(f"input {value.name}", "", values[value.name].type)
        for tensor in graph.initializer:
            yield from self._type(f"weight {tensor.name}", "", values[tensor.name].type)
        yield from self._nodes(graph.node, values)

    def _nodes(self, nodes: Sequence[onnx.NodeProto], values: Mapping[str, _Value]) -> Iterator[_Found]:
        values = dict(values)
        for node in nodes:
            name = node.name or f"the node that makes {node.output[0] if node.output else 'nothing'}"
            view = _Node(node, name, [values.get(key, _UNKNOWN) for key in node.input])
            yield from self._operator(view)
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    yield from self._graph(graph, values)
            values.update(_constants(node))

    def _operator(self, node: _Node) -> Iterator[_Found]:
        if node.proto.domain not in _STANDARD:
            if (node.proto.domain, node.operator) not in self._functions:
                yield node.found(f"domain {node.proto.domain} is unknown", _STANDARD_FORM)
            return
        if (node.proto.domain, node.operator) in self._functions:
            return
        if node.operator not in self._rules.operators:
            yield node.found("there is no such operator", _STANDARD_FORM)
            return
        for check in (self._inputs, self._constant_inputs, self._quantized, self._attributes, self._results):
            yield from check(node)

    # 1. Types.

    def _type(self, name: str, operator: str, kind: str) -> Iterator[_Found]:
        if kind not in _KNOWN_TYPES:
            yield name, operator, f"the type {_word(kind)} is unknown", "take float32, int32 or int64"
        elif kind == "FLOAT4E2M1" and kind not in self._rules.quantized_types:
            yield name, operator, "the type float4e2m1 is unknown", _FLOAT_WEIGHTS
        elif kind in self._rules.device_lacks:
            yield name, operator, self._rules.device_lacks[kind], _FLOAT_WEIGHTS

    def _inputs(self, node: _Node) -> Iterator[_Found]:
        if node.operator == "DequantizeLinear":
            return
        allowed = self._rules.operators[node.operator]
        data = node.inputs if node.operator in ALL_DATA else node.inputs[:1]
        for value in data:
            if value.type in _KNOWN_TYPES and value.type not in allowed and value.type != "UNDEFINED":
                taken = ", ".join(sorted(map(_word, allowed)))
                yield node.found(f"reads {_word(value.type)}; it takes {taken}", "cast it before")
                return

    def _results(self, node: _Node) -> Iterator[_Found]:
        for name in ("to", "dtype", "output_dtype"):
            kind = node.attribute(name)
            if isinstance(kind, int) and kind:
                yield from self._type(node.name, node.operator, TensorProto.DataType.Name(kind))

    # 2. What must be constant.

    def _constant_inputs(self, node: _Node) -> Iterator[_Found]:
        place = self._rules.constants.get(node.operator)
        if place is None or node.missing(place) or node.inputs[place].constant:
            return
        yield node.found(f"input {place} is computed; a constant is needed", "write its value into the graph")

    # 3. Quantization.

    def _quantized(self, node: _Node) -> Iterator[_Found]:
        if node.operator not in ("QuantizeLinear", "DequantizeLinear"):
            return
        yield from self._zero_point(node)
        if node.operator == "DequantizeLinear":
            kind = node.input(0).type
            if kind not in self._rules.quantized_types | {"UNDEFINED"}:
                taken = ", ".join(sorted(map(_word, self._rules.quantized_types)))
                yield node.found(f"reads {_word(kind)}; it takes {taken}", "quantize to signed integers")
            if kind == "INT4":
                yield from _int4(node)
        yield from self._scales(node)

    def _zero_point(self, node: _Node) -> Iterator[_Found]:
        symmetric = "quantize symmetrically, with zero points of zero"
        if node.missing(2):
            if node.operator == "QuantizeLinear" and not node.attribute("output_dtype"):
                yield node.found("no zero point means uint8, which is not taken", "give an int8 zero point")
            return
        zero = node.input(2)
        if zero.type not in self._rules.quantized_types | {"UNDEFINED"}:
            yield node.found(f"its zero point is {_word(zero.type)}", "quantize to signed integers")
        elif not zero.constant:
            yield node.found("its zero point is computed", symmetric)
        elif zero.data is not None and np.any(numpy_helper.to_array(zero.data).astype(np.float32)):
            yield node.found("its zero point is not zero", symmetric)

    def _scales(self, node: _Node) -> Iterator[_Found]:
        data, scale = node.input(0), node.input(1)
        if scale.data is not None and not np.all(numpy_helper.to_array(scale.data) > 0):
            yield node.found("a scale is not positive", "quantize the stage again")
        if scale.shape is None:
            return
        if None in scale.shape:
            yield node.found("its scales have a dynamic shape", "write the scales into the graph")
            return
        sizes = [size for size in scale.shape if size is not None]
        if prod(sizes) == 1 or data.shape is None:
            return
        if len(sizes) == 1:
            axis = node.attribute("axis", 1)
            channels = data.shape[axis] if -len(data.shape) <= axis < len(data.shape) else None
            if channels is not None and channels != sizes[0]:
                yield node.found(f"{sizes[0]} scales for {channels} channels", "quantize the stage again")
            return
        yield from self._blocks(node, data.shape, sizes)

    def _blocks(self, node: _Node, shape: tuple[int | None, ...], scales: list[int]) -> Iterator[_Found]:
        rules, kind = self._rules, node.input(0).type
        if kind in rules.quantized_types and kind not in rules.block_types:
            words = " and ".join(sorted(map(_word, rules.block_types)))
            remedy = "quantize with fp16, int8 or int4 here, such as --precision int4,{stage}=fp16"
            yield node.found(f"{_word(kind)} has a scale for each block; only {words} may", remedy)
        if len(shape) not in rules.block_ranks:
            ranks = " or ".join(map(str, sorted(rules.block_ranks)))
            yield node.found(f"blocks in {len(shape)} dimensions; {ranks} are taken", "reshape the weight")
        elif len(scales) != len(shape):
            yield node.found(f"{len(scales)} dimensions of scales for {len(shape)}", "quantize it again")
        elif None not in shape:
            blocked = [axis for axis, size in enumerate(shape) if size != scales[axis]]
            if len(blocked) > 1:
                yield node.found("blocks along more than one axis", "quantize the stage again")
            elif blocked and blocked[0] < len(shape) - 2:
                yield node.found("blocks along neither of the last two axes", "quantize the stage again")
            elif any((shape[axis] or 0) % max(1, scales[axis]) for axis in blocked):
                yield node.found("blocks that do not divide the weight", "choose another --block-size")

    # 4. Attributes and outputs.

    def _attributes(self, node: _Node) -> Iterator[_Found]:
        reduction = node.attribute("reduction", b"none")
        scatters = node.operator in ("ScatterElements", "ScatterND")
        if scatters and reduction != b"none" and node.operator not in self._rules.scatter_reduction:
            yield node.found(f"reduction {reduction.decode()!r} is not taken", "gather, then reduce")
        elif node.operator == "TopK" and not (node.attribute("sorted", 1) or self._rules.unsorted):
            yield node.found("unsorted results are not taken", "ask for sorted ones")
        elif node.operator in _ONE_OUTPUT and any(node.proto.output[1:]):
            yield node.found("only its first output is taken", "drop the other outputs")
        elif node.operator == "BatchNormalization" and node.attribute("training_mode", 0):
            yield node.found("training mode is not taken", "export the model for inference")
        elif node.operator == "Attention" and not all(map(node.missing, (4, 5, 6))):
            yield node.found("a cache inside Attention is not taken", "concatenate keys and values before")
        elif node.operator == "Attention" and node.attribute("softcap", 0.0):
            yield node.found("softcap is not taken", "write attention as products and Softmax")
        elif node.operator == "TensorScatter" and node.attribute("axis", -2) != -2:
            yield node.found("only axis -2 is taken", "lay the cache out as [batch, heads, positions, width]")
        elif node.operator == "EyeLike" and None in (node.input(0).shape or ()):
            yield node.found("its size is dynamic", "write the matrix into the graph")
        elif node.operator == "Constant":
            for name in ("sparse_value", "value_string", "value_strings"):
                if node.attribute(name) is not None:
                    yield node.found(f"{name} is not taken", "give a dense tensor of numbers")


_ONE_OUTPUT = ("Attention", "BatchNormalization", "LayerNormalization", "MaxPool")


def _int4(node: _Node) -> Iterator[_Found]:
    data = node.input(0)
    if not data.constant:
        yield node.found("computed int4; only weights may be int4", "keep activations in int8 or float")
    elif data.shape is not None and prod(size or 0 for size in data.shape) % 2:
        yield node.found("an odd number of int4 values", "pad the weight")


# 5. Reading graphs.


@dataclass(frozen=True)
class _Node:
    """A node and what is known of its inputs."""

    proto: onnx.NodeProto
    name: str
    inputs: list[_Value]

    @property
    def operator(self) -> str:
        return str(self.proto.op_type)

    def found(self, reason: str, remedy: str) -> _Found:
        return self.name, self.operator, reason, remedy

    def missing(self, place: int) -> bool:
        """Whether an optional input is left out."""
        return place >= len(self.proto.input) or not self.proto.input[place]

    def input(self, place: int) -> _Value:
        return _UNKNOWN if self.missing(place) else self.inputs[place]

    def attribute(self, name: str, default: Any = None) -> Any:
        for attribute in self.proto.attribute:
            if attribute.name == name and attribute.type != AttributeProto.UNDEFINED:
                return helper.get_attribute_value(attribute)
        return default


def _declared(graph: onnx.GraphProto) -> Iterator[tuple[str, _Value]]:
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
        yield value.name, _Value(_type_name(tensor.elem_type), shape)
    for weight in graph.initializer:
        yield weight.name, _constant(weight)


def _constants(node: onnx.NodeProto) -> Iterator[tuple[str, _Value]]:
    """What a Constant node makes."""
    if node.op_type != "Constant" or node.domain not in _STANDARD or not node.output:
        return
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.name == "value":
            yield node.output[0], _constant(value)
        elif attribute.name.startswith("value_"):
            shape: tuple[int | None, ...] = (len(value),) if isinstance(value, list) else ()
            yield node.output[0], _Value(shape=shape, constant=True)


def _constant(tensor: TensorProto) -> _Value:
    inside = tensor.data_location != TensorProto.EXTERNAL
    known = inside and tensor.data_type != TensorProto.UNDEFINED and tensor.data_type != TensorProto.STRING
    return _Value(_type_name(tensor.data_type), tuple(tensor.dims), True, tensor if known else None)


def _type_name(number: int) -> str:
    try:
        return str(TensorProto.DataType.Name(number))
    except ValueError:
        return f"type {number}"


def _word(kind: str) -> str:
    return kind.lower()
