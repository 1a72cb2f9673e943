"""The linter against TensorRT-RTX's own parser, and rule by rule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from blt_edge.export.lint_tensorrt import RULES, Finding, lint_bundle, lint_graph, rules_of_old
from blt_edge.graphs.quantize import Recipe
from blt_edge.runtime.errors import BundleError, OptionError
from blt_edge.runtime.names import PRECISIONS, STAGES
from support.quantized import BLOCKY, UnitRanges, config_of, save_random_stage

FLOAT, HALF, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
INT8, INT4, UINT8 = TensorProto.INT8, TensorProto.INT4, TensorProto.UINT8


def value(name: str, kind: int = FLOAT, shape: tuple[Any, ...] = (4, 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str, kind: int, shape: tuple[int, ...], fill: float = 1) -> TensorProto:
    count = int(np.prod(shape))
    return helper.make_tensor(name, kind, shape, [fill] * count)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto] | None = None,
    weights: list[TensorProto] | None = None,
    kind: int = FLOAT,
    opset: int = 21,
) -> ModelProto:
    """A graph of these nodes over `x`, whose last node makes `y`."""
    output = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(
        nodes, "graph", [value("x")] if inputs is None else inputs, [output], weights or []
    )
    domains = {node.domain for node in nodes if node.domain}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


node = helper.make_node


def one(operator: str, inputs: str = "x", **options: Any) -> ModelProto:
    """One node; the names in `inputs` are the graph's, but for weights that are given."""
    given_inputs = options.pop("graph_inputs", None)
    weights, kind, opset = (
        options.pop("weights", None),
        options.pop("kind", FLOAT),
        options.pop("opset", 21),
    )
    outputs = options.pop("outputs", "y").split()
    names = ["" if name == "-" else name for name in inputs.split()]
    return model([node(operator, names, outputs, name="it", **options)], given_inputs, weights, kind, opset)


def blocks(kind: int, shape: tuple[int, ...] = (64, 8), scales: tuple[int, ...] = (2, 8)) -> ModelProto:
    """A product over a weight in blocks."""
    nodes = [
        node("DequantizeLinear", ["w", "s"], ["d"], name="it", axis=0, block_size=32),
        node("MatMul", ["x", "d"], ["y"]),
    ]
    rows = shape[-2]
    return model(
        nodes, [value("x", FLOAT, (2, rows))], [weight("w", kind, shape), weight("s", FLOAT, scales)]
    )


def quantized(zero: int = 0, kind: int = INT8, **weights: float) -> ModelProto:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="it"),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    return model(
        nodes, None, [weight("s", FLOAT, (), weights.get("scale", 0.1)), weight("z", kind, (), zero)]
    )


def branches(inside: onnx.NodeProto) -> ModelProto:
    """`inside`, which makes `a` from `x` or `i`, in one of two branches."""
    chosen = helper.make_graph([inside], "then", [], [helper.make_tensor_value_info("a", FLOAT, None)])
    other = helper.make_graph(
        [node("Neg", ["x"], ["b"])], "else", [], [helper.make_tensor_value_info("b", FLOAT, None)]
    )
    return model(
        [node("If", ["c"], ["y"], then_branch=chosen, else_branch=other)],
        [value("x"), value("c", BOOL, ()), value("i", TensorProto.INT32)],
    )


