"""The linter against TensorRT-RTX's own parser, and rule by rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from blt_edge.export.lint_tensorrt import RULES, Finding, lint_bundle, lint_graph, rules_of_old
from blt_edge.graphs.packing import pack_rows
from blt_edge.graphs.quantize import Recipe
from blt_edge.runtime.errors import BundleError, OptionError
from blt_edge.runtime.names import PRECISIONS, STAGES
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support.quantized import BLOCKY, UnitRanges, config_of, save_random_stage

FLOAT, HALF, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT64, INT32, INT16, BOOL = TensorProto.INT64, TensorProto.INT32, TensorProto.INT16, TensorProto.BOOL
INT8, INT4, UINT8, UINT64 = TensorProto.INT8, TensorProto.INT4, TensorProto.UINT8, TensorProto.UINT64
node = helper.make_node


def value(name: str, kind: int = FLOAT, shape: tuple[Any, ...] = (4, 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str, kind: int, shape: tuple[int, ...], fill: float = 1) -> TensorProto:
    return helper.make_tensor(name, kind, shape, [fill] * int(np.prod(shape)))


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto] | None = None,
    weights: list[TensorProto] | None = None,
    kind: int = FLOAT,
    opset: int = 21,
) -> ModelProto:
    """A graph of these nodes over `x`, whose last node makes `y`."""
    output = helper.make_tensor_value_info("y", kind, None)
    inputs = [value("x")] if inputs is None else inputs
    graph = helper.make_graph(nodes, "graph", inputs, [output], weights or [])
    domains = {node.domain for node in nodes if node.domain}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def one(
    operator: str,
    inputs: str = "x",
    *more: onnx.ValueInfoProto | TensorProto,
    of: int = FLOAT,
    opset: int = 21,
    outputs: str = "y",
    **attributes: Any,
) -> ModelProto:
    """One node over `x` of a type, which its result has, and more inputs and weights of the graph."""
    names = ["" if name == "-" else name for name in inputs.split()]
    given = [item for item in more if isinstance(item, onnx.ValueInfoProto)]
    if "x" not in [item.name for item in given]:
        given.insert(0, value("x", of))
    weights = [item for item in more if isinstance(item, TensorProto)]
    return model([node(operator, names, outputs.split(), name="it", **attributes)], given, weights, of, opset)


def dequantized(
    weight: TensorProto, *scales: onnx.ValueInfoProto | TensorProto, **options: Any
) -> ModelProto:
    """A weight on scales."""
    inputs = [item for item in scales if isinstance(item, onnx.ValueInfoProto)]
    weights = [weight, *(item for item in scales if isinstance(item, TensorProto))]
    return model([node("DequantizeLinear", ["w", "s"], ["y"], **options)], inputs, weights)


def blocks(kind: int, shape: tuple[int, ...] = (64, 8), scales: tuple[int, ...] = (2, 8)) -> ModelProto:
    """A product over a weight in blocks."""
    nodes = [
        node("DequantizeLinear", ["w", "s"], ["d"], name="it", axis=0, block_size=32),
        node("MatMul", ["x", "d"], ["y"]),
    ]
    weights = [weight("w", kind, shape), weight("s", FLOAT, scales)]
    return model(nodes, [value("x", FLOAT, (2, shape[-2]))], weights)


def quantized(zero: int = 0, kind: int = INT8, scale: float = 0.1) -> ModelProto:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="it"),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    return model(nodes, None, [weight("s", FLOAT, (), scale), weight("z", kind, (), zero)])


def branches(inside: onnx.NodeProto) -> ModelProto:
    """`inside`, which makes `a` from `x` or `i`, in one of two branches."""
    results = [helper.make_tensor_value_info(name, FLOAT, None) for name in "ab"]
    chosen = helper.make_graph([inside], "then", [], results[:1])
    other = helper.make_graph([node("Neg", ["x"], ["b"])], "else", [], results[1:])
    choice = node("If", ["c"], ["y"], then_branch=chosen, else_branch=other)
    return model([choice], [value("x"), value("c", BOOL, ()), value("i", INT32)])


SCALE, SCALES = weight("s", FLOAT, ()), weight("s", FLOAT, (4,))
AXES = value("a", INT64, (1,))
SEQUENCE = [node("SequenceConstruct", ["x"], ["s"]), node("SequenceAt", ["s", "i"], ["y"])]
SUM_OF_INT32 = [node("DequantizeLinear", ["w", "s"], ["d"]), node("Add", ["x", "d"], ["y"])]

REFUSED: dict[str, ModelProto] = {
    "DynamicQuantizeLinear": one("DynamicQuantizeLinear", "x", value("x"), outputs="q s y", of=UINT8),
    "MatMulInteger": one("MatMulInteger", "x x", value("x", INT8), of=INT32),
    "BitwiseAnd": one("BitwiseAnd", "x x", of=INT32),
    "BitShift": one("BitShift", "x x", of=UINT64, direction="LEFT"),
    "Unique": one("Unique"),
    "Compress": one("Compress", "x c", value("c", BOOL, (4,))),
    "SequenceAt": model(SEQUENCE, [value("x"), value("i", INT64, ())]),
    "com.microsoft": one("GroupQueryAttention", domain="com.microsoft"),
    "ScatterND that adds": one(
        "ScatterND", "x i u", value("i", INT64, (2, 1)), value("u", FLOAT, (2, 4)), reduction="add"
    ),
    "computed axes": one("ReduceSum", "x a", AXES),
    "computed axes to squeeze": one("Squeeze", "x a", value("x", FLOAT, (1, 4)), AXES),
    "dynamic EyeLike": one("EyeLike", "x", value("x", FLOAT, ("n", 4))),
    "LayerNormalization's mean": one("LayerNormalization", "x s", SCALES, outputs="y m"),
    "products of whole numbers": one("MatMul", "x x", of=INT64),
    "Softmax of whole numbers": one("Softmax", of=INT64),
    "sums of bytes": one("Add", "x x", of=UINT8),
    "sums of booleans": one("Add", "x x", of=BOOL),
    "uint64": one("Identity", of=UINT64),
    "int16": one("Identity", of=INT16),
    "strings": one("Identity", of=TensorProto.STRING),
    "a cast to uint64": one("Cast", "x", value("x"), to=UINT64, of=UINT64),
    "asymmetric": quantized(5),
    "asymmetric uint8": quantized(128, UINT8),
    "a scale of zero": quantized(scale=0.0),
    "uint8 blocks": blocks(UINT8),
    "uint4 blocks": blocks(TensorProto.UINT4),
    "int16 blocks": blocks(INT16),
    "int32 weights": model(SUM_OF_INT32, None, [weight("w", INT32, (4,)), SCALE]),
    "blocks along the first of three axes": blocks(INT4, (64, 8, 8), (2, 8, 8)),
    "too few scales": dequantized(weight("w", INT8, (3, 4)), SCALES, axis=0),
    "dynamic scales": dequantized(weight("w", INT8, (3, 4)), value("s", FLOAT, ("n",)), axis=0),
    "inside a branch": branches(node("Unique", ["x"], ["a"])),
    "types inside a branch": branches(node("MatMul", ["i", "i"], ["a"])),
}
"""Graphs that every parser we know refuses."""

ACCEPTED: dict[str, ModelProto] = {
    "Relu": one("Relu"),
    "int4 blocks": blocks(INT4),
    "symmetric": quantized(),
    "If": branches(node("Relu", ["x"], ["a"])),
    "whole numbers": one("Add", "x x", of=INT64),
    "one scale for each channel": dequantized(weight("w", INT8, (3, 4)), SCALES, axis=1),
    "bfloat16": one("Softmax", of=BFLOAT16),
}


POWER = one("Pow", "x k", weight("k", INT64, (), 2))


def lint(graph: ModelProto, target: str) -> list[Finding]:
    return lint_graph(graph, "stage", RULES[target])


# 1. The oracle.


@pytest.fixture(scope="module")
def new_parser() -> Callable[[], Any]:
    """TensorRT-RTX's parser; what it refers to stays."""
    trt = pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    networks = []

    def make() -> Any:
        networks.append(builder.create_network(0))
        return trt.OnnxParser(networks[-1], logger)

    return make


