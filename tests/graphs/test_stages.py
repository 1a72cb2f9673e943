"""The stage graphs by themselves: portable operators, plain numpy's results, and rows without neighbours."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from blt_edge.graphs.config import ACTIVATIONS, parse_config
from blt_edge.graphs.layers import Weight, WeightPart, WeightSource, activation
from blt_edge.graphs.stages import OPSET, PatchPooling, axis_ranges, build_stage, stage_names, stage_stack
from blt_edge.runtime.names import STAGES
from blt_edge.tools.models.numpy_patcher import GATES
from onnxscript import GraphBuilder
from support.numpy_blt import NumpyBlt
from support.quantized import Session, give_weights, random_feeds, session
from support.random_models import random_tensors

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
LOCAL = {**HEADS, "hidden_size": 16, "hidden_size_global": 24, "cross_attn_k": 2}
RAW: dict[str, Any] = {
    "model_type": "blt",
    "cross_attn_k": 2,
    "local_attention_window_len": 6,
    "encoder_hash_byte_group_vocab": 50,
    "patcher_config": {**HEADS, "hidden_size": 16, "num_hidden_layers": 2, "sliding_window": 5},
    "encoder_config": LOCAL,
    "decoder_config": {**LOCAL, "num_hidden_layers": 2},
    "global_config": {**HEADS, "hidden_size": 24, "num_hidden_layers": 2},
}
CONFIG = parse_config(RAW)
# A safe superset of what TensorRT's parser and ONNX Runtime's CPU provider take alike.
PORTABLE = {
    *("Add", "And", "Cast", "Concat", "Cos", "Div", "Exp", "Gather", "Greater", "GreaterOrEqual", "Less"),
    *("LessOrEqual", "LogSoftmax", "MatMul", "Mul", "Neg", "Pow", "Range", "ReduceMax", "ReduceMean"),
    *("ReduceSum", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze"),
    *("Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
}


def random_stage(stage: str) -> Session:
    model = build_stage(CONFIG, stage)
    give_weights(model)
    return session(model)


def assemble(model: ir.Model | ir.Graph, tensors: dict[str, np.ndarray]) -> None:
    """Give a graph's weights the values that a checkpoint has."""
    for value in getattr(model, "graph", model).initializers.values():
        if isinstance(value, Weight):
            shape = tuple(value.shape.numpy())
            data = value.source.assemble(tensors.__getitem__, shape)
            assert data.shape == shape
            value.const_value = ir.tensor(data, name=value.name)


@pytest.mark.parametrize("stage", STAGES)
def test_only_portable_operators_and_known_axes(stage: str) -> None:
    graph = build_stage(CONFIG, stage).graph
    assert {node.domain for node in graph} == {""}
    assert {node.op_type for node in graph} <= PORTABLE
    sizes = {axis for value in [*graph.inputs, *graph.outputs] for axis in value.shape}
    assert {str(axis) for axis in sizes if not isinstance(axis, int)} <= set(axis_ranges(CONFIG))


@pytest.mark.parametrize("stage", STAGES)
def test_padding_is_finite_and_changes_nothing(stage: str) -> None:
    running = random_stage(stage)
    inputs = random_feeds(running, 3, seed=2)
    padded = dict(inputs)
    for name, value in inputs.items():
        if not name.startswith("past") and name != "patch_values":
            extra = np.full_like(value[:, :1], -1 if name == "positions" else 0)
            padded[name] = np.concatenate([value, extra], axis=1)
    for ours, theirs in zip(running.run(None, inputs), running.run(None, padded), strict=True):
        assert np.isfinite(theirs).all()
        kept = theirs[:, :, :, :3] if theirs.ndim == 5 else theirs[:, :3]
        np.testing.assert_allclose(ours, kept, rtol=0, atol=1e-5)