REFUSED: dict[str, Callable[[], ModelProto]] = {
    "DynamicQuantizeLinear": lambda: one("DynamicQuantizeLinear", outputs="q s y", kind=UINT8),
    "MatMulInteger": lambda: one(
        "MatMulInteger", "x x", graph_inputs=[value("x", INT8)], kind=TensorProto.INT32
    ),
    "BitwiseAnd": lambda: one(
        "BitwiseAnd", "x x", graph_inputs=[value("x", TensorProto.INT32)], kind=TensorProto.INT32
    ),
    "BitShift": lambda: one(
        "BitShift",
        "x x",
        graph_inputs=[value("x", TensorProto.UINT64)],
        kind=TensorProto.UINT64,
        direction="LEFT",
    ),
    "Unique": lambda: one("Unique"),
    "Compress": lambda: one("Compress", "x c", graph_inputs=[value("x"), value("c", BOOL, (4,))]),
    "SequenceAt": lambda: model(
        [node("SequenceConstruct", ["x"], ["s"]), node("SequenceAt", ["s", "i"], ["y"])],
        [value("x"), value("i", INT64, ())],
    ),
    "com.microsoft": lambda: one("GroupQueryAttention", domain="com.microsoft"),
    "ScatterND that adds": lambda: one(
        "ScatterND",
        "x i u",
        graph_inputs=[value("x"), value("i", INT64, (2, 1)), value("u", FLOAT, (2, 4))],
        reduction="add",
    ),
    "computed axes": lambda: one("ReduceSum", "x a", graph_inputs=[value("x"), value("a", INT64, (1,))]),
    "computed axes to squeeze": lambda: one(
        "Squeeze", "x a", graph_inputs=[value("x", FLOAT, (1, 4)), value("a", INT64, (1,))]
    ),
    "dynamic EyeLike": lambda: one("EyeLike", graph_inputs=[value("x", FLOAT, ("n", 4))]),
    "LayerNormalization's mean": lambda: one(
        "LayerNormalization", "x s", weights=[weight("s", FLOAT, (4,))], outputs="y m"
    ),
    "products of whole numbers": lambda: one("MatMul", "x x", graph_inputs=[value("x", INT64)], kind=INT64),
    "Softmax of whole numbers": lambda: one("Softmax", graph_inputs=[value("x", INT64)], kind=INT64),
    "sums of bytes": lambda: one("Add", "x x", graph_inputs=[value("x", UINT8)], kind=UINT8),
    "sums of booleans": lambda: one("Add", "x x", graph_inputs=[value("x", BOOL)], kind=BOOL),
    "uint64": lambda: one("Identity", graph_inputs=[value("x", TensorProto.UINT64)], kind=TensorProto.UINT64),
    "int16": lambda: one("Identity", graph_inputs=[value("x", TensorProto.INT16)], kind=TensorProto.INT16),
    "strings": lambda: one(
        "Identity", graph_inputs=[value("x", TensorProto.STRING)], kind=TensorProto.STRING
    ),
    "a cast to uint64": lambda: one("Cast", to=TensorProto.UINT64, kind=TensorProto.UINT64),
    "asymmetric": lambda: quantized(5),
    "asymmetric uint8": lambda: quantized(128, UINT8),
    "a scale of zero": lambda: quantized(scale=0.0),
    "uint8 blocks": lambda: blocks(UINT8),
    "uint4 blocks": lambda: blocks(TensorProto.UINT4),
    "int16 blocks": lambda: blocks(TensorProto.INT16),
    "int32 weights": lambda: model(
        [node("DequantizeLinear", ["w", "s"], ["d"]), node("Add", ["x", "d"], ["y"])],
        None,
        [weight("w", TensorProto.INT32, (4,)), weight("s", FLOAT, (), 0.1)],
    ),
    "blocks along the first of three axes": lambda: blocks(INT4, (64, 8, 8), (2, 8, 8)),
    "too few scales": lambda: model(
        [node("DequantizeLinear", ["w", "s"], ["y"], axis=0)],
        [],
        [weight("w", INT8, (3, 4)), weight("s", FLOAT, (4,))],
    ),
    "dynamic scales": lambda: model(
        [node("DequantizeLinear", ["w", "s"], ["y"], axis=0)],
        [value("s", FLOAT, ("n",))],
        [weight("w", INT8, (3, 4))],
    ),
    "inside a branch": lambda: branches(node("Unique", ["x"], ["a"])),
    "types inside a branch": lambda: branches(node("MatMul", ["i", "i"], ["a"])),
}
"""Graphs that every parser we know refuses."""

ACCEPTED: dict[str, Callable[[], ModelProto]] = {
    "Relu": lambda: one("Relu"),
    "int4 blocks": lambda: blocks(INT4),
    "symmetric": lambda: quantized(),
    "If": lambda: branches(node("Relu", ["x"], ["a"])),
    "whole numbers": lambda: one("Add", "x x", graph_inputs=[value("x", INT64)], kind=INT64),
    "one scale for each channel": lambda: model(
        [node("DequantizeLinear", ["w", "s"], ["y"], axis=1)],
        [],
        [weight("w", INT8, (3, 4)), weight("s", FLOAT, (4,))],
    ),
    "bfloat16": lambda: one(
        "Softmax", graph_inputs=[value("x", TensorProto.BFLOAT16)], kind=TensorProto.BFLOAT16
    ),
}


def lint(graph: ModelProto, target: str) -> list[Finding]:
    return lint_graph(graph, "stage", RULES[target])


# 1. The oracle.


@pytest.fixture(scope="module")
def parses() -> Callable[[ModelProto], bool]:
    """Whether TensorRT-RTX's parser takes a graph."""
    trt = pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)

    def parse(graph: ModelProto) -> bool:
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        return bool(parser.parse(graph.SerializeToString()))

    return parse


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_parser_refuses_is_found(parses, name: str) -> None:
    graph = REFUSED[name]()
    assert not parses(graph)
    assert lint(graph, "tensorrt-rtx")


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_parser_takes_is_not_found(parses, name: str) -> None:
    graph = ACCEPTED[name]()
    assert parses(graph)
    assert lint(graph, "tensorrt-rtx") == []