@pytest.fixture(scope="module")
def parses(new_parser: Callable[[], Any]) -> Callable[[ModelProto], bool]:
    """Whether it takes a graph."""
    return lambda graph: bool(new_parser().parse(graph.SerializeToString()))


@pytest.mark.parametrize(
    ("name", "taken"), [*((name, False) for name in REFUSED), *((name, True) for name in ACCEPTED)]
)
def test_what_the_parser_refuses_is_found(
    parses: Callable[[ModelProto], bool], name: str, taken: bool
) -> None:
    graph = (REFUSED | ACCEPTED)[name]
    assert parses(graph) is taken
    assert (lint(graph, "tensorrt-rtx") == []) is taken


def test_the_operators_are_the_parsers(new_parser: Callable[[], Any]) -> None:
    parser = new_parser()
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    taken = {name for name in names if parser.supports_operator(name)}
    # The parser knows these and asks a plugin library for them, which TensorRT-RTX has not.
    assert taken - set(RULES["tensorrt-rtx"].operators) == {"NonZero", "RoiAlign"} & names
    missing = set(RULES["tensorrt-rtx"].operators) - taken
    assert missing & names == set()


KINDS = [FLOAT, HALF, BFLOAT16, INT32, INT64, BOOL, UINT8, TensorProto.UINT32]


