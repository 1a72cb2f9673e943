"""The stage graphs by themselves: portable operators, and rows that know nothing of their neighbours."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from blt_edge.graphs.config import ModelConfig, parse_config
from blt_edge.graphs.stages import STAGE_NAMES, axis_ranges, build_stage, stage_names, stage_stack
from blt_edge.graphs.weights import Weight, WeightPart, WeightSource

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
RAW = {
    "model_type": "blt",
    "cross_attn_k": 2,
    "local_attention_window_len": 6,
    "encoder_hash_byte_group_vocab": 50,
    "patcher_config": {**HEADS, "hidden_size": 16, "num_hidden_layers": 2, "sliding_window": 5},
    "encoder_config": {**HEADS, "hidden_size": 16, "hidden_size_global": 24, "cross_attn_k": 2},
    "decoder_config": {
        **HEADS,
        "hidden_size": 16,
        "hidden_size_global": 24,
        "cross_attn_k": 2,
        "num_hidden_layers": 2,
    },
    "global_config": {**HEADS, "hidden_size": 24, "num_hidden_layers": 2},
}
# A safe superset of what TensorRT's parser and ONNX Runtime's CPU provider take alike.
PORTABLE = {
    *("Add", "And", "Cast", "Concat", "Cos", "Div", "Exp", "Gather", "Greater", "GreaterOrEqual", "Less"),
    *("LessOrEqual", "LogSoftmax", "MatMul", "Mul", "Neg", "Pow", "Range", "ReduceMax", "ReduceMean"),
    *("ReduceSum", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze"),
    *("Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return parse_config(RAW)


@pytest.fixture(scope="module")
def sessions(config: ModelConfig) -> dict[str, onnxruntime.InferenceSession]:
    return {stage: session(config, stage) for stage in STAGE_NAMES}


def session(config: ModelConfig, stage: str) -> onnxruntime.InferenceSession:
    """The stage with random weights."""
    model = build_stage(config, stage)
    random = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        if isinstance(value, Weight):
            shape = tuple(value.shape.numpy())
            data = random.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
            value.const_value = ir.tensor(data, name=value.name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_only_portable_operators(config: ModelConfig, stage: str) -> None:
    nodes = list(build_stage(config, stage).graph)
    assert {node.domain for node in nodes} == {""}
    assert {node.op_type for node in nodes} <= PORTABLE


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_every_dynamic_axis_is_in_the_table(config: ModelConfig, stage: str) -> None:
    graph = build_stage(config, stage).graph
    names = {
        str(axis)
        for value in [*graph.inputs, *graph.outputs]
        for axis in value.shape
        if not isinstance(axis, int)
    }
    assert names <= set(axis_ranges(config))


def feeds(config: ModelConfig, stage: str, seed: int, count: int, slots: int) -> dict[str, np.ndarray]:
    """One row: `count` new positions after a cache of which some slots are empty."""
    random = np.random.default_rng(seed)
    stack = stage_stack(config, stage)
    first = slots + seed
    held = first - 1 - random.permutation(slots)
    held[random.random(slots) < 0.3] = -1
    result: dict[str, np.ndarray] = {
        "positions": np.arange(first, first + count)[None],
        "past_positions": held[None].astype(np.int64),
    }
    for layer in range(stack.layers):
        for kind in ("key", "value"):
            shape = (1, stack.kv_heads, slots, stack.head_dim)
            result[f"past.{layer}.{kind}"] = random.normal(size=shape).astype(np.float32)
    width = config.encoder.width
    if stage == "patcher":
        result["byte_ids"] = random.integers(4, 260, (1, count))
    elif stage == "encoder":
        result["byte_embeds"] = random.normal(size=(1, count, width)).astype(np.float32)
    elif stage == "latent":
        result["patch_bytes"] = random.normal(size=(1, count, 4, width)).astype(np.float32)
        result["patch_lengths"] = random.integers(1, 5, (1, count))
    else:
        result["byte_states"] = random.normal(size=(1, count, width)).astype(np.float32)
        result["patch_index"] = random.integers(0, 3, (1, count))
    return result


def run(
    sessions: dict[str, onnxruntime.InferenceSession], stage: str, inputs: dict[str, np.ndarray]
) -> list[np.ndarray]:
    if stage == "decoder":
        width = sessions[stage].get_inputs()[1].shape[1]
        values = np.random.default_rng(9).normal(size=(3, width)).astype(np.float32)
        inputs = {**inputs, "patch_values": values}
    return sessions[stage].run(None, inputs)


def rows_of(output: np.ndarray, row: int) -> np.ndarray:
    # new_kv has its batch axis second, behind layers.
    return output[:, row] if output.ndim == 5 else output[row]


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_row_does_not_see_its_neighbour(
    config: ModelConfig, sessions: dict[str, onnxruntime.InferenceSession], stage: str, count: int
) -> None:
    alone = [feeds(config, stage, seed, count, slots=7) for seed in (1, 5)]
    together = {name: np.concatenate([row[name] for row in alone]) for name in alone[0]}
    joint = run(sessions, stage, together)
    for row, inputs in enumerate(alone):
        for ours, theirs in zip(run(sessions, stage, inputs), joint, strict=True):
            np.testing.assert_allclose(rows_of(ours, 0), rows_of(theirs, row), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_padding_is_finite_and_changes_nothing(
    config: ModelConfig, sessions: dict[str, onnxruntime.InferenceSession], stage: str
) -> None:
    inputs = feeds(config, stage, seed=2, count=3, slots=7)
    padded = {name: value.copy() for name, value in inputs.items()}
    for name in (
        "positions",
        "byte_ids",
        "byte_embeds",
        "patch_bytes",
        "patch_lengths",
        "byte_states",
        "patch_index",
    ):
        if name in inputs:
            fill = -1 if name == "positions" else 0
            extra = np.full_like(inputs[name][:, :1], fill)
            padded[name] = np.concatenate([inputs[name], extra], axis=1)
    for ours, theirs in zip(run(sessions, stage, inputs), run(sessions, stage, padded), strict=True):
        assert np.isfinite(theirs).all()
        kept = theirs[:, :, :, :3] if theirs.ndim == 5 else theirs[:, :3]
        np.testing.assert_allclose(ours, kept, rtol=0, atol=1e-5)


def test_longer_patch_padding_changes_nothing(
    config: ModelConfig, sessions: dict[str, onnxruntime.InferenceSession]
) -> None:
    inputs = feeds(config, "latent", seed=3, count=3, slots=7)
    wide = np.full((1, 3, 16, config.encoder.width), 1e4, np.float32)
    wide[:, :, :4] = inputs["patch_bytes"]
    padded = {**inputs, "patch_bytes": wide}
    for ours, theirs in zip(run(sessions, "latent", inputs), run(sessions, "latent", padded), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_model_without_a_patcher_has_three_stages() -> None:
    assert stage_names(parse_config({**RAW, "patch_in_forward": False})) == STAGE_NAMES[1:]


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
