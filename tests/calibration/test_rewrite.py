"""Rewritten graphs: what they are made of, what they compute, and that rows stay strangers."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from blt_edge.graphs.quantize import Recipe, WeightFactors, linear_products, rewrite_stage
from blt_edge.graphs.stages import STAGE_NAMES, build_stage
from blt_edge.runtime.backends import ort
from blt_edge.runtime.backends.ort import session_options
from blt_edge.runtime.errors import BltError, OptionError

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.quantized import BLOCKY, SPREAD, UnitRanges, build, config_of

CONFIG = config_of(BLOCKY)
PRECISIONS = ("fp16", "int8", "int8w", "int4")


def recipe(precision: str, **values: object) -> Recipe:
    return Recipe(precision, ranges=UnitRanges(), **values)


def initializers(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def session(model: ir.Model, precision: str) -> onnxruntime.InferenceSession:
    options = session_options(onnxruntime, precision, threads=1)
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feeds(model: ir.Model, count: int, rows: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = {"batch": rows, "bytes": count, "patches": count, "past": 7, "patch_length": 4, "patch_slots": 5}
    result = {}
    for value in model.graph.inputs:
        shape = [axis if isinstance(axis, int) else sizes[str(axis)] for axis in value.shape]
        if value.dtype == ir.DataType.FLOAT:
            result[value.name] = random.normal(size=shape).astype(np.float32)
            continue
        low, high = {"byte_ids": (4, 260), "patch_lengths": (1, 5), "patch_index": (0, 5)}.get(
            value.name, (0, 1)
        )
        result[value.name] = random.integers(low, high, shape)
    result["past_positions"][:] = np.arange(7)
    result["positions"][:] = np.arange(7, 7 + count)
    return result


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_weight_product_but_the_heads_is_rewritten(stage: str, precision: str) -> None:
    before = build(CONFIG, stage, Recipe("fp32"))
    after = build(CONFIG, stage, recipe(precision))
    products = len(linear_products(before.graph))
    assert linear_products(after.graph) == []
    counts = Counter(node.op_type for node in after.graph)
    expected = {
        "fp16": ("Cast", 2 * products + sum(node.op_type == "Cast" for node in before.graph)),
        "int8": ("DequantizeLinear", 2 * products),
        "int8w": ("DequantizeLinear", products),
        "int4": ("DequantizeLinear", products),
    }[precision]
    assert counts[expected[0]] == expected[1]
    assert counts["QuantizeLinear"] == (products if precision == "int8" else 0)
    assert after.graph.opset_imports[""] == (21 if precision in ("int8w", "int4") else 20)
    assert [value.name for value in after.graph.outputs] == [value.name for value in before.graph.outputs]
    for name in before.graph.initializers:
        if name.endswith(("lm_head.weight", "embed_tokens.weight", "norm.weight", "inv_freq")):
            assert after.graph.initializers[name].dtype == ir.DataType.FLOAT
    kinds = {value.dtype for name, value in after.graph.initializers.items() if name.endswith(".int4")}
    assert kinds == ({ir.DataType.INT4} if precision == "int4" else set())


def test_float32_stays_as_it_is() -> None:
    before = build(CONFIG, "latent", Recipe("fp32"))
    assert ir.to_proto(build(CONFIG, "latent", recipe("fp32"))) == ir.to_proto(before)


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize(
    ("precision", "most"), [("fp16", 3e-3), ("int8", 0.15), ("int8w", 0.03), ("int4", 0.35)]
)
def test_results_stay_close(stage: str, precision: str, most: float) -> None:
    plain, changed = build(CONFIG, stage, Recipe("fp32")), build(CONFIG, stage, recipe(precision))
    inputs = feeds(plain, 9)
    wanted = session(plain, "fp32").run(None, inputs)
    for ours, theirs in zip(session(changed, precision).run(None, inputs), wanted, strict=True):
        assert np.linalg.norm(ours - theirs) <= most * np.linalg.norm(theirs)


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_the_rows_beside_it(stage: str, precision: str) -> None:
    # The neighbour is a thousand times louder: a scale taken from the call would show at once.
    model = build(CONFIG, stage, recipe(precision))
    running = session(model, precision)
    quiet, loud = feeds(model, 5, seed=1), feeds(model, 5, seed=2)
    loud = {name: array * 1000 if array.dtype == np.float32 else array for name, array in loud.items()}
    shared = {"patch_values"}
    together = {
        name: quiet[name] if name in shared else np.concatenate([quiet[name], loud[name]]) for name in quiet
    }
    alone = running.run(None, quiet)
    for ours, both in zip(alone, running.run(None, together), strict=True):
        row = both[:, :1] if both.ndim == 5 else both[:1]
        np.testing.assert_allclose(ours, row, rtol=0, atol=1e-6 * max(1, np.abs(ours).max()))


@pytest.mark.parametrize("stage", ["patcher", "encoder"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_position_does_not_depend_on_the_positions_after_it(stage: str, precision: str) -> None:
    model = build(CONFIG, stage, recipe(precision))
    running = session(model, precision)
    inputs = feeds(model, 8)
    first = {
        name: array[:, :1] if name in ("byte_ids", "byte_embeds", "positions") else array
        for name, array in inputs.items()
    }
    for chunk, step in zip(running.run(None, inputs), running.run(None, first), strict=True):
        part = chunk[:, :, :, :1] if chunk.ndim == 5 else chunk[:, :1]
        np.testing.assert_allclose(part, step, rtol=0, atol=2e-6 * max(1, np.abs(step).max()))


def test_int8_weights_and_scales_are_per_output() -> None:
    plain, changed = build(CONFIG, "encoder", Recipe("fp32")), build(CONFIG, "encoder", recipe("int8"))
    before, after = initializers(plain), initializers(changed)
    name = "encoder.stack.layers.0.mlp.down_proj.weight"
    np.testing.assert_allclose(
        after[f"{name}.int8"] * after[f"{name}.scales"], before[name], atol=np.abs(before[name]).max() / 120
    )
    assert after[f"{name}.scales"].shape == (before[name].shape[1],)
    assert after[f"{name}.input_scale"] == np.float32(SPREAD / 127)


def test_block_scales_have_one_row_for_each_block() -> None:
    after = initializers(build(CONFIG, "latent", recipe("int4", search="rtn")))
    name = "latent.stack.layers.0.mlp.gate_up_proj.weight"
    assert after[f"{name}.int4"].shape == (64, 192)
    assert after[f"{name}.scales"].shape == (2, 192)


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


def test_factors_change_weights_before_they_are_quantized() -> None:
    names = [node.inputs[1].name for node in linear_products(build(CONFIG, "encoder", Recipe("fp32")).graph)]
    rows = np.linspace(0.5, 2, 32, dtype=np.float32)
    norm = "encoder.stack.layers.0.input_layernorm.weight"
    factors = {names[0]: WeightFactors(rows=rows), norm: WeightFactors(columns=1 / rows)}
    plain = build(CONFIG, "encoder", Recipe("fp32"))
    smoothed = build(CONFIG, "encoder", Recipe("fp32", factors=factors))
    np.testing.assert_array_equal(
        initializers(smoothed)[names[0]], initializers(plain)[names[0]] * rows[:, None]
    )
    inputs = feeds(plain, 3)
    for ours, theirs in zip(
        session(smoothed, "fp32").run(None, inputs), session(plain, "fp32").run(None, inputs), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_block_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"block size: 64 does not divide the 32 inputs of encoder\.stack"):
        build(CONFIG, "encoder", recipe("int4", block_size=64))


def test_weight_beyond_float16_is_refused_by_name() -> None:
    model = build(CONFIG, "encoder", Recipe("fp32"))
    name = linear_products(model.graph)[0].inputs[1].name
    big = np.full(model.graph.initializers[name].shape.numpy(), 1e5, np.float32)
    model.graph.initializers[name].const_value = ir.tensor(big, name=name)
    rewrite_stage(model, recipe("fp16"))
    with pytest.raises(BltError, match=rf"{name} holds 100000, fp16 reaches 65504"):
        model.graph.initializers[f"{name}.fp16"].const_value.tobytes()


def test_range_that_is_no_number_is_refused() -> None:
    class Broken:
        def scale(self, weight_name: str) -> float:
            return float("nan")

    with pytest.raises(BltError, match="the calibrated range is nan"):
        build(CONFIG, "encoder", Recipe("int8", ranges=Broken()))


def test_largest_int8_values_do_not_overflow() -> None:
    # Pairs of products reach 2 * 255 * 127: beyond 16 bits, where some kernels saturate.
    size = 256
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="loud")
    x = ir.Value(name="x", shape=ir.Shape(["rows", size]), type=ir.TensorType(ir.DataType.FLOAT))
    data = ir.tensor(np.ones((size, size), np.float32), name="w")
    weight = ir.Value(name="w", shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
    graph.inputs.append(x)
    graph.register_initializer(weight)
    node = ir.node("MatMul", [x, weight])
    graph.append(node)
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(node.outputs[0])
    model = ir.Model(graph, ir_version=10)
    rewrite_stage(model, recipe("int8"))
    running = session(model, "int8")
    for rows in (1, 8):
        found = running.run(None, {"x": np.full((rows, size), SPREAD, np.float32)})[0]
        np.testing.assert_allclose(found, size * SPREAD, rtol=1e-5)


def test_processors_without_vnni_get_the_precise_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(precision: str) -> str:
        options = session_options(onnxruntime, precision, threads=1)
        return str(options.get_session_config_entry("session.x64quantprecision"))

    monkeypatch.setattr(ort, "int8_saturates", lambda: True)
    assert entry("int8") == "1"
    monkeypatch.setattr(ort, "int8_saturates", lambda: False)
    with pytest.raises(RuntimeError):
        entry("int8")