@given(
    st.sampled_from(["Add", "MatMul", "Softmax", "Exp", "Sqrt", "Sigmoid", "Equal", "And", "Neg", "Concat"]),
    st.sampled_from(KINDS),
)
def test_no_type_slips_through(parses, operator: str, kind: int) -> None:
    names = ["x", "x"] if operator in ("Add", "MatMul", "Equal", "And", "Concat") else ["x"]
    attributes = {"axis": 0} if operator == "Concat" else {}
    result = BOOL if operator == "Equal" else kind
    graph = model([node(operator, names, ["y"], **attributes)], [value("x", kind)], kind=result)
    if not parses(graph):
        assert lint(graph, "tensorrt-rtx")
        assert lint(graph, "tensorrt-10.3")


# 2. TensorRT 10.3, which is on no package index.


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("target", ["tensorrt-10.3", "tensorrt-11"])
def test_older_and_full_versions_refuse_it_too(name: str, target: str) -> None:
    found = lint(REFUSED[name], target)
    assert found
    for finding in found:
        assert finding.stage == "stage"
        assert all((finding.node, finding.reason, finding.remedy))


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("target", ["tensorrt-10.3", "tensorrt-11"])
def test_older_and_full_versions_take_it_too(name: str, target: str) -> None:
    assert lint(ACCEPTED[name], target) == []


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (blocks(INT8), "int8 has a scale for each block; only int4 may"),
        (blocks(INT4, (2, 64, 8), (2, 2, 8)), "blocks in 3 dimensions; 2 are taken"),
        (blocks(INT4, (60, 8), (8, 8)), "blocks that do not divide the weight"),
        (blocks(INT4, (64, 8), (2, 2)), "blocks along more than one axis"),
        (one("RMSNormalization", "x s", SCALES, opset=23), "no such operator"),
        (one("Attention", "x x x", value("x", HALF, (1, 1, 4, 4)), opset=23), "no such operator"),
        (one("RotaryEmbedding", "x c c", opset=23), "no such operator"),
        (one("TensorScatter", "x x", opset=24), "no such operator"),
        (one("STFT", "x f", value("f", INT64, ())), "no such operator"),
        (one("Relu", opset=22), "opset 22; known are 9 to 21"),
        (one("Relu", opset=8), "opset 8; known are 9 to 21"),
        (POWER, "reads int64; it takes bfloat16, double, float, float16"),
        (one("CumSum", "x a", value("a", INT64, ())), "input 1 is computed; a constant is needed"),
        (one("TopK", "x k", weight("k", INT64, (1,)), outputs="y i", sorted=0), "unsorted"),
        (dequantized(weight("w", TensorProto.FLOAT8E4M3FN, (4, 4)), SCALE), "Orin's GPU .* has no float8"),
        (one("DequantizeLinear", "x s", value("x", INT4), SCALE), "computed int4; only weights may be int4"),
        (dequantized(weight("w", INT4, (3, 3)), SCALE), "an odd number of int4 values"),
        (one("Identity", of=TensorProto.FLOAT4E2M1), "the type float4e2m1 is unknown"),
        (blocks(INT4, (64, 8), (2, 8, 2)), "3 dimensions of scales for 2"),
        (one("QuantizeLinear", "x s", value("x"), SCALE, of=UINT8), "no zero point means uint8"),
        (one("QuantizeLinear", "x s z", value("x"), value("z", INT8, ()), SCALE, of=INT8), "is computed"),
    ],
)
def test_refused_by_10_3(graph: ModelProto, reason: str) -> None:
    found = lint(graph, "tensorrt-10.3")
    assert any(re.search(reason, finding.reason) for finding in found), found


def test_newer_versions_know_more() -> None:
    for graph in (blocks(INT8), one("RMSNormalization", "x s", SCALES, opset=23), POWER):
        assert lint(graph, "tensorrt-10.3")
        assert lint(graph, "tensorrt-11") == lint(graph, "tensorrt-rtx") == []


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (one("Attention", "x x x - x x", outputs="y k v", opset=23), "only its first output is taken"),
        (one("Attention", "x x x - x x", opset=23), "a cache inside Attention is not taken"),
        (one("Attention", "x x x", softcap=2.0, opset=23), "softcap is not taken"),
        (one("TensorScatter", "x x", axis=1, opset=24), "only axis -2 is taken"),
        (one("BatchNormalization", "x x x x x", training_mode=1), "training mode is not taken"),
        (one("Constant", "", value_string=b"x"), "value_string is not taken"),
    ],
)
def test_attributes_that_newer_versions_refuse(graph: ModelProto, reason: str) -> None:
    assert reason in [finding.reason for finding in lint(graph, "tensorrt-11")]


