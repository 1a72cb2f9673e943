"""Weights to integers against plain loops; rewritten graphs: what they are made of, what they compute."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from blt_edge.graphs.quantize import (
    Quantized,
    Recipe,
    WeightFactors,
    block_sizes,
    linear_products,
    quantize_weight,
    rewrite_stage,
)
from blt_edge.graphs.stages import build_stage
from blt_edge.graphs.surgery import add_constant
from blt_edge.runtime.backends import ort_session as ort
from blt_edge.runtime.backends.ort_session import session_options
from blt_edge.runtime.errors import BltError, OptionError
from blt_edge.runtime.names import BLOCK_PRECISIONS, PRECISIONS, STAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.quantized import BLOCKY, SPREAD, UnitRanges, build, config_of, one_row, random_feeds, session

CONFIG = config_of(BLOCKY)
FLOAT32 = Recipe("fp32")
LIMITS = {4: (-8, 7), 8: (-127, 127)}


# 1. Weights to integers.


def random_weight(rows: int, columns: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_t(4, (rows, columns)) * 0.05).astype(np.float32)


def dequantize(quantized: Quantized) -> np.ndarray:
    block = len(quantized.values) // len(quantized.scales)
    return quantized.values * quantized.scales.repeat(block, axis=0)


def block_errors(weight: np.ndarray, quantized: Quantized) -> np.ndarray:
    rest = (weight - dequantize(quantized)).astype(np.float64)
    return (rest.reshape(len(quantized.scales), -1, weight.shape[1]) ** 2).sum(axis=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_rounding_to_nearest_is_what_a_plain_loop_gives(bits: int, block: int) -> None:
    weight = random_weight(128, 5)
    found = quantize_weight(weight, bits, block, "rtn")
    for column in range(5):
        for start in range(0, 128, block):
            part = weight[start : start + block, column]
            scale = np.float32(np.abs(part).max() / np.float32(LIMITS[bits][1]))
            assert found.scales[start // block, column] == scale
            wanted = np.rint(part / scale).astype(np.int8)
            np.testing.assert_array_equal(found.values[start : start + block, column], wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 96])
def test_search_is_never_worse_and_mostly_better(bits: int, block: int) -> None:
    weight = random_weight(96, 300)
    plain = block_errors(weight, quantize_weight(weight, bits, block, "rtn"))
    searched = block_errors(weight, quantize_weight(weight, bits, block, "mse"))
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()
    assert searched.sum() < plain.sum() * (0.9 if bits == 4 else 1.0)


def test_search_comes_close_to_trying_a_thousand_scales() -> None:
    weight = random_weight(32, 20)
    searched = block_errors(weight, quantize_weight(weight, 4, 32, "mse"))[0]
    best = np.full(20, np.inf)
    for share in np.linspace(0.4, 1.1, 1001):
        scale = np.abs(weight).max(axis=0) / 7 * share
        rest = weight - np.clip(np.rint(weight / scale), -8, 7) * scale
        best = np.minimum(best, (rest.astype(np.float64) ** 2).sum(axis=0))
    assert (searched <= best * 1.06).all()
    assert searched.sum() <= best.sum() * 1.02


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([(32, 3), (64, 1), (64, 40)]),
        elements=st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False),
    ),
    st.sampled_from([4, 8]),
    st.sampled_from(["mse", "rtn"]),
)
def test_any_finite_weight(weight: np.ndarray, bits: int, search: str) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = quantize_weight(weight, bits, 32, search)
    low, high = LIMITS[bits]
    assert found.values.dtype == np.int8
    assert low <= found.values.min() <= found.values.max() <= high
    assert np.isfinite(found.scales).all()
    assert (found.scales > 0).all()


def test_zeros_stay_zeros() -> None:
    found = quantize_weight(np.zeros((64, 7), np.float32), 4, 32)
    assert not found.values.any()
    assert (found.scales == 1).all()


@pytest.mark.parametrize("search", ["mse", "rtn"])
def test_what_fits_the_grid_is_exact(search: str) -> None:
    values = np.random.default_rng(1).integers(-7, 8, (64, 9)).astype(np.float32) * 0.5
    values[::32] = 3.5
    np.testing.assert_allclose(dequantize(quantize_weight(values, 4, 32, search)), values, atol=1e-6)


def test_factors() -> None:
    weight = random_weight(4, 3)
    rows, columns = np.float32([1, 2, 3, 4]), np.float32([5, 6, 7])
    np.testing.assert_array_equal(WeightFactors().apply(weight), weight)
    expected = np.diag(rows) @ weight @ np.diag(columns)
    np.testing.assert_allclose(WeightFactors(rows, columns).apply(weight), expected, rtol=1e-6)
    np.testing.assert_array_equal(WeightFactors(columns=columns).apply(weight[0]), weight[0] * columns)


# 2. The rewritten graph.


def recipe(precision: str, **values: object) -> Recipe:
    return Recipe(precision, ranges=UnitRanges(), **values)


def initializers(model: ir.Model) -> dict[str, np.ndarray]:
    values = model.graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in values if value.const_value is not None}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_weight_product_but_the_heads_is_rewritten(stage: str, precision: str) -> None:
    before, after = build(CONFIG, stage, FLOAT32), build(CONFIG, stage, recipe(precision))
    if precision == "fp32":
        assert ir.to_proto(after) == ir.to_proto(before)
        return
    products = len(linear_products(before.graph))
    assert linear_products(after.graph) == []
    operators, casts = (Counter(node.op_type for node in model.graph) for model in (after, before))
    unpacked = {"fp16": 0, "int8": 2 * products}.get(precision, products)
    assert operators["DequantizeLinear"] == unpacked
    assert operators["Cast"] - casts["Cast"] == (2 * products if precision == "fp16" else 0)
    assert operators["QuantizeLinear"] == (products if precision == "int8" else 0)
    assert after.graph.opset_imports[""] == (21 if precision in BLOCK_PRECISIONS else 20)
    assert [value.name for value in after.graph.outputs] == [value.name for value in before.graph.outputs]
    for name in before.graph.initializers:
        if name.endswith(("lm_head.weight", "embed_tokens.weight", "norm.weight", "inv_freq")):
            assert after.graph.initializers[name].dtype == ir.DataType.FLOAT
    kinds = {value.dtype for name, value in after.graph.initializers.items() if name.endswith(".int4")}
    assert kinds == ({ir.DataType.INT4} if precision == "int4" else set())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("precision", "most"), [("fp16", 3e-3), ("int8", 0.15), ("int8w", 0.03), ("int4", 0.35)]
)
def test_results_stay_close(stage: str, precision: str, most: float) -> None:
    plain = session(build(CONFIG, stage, FLOAT32))
    changed = session(build(CONFIG, stage, recipe(precision)), precision)
    inputs = random_feeds(plain, 9)
    for ours, theirs in zip(changed.run(None, inputs), plain.run(None, inputs), strict=True):
        assert np.linalg.norm(ours - theirs) <= most * np.linalg.norm(theirs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 5])
def test_a_row_does_not_depend_on_the_rows_beside_it(stage: str, precision: str, count: int) -> None:
    running = session(build(CONFIG, stage, recipe(precision)), precision)
    inputs = random_feeds(running, count, batch=2, seed=1)
    # The neighbour is a thousand times louder: a scale taken from the call would show at once.
    for name, array in inputs.items():
        if array.dtype == np.float32 and name != "patch_values":
            array[1] *= 1000
    for alone, both in zip(running.run(None, one_row(inputs, 0)), running.run(None, inputs), strict=True):
        row = both[:, :1] if both.ndim == 5 else both[:1]
        np.testing.assert_allclose(alone, row, rtol=0, atol=1e-6 * max(1, np.abs(alone).max()))


@pytest.mark.parametrize("stage", ["patcher", "encoder"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_position_does_not_depend_on_the_positions_after_it(stage: str, precision: str) -> None:
    running = session(build(CONFIG, stage, recipe(precision)), precision)
    inputs = random_feeds(running, 8)
    new = ("byte_ids", "byte_embeds", "positions")
    first = {name: array[:, :1] if name in new else array for name, array in inputs.items()}
    for chunk, step in zip(running.run(None, inputs), running.run(None, first), strict=True):
        part = chunk[:, :, :, :1] if chunk.ndim == 5 else chunk[:, :1]
        np.testing.assert_allclose(part, step, rtol=0, atol=2e-6 * max(1, np.abs(step).max()))


def test_int8_weights_and_scales_are_per_output_and_int4_per_block() -> None:
    before = initializers(build(CONFIG, "encoder", FLOAT32))
    after = initializers(build(CONFIG, "encoder", recipe("int8")))
    name = "encoder.stack.layers.0.mlp.down_proj.weight"
    found = after[f"{name}.int8"] * after[f"{name}.scales"]
    np.testing.assert_allclose(found, before[name], atol=np.abs(before[name]).max() / 120)
    assert after[f"{name}.scales"].shape == (before[name].shape[1],)
    assert after[f"{name}.input_scale"] == np.float32(SPREAD / 127)
    after = initializers(build(CONFIG, "latent", recipe("int4", search="rtn")))
    name = "latent.stack.layers.0.mlp.gate_up_proj.weight"
    assert after[f"{name}.int4"].shape == (64, 192)
    assert after[f"{name}.scales"].shape == (2, 192)


@pytest.mark.parametrize("stage", STAGES)
def test_int8_weights_have_written_zero_points(stage: str) -> None:
    # ONNX Runtime 1.22 to 1.29 ends the process without them, on x86 without VNNI.
    model = build(CONFIG, stage, recipe("int8"))
    weights = [
        node for node in model.graph if node.op_type == "DequantizeLinear" and node.inputs[0].const_value
    ]
    assert weights
    for node in weights:
        zeros = node.inputs[2].const_value
        assert zeros.dtype == ir.DataType.INT8
        assert not zeros.numpy().any()


def test_each_weight_is_read_once_when_written_in_order() -> None:
    model = build_stage(CONFIG, "decoder")
    reads: Counter[str] = Counter()
    for name, value in model.graph.initializers.items():
        if value.const_value is None:

            def load(name: str = name, shape: tuple[int, ...] = tuple(value.shape.numpy())) -> ir.Tensor:
                reads[name] += 1
                return ir.tensor(np.ones(shape, np.float32))

            value.const_value = ir.LazyTensor(load, ir.DataType.FLOAT, ir.Shape(value.shape), name=name)
    rewrite_stage(model, recipe("int4"))
    assert not reads
    for value in model.graph.initializers.values():
        value.const_value.tobytes()
    assert set(reads.values()) == {1}
    # Without the integers before them, scales are found from the weight again.
    scales = next(value for name, value in model.graph.initializers.items() if name.endswith(".scales"))
    assert scales.const_value.numpy().shape == scales.shape.numpy()


def test_factors_change_weights_before_they_are_quantized() -> None:
    plain = build(CONFIG, "encoder", FLOAT32)
    name = linear_products(plain.graph)[0].inputs[1].name
    rows = np.linspace(0.5, 2, 32, dtype=np.float32)
    norm = "encoder.stack.layers.0.input_layernorm.weight"
    factors = {name: WeightFactors(rows=rows), norm: WeightFactors(columns=1 / rows)}
    smoothed = build(CONFIG, "encoder", Recipe("fp32", factors=factors))
    np.testing.assert_array_equal(initializers(smoothed)[name], initializers(plain)[name] * rows[:, None])
    ours, theirs = session(smoothed), session(plain)
    inputs = random_feeds(ours, 3)
    for found, wanted in zip(ours.run(None, inputs), theirs.run(None, inputs), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_block_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"64 does not divide the 32 inputs of encoder\.stack"):
        build(CONFIG, "encoder", recipe("int4", block_size=64))


@pytest.mark.parametrize("precision", BLOCK_PRECISIONS)
def test_where_nobody_chose_a_large_matrix_has_the_largest_blocks(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    plain = build(CONFIG, "latent", FLOAT32)
    assert set(block_sizes(plain.graph, Recipe(precision)).values()) == {32}
    monkeypatch.setattr("blt_edge.graphs.precision.LARGE_MATRIX", 1)
    sizes = block_sizes(plain.graph, Recipe(precision))
    assert set(sizes.values()) == {32, 64}
    found = initializers(build(CONFIG, "latent", Recipe(precision)))
    for name, weight in initializers(plain).items():
        if name in sizes:
            size = 64 if len(weight) % 64 == 0 else 32
            assert sizes[name] == size
            assert found[f"{name}.scales"].shape == (len(weight) // size, weight.shape[1])
            rounded = found[f"{name}.{precision}"] * found[f"{name}.scales"].repeat(size, axis=0)
            assert np.linalg.norm(rounded - weight) < 0.12 * np.linalg.norm(weight)


def test_an_int4_stage_can_keep_some_matrices_in_8_bits() -> None:
    plain = build(CONFIG, "patcher", FLOAT32)
    names = [node.inputs[1].name for node in linear_products(plain.graph)]
    wider = frozenset(names[::3])
    mixed, wide, narrow = (
        build(CONFIG, "patcher", one)
        for one in (Recipe("int4", wider=wider), Recipe("int8w"), Recipe("int4"))
    )
    for name in names:
        word, other = ("int8w", wide) if name in wider else ("int4", narrow)
        found, wanted = initializers(mixed), initializers(other)
        for suffix in (word, "scales"):
            np.testing.assert_array_equal(found[f"{name}.{suffix}"], wanted[f"{name}.{suffix}"])
    # Only int4 stages have a mix.
    assert set(initializers(build(CONFIG, "patcher", Recipe("int8w", wider=wider)))) == set(
        initializers(wide)
    )


def test_a_block_size_that_was_chosen_counts_whatever_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt_edge.graphs.precision.LARGE_MATRIX", 1)
    graph = build(CONFIG, "latent", FLOAT32).graph
    assert set(block_sizes(graph, recipe("int4", block_size=32)).values()) == {32}
    assert block_sizes(graph, recipe("int8")) == block_sizes(graph, FLOAT32) == {}


def test_weight_beyond_float16_is_refused_by_name() -> None:
    model = build(CONFIG, "encoder", FLOAT32)
    name = linear_products(model.graph)[0].inputs[1].name
    big = np.full(model.graph.initializers[name].shape.numpy(), 1e5, np.float32)
    model.graph.initializers[name].const_value = ir.tensor(big, name=name)
    rewrite_stage(model, recipe("fp16"))
    with pytest.raises(BltError, match=rf"{name} holds 100000, fp16 reaches 65504"):
        model.graph.initializers[f"{name}.fp16"].const_value.tobytes()


def test_range_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnitRanges, "scale", lambda _self, _name: float("nan"))
    with pytest.raises(BltError, match="the calibrated range is nan"):
        build(CONFIG, "encoder", recipe("int8"))


def test_largest_int8_values_do_not_overflow() -> None:
    # Pairs of products reach 2 * 255 * 127: beyond 16 bits, where some kernels saturate.
    size = 256
    x = ir.val("x", ir.DataType.FLOAT, ["rows", size])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="loud")
    node = ir.node("MatMul", [x, add_constant(graph, "w", ir.tensor(np.ones((size, size), np.float32)))])
    graph.append(node)
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph.outputs.append(node.outputs[0])
    model = ir.Model(graph, ir_version=10)
    rewrite_stage(model, recipe("int8"))
    running = session(model, "int8")
    for rows in (1, 8):
        found = running.run(None, {"x": np.full((rows, size), SPREAD, np.float32)})[0]
        np.testing.assert_allclose(found, size * SPREAD, rtol=1e-5)


def test_processors_without_vnni_get_the_precise_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry() -> str:
        options = session_options(onnxruntime, "int8", threads=1)
        return str(options.get_session_config_entry("session.x64quantprecision"))

    monkeypatch.setattr(ort, "int8_saturates", lambda: True)
    assert entry() == "1"
    monkeypatch.setattr(ort, "int8_saturates", lambda: False)
    with pytest.raises(RuntimeError):
        entry()
