"""Products of whole integers compute what products over blocks do, to the rounding that they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from blt_edge.graphs.block_products import block_product
from blt_edge.graphs.prefill_products import write_prefill_products
from blt_edge.graphs.surgery import add_constant, input_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support.block_graphs import exact, run

OPERATORS = ["Abs", "ReduceMax", "Max", "Mul", "Div", "QuantizeLinear", "MatMulIntegerToFloat", "Mul"]


def constant(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def of_integers(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """What a rewritten product of x should be, in float64: the oracle, by the module's own words."""
    weight, scales = (constant(model, name) for name in ("weight.prefill", "weight.prefill_scales"))
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30))
    scale = (largest * np.float32(1 / 127)).astype(np.float32)
    integers = np.rint((x / scale).astype(np.float32)).astype(np.float64)
    return (integers @ weight.astype(np.float64)) * scales * scale


def inputs(rows: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    sizes = 10.0 ** random.integers(-20, 20, (rows, 1))
    return (random.standard_normal((rows, 64)) * sizes).astype(np.float32)


@given(st.sampled_from([4, 8]), st.sampled_from([32, 64]), st.integers(1, 70), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_the_product_is_that_of_the_integers(bits: int, block: int, rows: int, seed: int) -> None:
    model, x = block_product(64, block, bits), inputs(rows, seed)
    assert write_prefill_products(model, 7) == 1
    assert [node.op_type for node in model.graph] == OPERATORS
    found, wanted = run(model, x), of_integers(model, x)
    sizes = np.abs(wanted).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found / sizes, wanted / sizes, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "most"), [(7, 0.02), (8, 0.015)])
@pytest.mark.parametrize("stored", [4, 8])
def test_it_is_close_to_the_product_over_blocks(bits: int, most: float, stored: int) -> None:
    model = block_product(64, 32, stored)
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    wanted = exact(model, x)
    write_prefill_products(model, bits)
    assert np.linalg.norm(of_integers(model, x) - wanted) < most * np.linalg.norm(wanted)


@pytest.mark.parametrize(("bits", "most"), [(7, 63), (8, 127)])
def test_integers_of_a_weight_reach_as_far_as_their_bits(bits: int, most: int) -> None:
    model = block_product(64, 32, 8)
    write_prefill_products(model, bits)
    weight = constant(model, "weight.prefill")
    assert weight.dtype == np.int8
    # Of each output: what overflows 16 bits in pairs would be one beyond 63.
    assert (np.abs(weight.astype(int)).max(axis=0) == most).all()


def test_a_row_of_zeros_gives_zeros_and_one_beyond_all_numbers_is_told() -> None:
    model, x = block_product(64, 32, 8), inputs(20, 3)
    write_prefill_products(model, 7)
    wanted = run(model, x)
    x[4], x[8, 1] = 0, np.inf
    found = run(model, x)
    assert (found[4] == 0).all()
    assert not np.isfinite(found[8]).any()
    others = [row for row in range(20) if row not in (4, 8)]
    assert np.array_equal(found[others], wanted[others])


def test_an_output_whose_weights_are_zeros_gives_zeros() -> None:
    model = block_product(64, 32, 8)
    scales = constant(model, "scales").copy()
    scales[:, 5] = 0
    model.graph.initializers["scales"].const_value = ir.tensor(scales, name="scales")
    write_prefill_products(model, 7)
    found = run(model, inputs(3, 0))
    assert (found[:, 5] == 0).all()
    assert found[:, 4].all()


def test_products_of_the_same_input_round_it_once() -> None:
    model = block_product(64, 32, 8)
    graph = model.graph
    product = next(node for node in graph if node.op_type == "MatMul")
    other = [
        add_constant(graph, f"other_{name}", ir.tensor(constant(model, name), name=f"other_{name}"))
        for name in ("weight", "scales")
    ]
    unpack = ir.node("DequantizeLinear", other, {"axis": 0, "block_size": 32})
    unpack.outputs[0].name = "other_unpacked"
    second = ir.node("MatMul", [input_of(product, 0), unpack.outputs[0]], name="second")
    graph.append(unpack)
    result = second.outputs[0]
    result.name, result.shape, result.type = "z", product.outputs[0].shape, product.outputs[0].type
    graph.append(second)
    graph.outputs.append(result)
    assert write_prefill_products(model, 7) == 2
    operators = [node.op_type for node in graph]
    assert operators.count("QuantizeLinear") == 1
    assert operators.count("MatMulIntegerToFloat") == 2


def test_a_graph_without_blocks_is_left_alone() -> None:
    model = block_product(64, 32, 4)
    next(iter(model.graph)).attributes.pop("block_size")
    before = [node.op_type for node in model.graph]
    assert write_prefill_products(model, 8) == 0
    assert [node.op_type for node in model.graph] == before


def test_weights_are_written_one_by_one(tmp_path: Path) -> None:
    model = block_product(64, 32, 8)
    write_prefill_products(model, 8)
    weights = [
        value.const_value
        for name, value in model.graph.initializers.items()
        if name.startswith("weight.prefill")
    ]
    assert len(weights) == 2
    assert all(isinstance(tensor, ir.LazyTensor) for tensor in weights)
    ir.save(model, tmp_path / "graph.onnx", external_data="graph.onnx.data")
    loaded = ort.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    x = inputs(18, 1)
    assert np.array_equal(loaded.run(None, {"x": x})[0], run(model, x))