def test_the_operators_are_the_parsers() -> None:
    trt = pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    taken = {name for name in names if parser.supports_operator(name)}
    # The parser knows these and asks a plugin library for them, which TensorRT-RTX has not.
    assert taken - set(RULES["tensorrt-rtx"].operators) == {"NonZero", "RoiAlign"} & names
    missing = set(RULES["tensorrt-rtx"].operators) - taken
    assert missing & names == set()


KINDS = [FLOAT, HALF, TensorProto.BFLOAT16, TensorProto.INT32, INT64, BOOL, UINT8, TensorProto.UINT32]


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
    found = lint(REFUSED[name](), target)
    assert found
    for finding in found:
        assert finding.stage == "stage"
        assert finding.node
        assert finding.reason
        assert finding.remedy


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("target", ["tensorrt-10.3", "tensorrt-11"])
def test_older_and_full_versions_take_it_too(name: str, target: str) -> None:
    assert lint(ACCEPTED[name](), target) == []


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (blocks(INT8), "int8 has a scale for each block; only int4 may"),
        (blocks(INT4, (2, 64, 8), (2, 2, 8)), "blocks in 3 dimensions; 2 are taken"),
        (blocks(INT4, (60, 8), (8, 8)), "blocks that do not divide the weight"),
        (blocks(INT4, (64, 8), (2, 2)), "blocks along more than one axis"),
        (one("RMSNormalization", "x s", weights=[weight("s", FLOAT, (4,))], opset=23), "no such operator"),
        (
            one("Attention", "x x x", graph_inputs=[value("x", HALF, (1, 1, 4, 4))], opset=23),
            "no such operator",
        ),
        (one("RotaryEmbedding", "x c c", opset=23), "no such operator"),
        (one("TensorScatter", "x x", opset=24), "no such operator"),
        (one("STFT", "x f", graph_inputs=[value("x"), value("f", INT64, ())]), "no such operator"),
        (one("Relu", opset=22), "opset 22; known are 9 to 21"),
        (one("Relu", opset=8), "opset 8; known are 9 to 21"),
        (
            one("Pow", "x k", weights=[weight("k", INT64, (), 2)]),
            "reads int64; it takes bfloat16, double, float, float16",
        ),
        (
            one("CumSum", "x a", graph_inputs=[value("x"), value("a", INT64, ())]),
            "input 1 is computed; a constant is needed",
        ),
        (one("TopK", "x k", weights=[weight("k", INT64, (1,))], outputs="y i", sorted=0), "unsorted"),
        (
            model(
                [node("DequantizeLinear", ["w", "s"], ["y"])],
                [],
                [weight("w", TensorProto.FLOAT8E4M3FN, (4, 4)), weight("s", FLOAT, ())],
            ),
            "Orin's GPU (compute capability 8.7) has no float8",
        ),
        (
            model(
                [node("DequantizeLinear", ["x", "s"], ["y"], axis=0)],
                [value("x", INT4)],
                [weight("s", FLOAT, ())],
            ),
            "computed int4; only weights may be int4",
        ),
        (
            model(
                [node("DequantizeLinear", ["w", "s"], ["y"])],
                [],
                [weight("w", INT4, (3, 3)), weight("s", FLOAT, ())],
            ),
            "an odd number of int4 values",
        ),
        (
            model([node("QuantizeLinear", ["x", "s"], ["y"])], None, [weight("s", FLOAT, ())], UINT8),
            "no zero point means uint8",
        ),
        (
            model(
                [node("QuantizeLinear", ["x", "s", "z"], ["y"])],
                [value("x"), value("z", INT8, ())],
                [weight("s", FLOAT, ())],
                INT8,
            ),
            "its zero point is computed",
        ),
    ],
)
def test_refused_by_10_3(graph: ModelProto, reason: str) -> None:
    found = lint(graph, "tensorrt-10.3")
    assert any(reason in finding.reason for finding in found), found


def test_newer_versions_know_more() -> None:
    for graph in (
        blocks(INT8),
        one("RMSNormalization", "x s", weights=[weight("s", FLOAT, (4,))], opset=23),
        one("Pow", "x k", weights=[weight("k", INT64, (), 2)]),
    ):
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
        (one("Constant", "", graph_inputs=[], value_string=b"x"), "value_string is not taken"),
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
