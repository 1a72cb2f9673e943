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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["ALL_DATA", "ANYTHING", "RULES", "Rules", "rules_of_old"]

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