def test_longer_patch_padding_changes_nothing() -> None:
    running = random_stage("latent")
    inputs = random_feeds(running, 3, seed=3)
    wide = np.full((1, 3, 16, CONFIG.encoder.width), 1e4, np.float32)
    wide[:, :, :4] = inputs["patch_bytes"]
    padded = {**inputs, "patch_bytes": wide}
    for ours, theirs in zip(running.run(None, inputs), running.run(None, padded), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_model_without_a_patcher_has_three_stages() -> None:
    assert stage_names(parse_config({**RAW, "patch_in_forward": False})) == STAGES[1:]


def test_weights_are_joined_transposed_and_reordered_for_half_split_rope() -> None:
    tensors = {
        "q": np.arange(8 * 3, dtype=np.float32).reshape(8, 3),
        "v": -np.arange(2 * 3, dtype=np.float32).reshape(2, 3),
    }
    source = WeightSource((WeightPart("q", rope_head_dim=4), WeightPart("v")))
    weight = source.assemble(tensors.__getitem__, (3, 10))
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(weight, np.concatenate([tensors["q"][order], tensors["v"]]).T)
    assert weight.flags.c_contiguous


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_weights_of_any_number_of_rows_are_transposed_whole(rows: int) -> None:
    matrix = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    source = WeightSource((WeightPart("w"),))
    np.testing.assert_array_equal(source.assemble({"w": matrix}.__getitem__, (3, rows)), matrix.T)


# Whole models, against plain numpy.


def part(width: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width + 6,
        **more,
    }


def whole(
    k: int,
    window: int | None,
    patcher: dict[str, Any],
    encoder: dict[str, Any],
    decoder: dict[str, Any],
    global_stack: dict[str, Any],
) -> dict[str, Any]:
    local = {"cross_attn_k": k, "hidden_size_global": global_stack["hidden_size"]}
    return {
        "model_type": "blt",
        "cross_attn_k": k,
        "local_attention_window_len": window,
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": patcher,
        "encoder_config": {**local, **encoder},
        "decoder_config": {**local, **decoder},
        "global_config": global_stack,
    }


YARN = {"rope_type": "yarn", "rope_theta": 800.0, "factor": 4.0, "original_max_position_embeddings": 16}
# Every part differs from the others in epsilon, activation, theta, heads: what is mixed up shows.
SHAPES = {
    "grouped heads, windows, k 2": whole(
        2,
        5,
        part(24, 6, 3, num_hidden_layers=2, sliding_window=4, rms_norm_eps=0.3, rope_theta=30.0),
        part(16, 4, 2, num_hidden_layers=1, rms_norm_eps=0.1, rope_theta=20.0, hidden_act="gelu"),
        part(16, 8, 2, num_hidden_layers=2, rms_norm_eps=0.5, rope_theta=10.0, hidden_act="tanh"),
        part(32, 4, 2, num_hidden_layers=2, rms_norm_eps=0.2, rope_theta=5.0, hidden_act="quick_gelu"),
    ),
    "no windows, k 1, a projection between": whole(
        1,
        None,
        part(12, 3, 3, num_hidden_layers=1, sliding_window=None, rope_scaling=YARN, hidden_act="gelu_new"),
        part(12, 2, 1, num_hidden_layers=3, cross_attn_all_layers=True, rope_scaling=YARN, hidden_act="relu"),
        part(12, 6, 6, num_hidden_layers=1, rope_scaling=YARN, hidden_act="relu2"),
        part(20, 2, 2, num_hidden_layers=1, rope_scaling=YARN, hidden_act="sigmoid"),
    ),
    "k 4, cross-attention in one layer": whole(
        4,
        1,
        part(16, 4, 1, num_hidden_layers=1, sliding_window=1, hidden_act="linear"),
        part(24, 6, 2, num_hidden_layers=2, cross_attn_all_layers=False, rms_norm_eps=0.1),
        part(24, 4, 1, num_hidden_layers=3, cross_attn_all_layers=False, rms_norm_eps=0.1),
        part(24, 4, 1, num_hidden_layers=2),
    ),
}


class Whole:
    """The four graphs with a checkpoint's weights, run in chunks over one text, and the plain versions."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.config = parse_config(raw)
        tensors = random_tensors(self.config)
        self.plain = NumpyBlt(self.config, tensors)
        self.sessions = {}
        for stage in STAGES:
            model = build_stage(self.config, stage)
            assemble(model, tensors)
            self.sessions[stage] = session(model)

    def run(
        self, stage: str, inputs: dict[str, np.ndarray], cuts: list[int], shared: dict[str, np.ndarray]
    ) -> list[np.ndarray]:
        """All outputs but `new_kv` over a whole text; the cache is in shuffled slots, some of them empty."""
        stack, random = stage_stack(self.config, stage), np.random.default_rng(1)
        count = next(iter(inputs.values())).shape[1]
        past = np.zeros((2 * stack.layers, 1, stack.kv_heads, 0, stack.head_dim), np.float32)
        parts = []
        for first, last in pairwise([0, *cuts, count]):
            slots = random.permutation(first + 3)
            held = np.where(slots < first, slots, -1)[None]
            # An empty slot may hold anything.
            empty = np.full((*past.shape[:3], 3, past.shape[4]), 7.0, np.float32)
            filled = np.concatenate([past, empty], axis=3)
            feeds = {name: value[:, first:last] for name, value in inputs.items()}
            feeds |= {"positions": np.arange(first, last)[None], "past_positions": held, **shared}
            for layer in range(stack.layers):
                for offset, kind in enumerate(("key", "value")):
                    feeds[f"past.{layer}.{kind}"] = filled[2 * layer + offset][:, :, slots]
            *outputs, new_kv = self.sessions[stage].run(None, feeds)
            assert new_kv.shape == (*past.shape[:3], last - first, past.shape[4])
            past = np.concatenate([past, new_kv], axis=3)
            parts.append(outputs)
        return [np.concatenate(output, axis=1)[0] for output in zip(*parts, strict=True)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.split(",")[0])
def whole_model(request: pytest.FixtureRequest) -> Whole:
    return Whole(SHAPES[request.param])


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1.0, np.abs(wanted).max()))


CUTS = ([], [1], [3, 4, 9])


@pytest.mark.parametrize("cuts", CUTS)
def test_patcher_and_encoder_equal_plain_numpy(whole_model: Whole, cuts: list[int]) -> None:
    random, plain = np.random.default_rng(2), whole_model.plain
    ids = random.integers(0, 260, 14)
    entropies, logits = whole_model.run("patcher", {"byte_ids": ids[None]}, cuts, {})
    for found, wanted in zip((entropies, logits), plain.patcher(ids), strict=True):
        close(found, wanted)
    embeds = random.normal(size=(14, whole_model.config.encoder.width)).astype(np.float32)
    (states,) = whole_model.run("encoder", {"byte_embeds": embeds[None]}, cuts, {})
    close(states, plain.encoder(embeds.astype(np.float64)))


@pytest.mark.parametrize("cuts", CUTS)
def test_latent_and_decoder_equal_plain_numpy(whole_model: Whole, cuts: list[int]) -> None:
    random, plain, width = np.random.default_rng(3), whole_model.plain, whole_model.config.encoder.width
    lengths = random.integers(1, 6, 11)
    block = np.full((1, 11, 8, width), 1e4, np.float32)
    for patch, length in enumerate(lengths):
        # Negative in every feature here and there: a padded slot must not win the maximum.
        block[0, patch, :length] = random.normal(-1.0, 1.0, (length, width))
    patches = [block[0, patch, :length].astype(np.float64) for patch, length in enumerate(lengths)]
    inputs = {"patch_bytes": block, "patch_lengths": lengths[None]}
    (values,) = whole_model.run("latent", inputs, cuts, {})
    latents = plain.latents(np.concatenate(patches), np.cumsum([0, *lengths]).tolist())
    close(values, plain.patch_values(latents))
    states = random.normal(size=(14, width)).astype(np.float32)
    index = random.integers(0, 11, 14)
    inputs = {"byte_states": states[None], "patch_index": index[None]}
    (logits,) = whole_model.run("decoder", inputs, cuts, {"patch_values": values})
    close(logits, plain.decoder(states.astype(np.float64), latents, index))


# What has no stage of its own.


def test_a_padded_patch_pools_to_small_numbers() -> None:
    # The mask's -1e30 would overflow in a model with larger weights.
    width = CONFIG.encoder.width
    patch_bytes = ir.val("patch_bytes", dtype=ir.DataType.FLOAT, shape=[1, 3, 4, width])
    lengths = ir.val("lengths", dtype=ir.DataType.INT64, shape=[1, 3])
    graph = ir.Graph([patch_bytes, lengths], [], nodes=[], opset_imports={"": OPSET}, name="pooling")
    builder = GraphBuilder(graph)
    pooled = PatchPooling(CONFIG)(builder.op, patch_bytes, lengths)
    builder.add_output(pooled, "pooled")
    pooled.type = ir.TensorType(ir.DataType.FLOAT)
    assemble(graph, random_tensors(CONFIG))
    block = np.random.default_rng(0).normal(size=(1, 3, 4, width)).astype(np.float32)
    running = session(ir.Model(graph, ir_version=10))
    (found,) = running.run(None, {"patch_bytes": block, "lengths": np.array([[2, 0, 4]])})
    assert found.shape == (1, 3, CONFIG.cross_attn_k * width)
    assert np.abs(found).max() < 100


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS.values())))
def test_every_activation_is_the_function_it_names(name: str) -> None:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[9])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET}, name="activation")
    builder = GraphBuilder(graph)
    graph.outputs.append(activation(builder.op, name, x))
    graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    values = np.linspace(-4, 4, 9, dtype=np.float32)
    (found,) = session(ir.Model(graph, ir_version=10)).run(None, {"x": values})
    np.testing.assert_allclose(found, GATES[name](values.astype(np.float64)), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("positions", "chunk", "typical", "past", "patch"),
    [(5, 5, 5, 10, 5), (100, 100, 100, 200, 8), (20_000, 1024, 512, 21_024, 8)],
)
def test_axes_fit_short_and_long_models(
    positions: int, chunk: int, typical: int, past: int, patch: int
) -> None:
    raw = {**RAW, "encoder_config": {**RAW["encoder_config"], "max_position_embeddings": positions}}
    axes = axis_ranges(parse_config(raw))
    assert {name: (axis.min, axis.opt, axis.max) for name, axis in axes.items()} == {
        "batch": (1, 1, 8),
        **dict.fromkeys(("bytes", "patches"), (1, 1, chunk)),
        **dict.fromkeys(("past", "patch_slots"), (1, typical, past)),
        "patch_length": (1, patch, positions),
    }


def test_a_graph_says_what_it_takes_and_gives() -> None:
    """Names, types and shapes of the table in `stages`, which manifests and engines are made from."""
    past = [("past_positions", "INT64", ["batch", "past"])]
    tables = {
        "patcher": (
            [("byte_ids", "INT64", ["batch", "bytes"])],
            [("entropy", ["batch", "bytes"]), ("logits", ["batch", "bytes", 260])],
        ),
        "encoder": (
            [("byte_embeds", "FLOAT", ["batch", "bytes", 16])],
            [("byte_states", ["batch", "bytes", 16])],
        ),
        "latent": (
            [
                ("patch_bytes", "FLOAT", ["batch", "patches", "patch_length", 16]),
                ("patch_lengths", "INT64", ["batch", "patches"]),
            ],
            [("patch_values", ["batch", "patches", 2 * 2 * 2 * 4 * 2])],
        ),
        "decoder": (
            [
                ("byte_states", "FLOAT", ["batch", "bytes", 16]),
                ("patch_values", "FLOAT", ["patch_slots", 2 * 2 * 2 * 4 * 2]),
                ("patch_index", "INT64", ["batch", "bytes"]),
            ],
            [("logits", ["batch", "bytes", 260])],
        ),
    }
    for stage, (inputs, outputs) in tables.items():
        stack, axis = stage_stack(CONFIG, stage), "patches" if stage == "latent" else "bytes"
        wanted = [*inputs, ("positions", "INT64", ["batch", axis]), *past]
        for layer in range(stack.layers):
            shape = ["batch", stack.kv_heads, "past", stack.head_dim]
            wanted += [(f"past.{layer}.{kind}", "FLOAT", shape) for kind in ("key", "value")]
        model = build_stage(CONFIG, stage)
        assert model.graph.name == stage
        assert [(v.name, v.dtype.name, axes(v)) for v in model.graph.inputs] == wanted
        state = [2 * stack.layers, "batch", stack.kv_heads, axis, stack.head_dim]
        assert [(v.name, axes(v)) for v in model.graph.outputs] == [*outputs, ("new_kv", state)]
        assert {v.dtype for v in model.graph.outputs} == {ir.DataType.FLOAT}
        # Engines find parts of a graph by these names.
        for name, value in model.graph.initializers.items():
            if isinstance(value, Weight):
                assert name.startswith(f"{stage}.")
                assert name.endswith(".weight")
                assert value.dtype == ir.DataType.FLOAT
        assert (model.ir_version, dict(model.graph.opset_imports)) == (10, {"": 20})
        assert model.producer_name == "blt-edge"
        (name,) = (name for name in model.graph.initializers if "rotary" in name)
        assert name.endswith(".rotary_emb.inv_freq")
        give_weights(model)
        onnx.checker.check_model(ir.to_proto(model), full_check=False)


def axes(value: ir.Value) -> list[int | str]:
    return [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape]
