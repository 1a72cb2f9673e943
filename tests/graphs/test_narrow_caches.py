"""Attention over caches in 8 bits beside plain numpy over what the numbers stand for."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from blt_edge.graphs.narrow_caches import narrow_caches
from blt_edge.graphs.packing import pack_rows
from blt_edge.runtime.errors import BltError
from onnx import TensorProto, helper, numpy_helper
from support.ort_versions import attends_in_8_bits

HEADS, KV_HEADS, WIDTH, CAPACITY, WINDOW = 4, 2, 16, 40, 9
SCALES = np.random.default_rng(1).uniform(0.02, 0.05, (4, KV_HEADS, WIDTH)).astype(np.float32)


def rotation() -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(64)[:, None] / 3.0 ** np.arange(WIDTH // 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def graph(layers: int = 2, head: bool = False) -> onnx.ModelProto:
    """Layers of nothing but attention, each over the same `joined`, as an optimized stage graph has them.

    head: each is multiplied with weights.
    """
    size = (HEADS + 2 * KV_HEADS) * WIDTH
    inputs = [
        helper.make_tensor_value_info("joined", TensorProto.FLOAT, ["batch", "bytes", size]),
        helper.make_tensor_value_info("positions", TensorProto.INT64, ["batch", "bytes"]),
        helper.make_tensor_value_info("past_length", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("total_length", TensorProto.INT32, []),
    ]
    outputs, nodes = [], []
    for layer in range(layers):
        cached = [f"past.{layer}.key", f"past.{layer}.value"]
        presents = [name.replace("past", "present") for name in cached]
        shape = ["batch", KV_HEADS, "past", WIDTH]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in cached]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in presents]
        node = helper.make_node(
            "GroupQueryAttention",
            ["joined", "", "", *cached, "past_length", "total_length", "cos", "sin", "positions"],
            [f"mixed.{layer}", *presents],
            f"layers.{layer}/attention",
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            local_window_size=WINDOW,
            k_quant_type="NONE",
        )
        nodes.append(node)
        if head:
            nodes.append(helper.make_node("MatMul", [f"mixed.{layer}", "head"], [f"logits.{layer}"]))
        made = f"logits.{layer}" if head else f"mixed.{layer}"
        outputs.append(helper.make_tensor_value_info(made, TensorProto.FLOAT, None))
    tables = [
        numpy_helper.from_array(values, name) for name, values in zip(("cos", "sin"), rotation(), strict=True)
    ]
    if head:
        tables.append(numpy_helper.from_array(np.ones((HEADS * WIDTH, 3), np.float32), "head"))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    whole = helper.make_graph(nodes, "graph", inputs, outputs, tables)
    return helper.make_model(whole, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto, caches: list[np.ndarray], joined: np.ndarray, past: int) -> list[np.ndarray]:
    """Mixed values of each layer; the caches [4, 1, Hkv, C, D] are written in place."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    count = joined.shape[1]
    given = {
        "joined": joined,
        "positions": np.arange(past, past + count)[None],
        "past_length": np.array([past + count - 1], np.int32),
        "total_length": np.array(past + count, np.int32),
    }
    binding = session.io_binding()
    names = [f"past.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    for name, array in {**given, **dict(zip(names, caches, strict=True))}.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in zip(names, caches, strict=True):
        present = name.replace("past", "present")
        binding.bind_output(present, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for layer in range(2):
        binding.bind_output(f"mixed.{layer}")
    session.run_with_iobinding(binding)
    return [np.array(found.numpy()) for found in binding.get_outputs()[-2:]]


def rotated(values: np.ndarray, first: int) -> np.ndarray:
    """[n, heads, D] of positions `first` on."""
    cos, sin = (table[first : first + len(values), None] for table in rotation())
    one, two = np.split(values, 2, axis=-1)
    return np.concatenate((one * cos - two * sin, two * cos + one * sin), axis=-1)


@attends_in_8_bits
@pytest.mark.parametrize(("past", "count"), [(0, 1), (0, 6), (3, 1), (20, 1), (20, 5), (30, 2)])
def test_attention_is_over_what_the_numbers_stand_for(past: int, count: int) -> None:
    random = np.random.default_rng(past + count)
    caches = random.integers(-127, 128, (4, 1, KV_HEADS, CAPACITY, WIDTH)).astype(np.int8)
    before = caches.copy()
    joined = random.standard_normal((1, count, (HEADS + 2 * KV_HEADS) * WIDTH)).astype(np.float32)
    found = run(narrow_caches(graph(), SCALES, "graph.onnx"), list(caches), joined, past)
    heads = joined[0].reshape(count, -1, WIDTH)
    queries = rotated(heads[:, :HEADS], past)
    new = [rotated(heads[:, HEADS : HEADS + KV_HEADS], past), heads[:, HEADS + KV_HEADS :]]
    for layer, mixed in enumerate(found):
        planes = []
        for kind in range(2):
            scale = SCALES[2 * layer + kind]
            cache = caches[2 * layer + kind, 0]
            # New numbers lie behind those that were there, rounded; nothing else was touched before them.
            assert np.array_equal(cache[:, :past], before[2 * layer + kind, 0, :, :past])
            wanted = np.clip(new[kind].transpose(1, 0, 2) / scale[:, None], -128, 127)
            assert np.abs(cache[:, past : past + count] - wanted).max() <= 0.501
            planes.append(cache[:, : past + count] * scale[:, None])
        keys, values = (plane.repeat(HEADS // KV_HEADS, axis=0) for plane in planes)
        scores = np.einsum("qhd,hkd->hqk", queries, keys) / np.sqrt(WIDTH)
        distance = past + np.arange(count)[:, None] - np.arange(past + count)
        weights = np.where((distance >= 0) & (distance < WINDOW), np.exp(scores), 0)
        weights /= weights.sum(-1, keepdims=True)
        wanted = np.einsum("hqk,hkd->qhd", weights, values).reshape(count, -1)
        assert np.abs(mixed[0] - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_graph_that_it_is_made_of_is_not_changed() -> None:
    model = graph()
    before = model.SerializeToString()
    narrow = narrow_caches(model, SCALES, "graph.onnx")
    assert model.SerializeToString() == before
    kinds = {
        value.name: value.type.tensor_type.elem_type for value in (*narrow.graph.input, *narrow.graph.output)
    }
    cached = {name: kind for name, kind in kinds.items() if name.startswith(("past.", "present."))}
    assert set(cached.values()) == {TensorProto.INT8}
    assert len(cached) == 8
    for node in narrow.graph.node:
        names = [each.name for each in node.attribute]
        assert sorted(set(names)) == sorted(names)


def test_scales_belong_to_all_rows_of_a_packed_graph() -> None:
    packed = pack_rows(narrow_caches(graph(head=True), SCALES, "graph.onnx"), 3, "graph.onnx")
    attention = [node for node in packed.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == 6
    assert {tuple(node.input[12:]) for node in attention} == {
        (f"cache_scale.{layer}.key", f"cache_scale.{layer}.value") for layer in range(2)
    }


@pytest.mark.parametrize("what", ["layers", "order", "twice", "none"])
def test_a_graph_of_another_making_is_refused(what: str) -> None:
    model = graph(layers=1 if what == "layers" else 2)
    first = model.graph.node[0]
    if what == "order":
        first.input[3] = "past.1.key"
    elif what == "twice":
        model = narrow_caches(model, SCALES, "graph.onnx")
    elif what == "none":
        first.op_type = "Identity"
    with pytest.raises(
        BltError, match=r"^graph\.onnx: its (attention is not fused|caches are not).*build it"
    ):
        narrow_caches(model, SCALES, "graph.onnx")