def test_what_is_outside_the_file_is_not_judged() -> None:
    graph = quantized(5)
    zero = graph.graph.initializer[1]
    zero.ClearField("int32_data")
    zero.data_location = TensorProto.EXTERNAL
    zero.external_data.add(key="location", value="gone.data")
    assert lint(graph, "tensorrt-10.3") == []


def test_a_function_of_the_model_is_looked_into() -> None:
    body = helper.make_function(
        "own", "Twice", ["a"], ["b"], [node("Unique", ["a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    graph = model([node("Twice", ["x"], ["y"], domain="own")])
    graph.functions.append(body)
    (finding,) = lint(graph, "tensorrt-10.3")
    assert finding.operator == "Unique"


def test_lists_of_graphs_are_looked_into() -> None:
    result = helper.make_tensor_value_info("a", FLOAT, None)
    body = helper.make_graph([node("Unique", ["x"], ["a"])], "body", [], [result])
    found = lint(one("Choose", domain="own", bodies=[body, body]), "tensorrt-10.3")
    assert [finding.operator for finding in found] == ["Choose", "Unique", "Unique"]


def test_a_constant_node_is_a_constant() -> None:
    nodes = [
        node("Constant", [], ["a"], value=numpy_helper.from_array(np.array([0], np.int64))),
        node("ReduceSum", ["x", "a"], ["y"]),
    ]
    assert lint(model(nodes), "tensorrt-10.3") == []
    nodes[0] = node("Constant", [], ["a"], value_ints=[0])
    assert lint(model(nodes), "tensorrt-10.3") == []


# 3. Our own graphs.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_our_graphs(stage: str, precision: str, tmp_path: Path) -> None:
    recipe = Recipe(precision, search="rtn", ranges=UnitRanges())
    path = save_random_stage(tmp_path, config_of(BLOCKY), stage, recipe)
    graph = onnx.load(path, load_external_data=False)
    assert lint(graph, "tensorrt-rtx") == lint(graph, "tensorrt-11") == []
    old = lint_graph(graph, stage, RULES["tensorrt-10.3"])
    for target in RULES:  # what packs several texts is refused by none
        packed = lint_graph(pack_rows(graph, 2, path.name), stage, RULES[target])
        known = lint_graph(graph, stage, RULES[target])
        assert {finding.reason for finding in packed} == {finding.reason for finding in known}
    if precision != "int8w":
        assert old == []
        return
    # The one precision that TensorRT 10.3 has not: 8-bit weights in blocks.
    assert {finding.operator for finding in old} == {"DequantizeLinear"}
    assert {finding.reason for finding in old} == {"int8 has a scale for each block; only int4 may"}
    assert all(f"{stage}=fp16" in finding.remedy for finding in old)


# 4. Bundles.


def test_a_bundle_names_its_stages(tmp_path: Path) -> None:
    onnx.save(one("Relu"), tmp_path / "a.onnx")
    onnx.save(one("Unique"), tmp_path / "b.onnx")
    manifest: Any = SimpleNamespace(
        stages={"first": SimpleNamespace(file="a.onnx"), "second": SimpleNamespace(file="b.onnx")}
    )
    (finding,) = lint_bundle(tmp_path, manifest, "tensorrt-10.3")
    assert (finding.stage, finding.node, finding.operator) == ("second", "it", "Unique")
    with pytest.raises(OptionError, match=r"got 'tensorrt-7', known are tensorrt-10\.3"):
        lint_bundle(tmp_path, manifest, "tensorrt-7")
    (tmp_path / "b.onnx").write_bytes(b"\xff" * 99)
    with pytest.raises(BundleError, match=r"b\.onnx is not a graph"):
        lint_bundle(tmp_path, manifest, "tensorrt-10.3")


@pytest.mark.parametrize(
    ("version", "rules"),
    [
        ("10.3.0.26", "tensorrt-10.3"),
        ("10.0", "tensorrt-10.3"),
        ("10.12.1", "tensorrt-10.3"),
        ("10.13.0", None),
        ("11.0.0", None),
        ("10", None),
        ("ten.three", None),
        ("", None),
    ],
)
def test_which_versions_are_old(version: str, rules: str | None) -> None:
    assert rules_of_old(version) == rules
