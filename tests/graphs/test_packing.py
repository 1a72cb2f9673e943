"""Texts packed in one graph give what each gives alone: every stage, whatever its precision and attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from blt_edge.export.operators import window_offset
from blt_edge.graphs.attention import fuse_attention, join_attention
from blt_edge.graphs.packing import pack_rows
from blt_edge.graphs.quantize import Recipe
from blt_edge.graphs.stages import stage_names, stage_stack
from blt_edge.runtime.backends.ort_session import session_options
from blt_edge.runtime.errors import BltError
from blt_edge.runtime.manifest import StageSpec
from blt_edge.runtime.names import STAGES
from onnx import helper, numpy_helper
from support.packed_texts import fused_feeds, outputs_of, packed_feeds, run, share_apart
from support.parity_cases import CASES, RULE_CASES
from support.quantized import BLOCKY, Session, UnitRanges, build, config_of, random_feeds
from support.random_models import RandomModel

MODELS = {model.name: model for model in (*CASES, *RULE_CASES)}
# How far a text may be from itself alone, as a share of the scale: a single row goes through another kernel,
# and sums in another order round to other integers.
APART = {"fp32": 1e-5, "fp16": 1e-3, "int8w": 1e-3, "int4": 1e-3, "int8": 0.02}
TWO_LAYERS = {**MODELS["gqa_everywhere_windows_16"].config["encoder_config"], "num_hidden_layers": 2}
COUNTS = (5, 1, 3, 2, 1, 4, 1, 9)
HELD = (0, 7, 30, 3, 19, 1, 0, 12)
fuses = pytest.mark.skipif(window_offset() is None, reason="this ONNX Runtime's fused attention is not used")


def widened(model: RandomModel) -> RandomModel:
    """The model with heads of 16 and more, which fused attention takes."""
    config: dict[str, Any] = {**model.config}
    k = config.get("cross_attn_k", 4)
    for part in ("patcher", "encoder", "decoder", "global"):
        width = 64 * (k if part == "global" else 1)
        config[f"{part}_config"] = {**config[f"{part}_config"], "hidden_size": width}
        if part in ("encoder", "decoder"):
            config[f"{part}_config"]["hidden_size_global"] = 64 * k
    return replace(model, config=config)


def spec_of(config: Any, stage: str) -> StageSpec:
    """What `fuse_attention` asks of a manifest."""
    stack = stage_stack(config, stage)
    sizes = {"layers": stack.layers, "kv_heads": stack.kv_heads, "head_dim": stack.head_dim}
    more = {"window": stack.window, "max_positions": 256, "parameters": 1}
    files = {"file": f"{stage}.onnx", "data": f"{stage}.onnx.data", "precision": "fp32"}
    return StageSpec(**files, **sizes, **more)  # type: ignore[arg-type]


def fused(config: Any, stage: str, recipe: Recipe) -> onnx.ModelProto:
    model = build(config, stage, recipe)
    offset = window_offset()
    assert offset is not None
    fuse_attention(model, spec_of(config, stage), offset)
    return ir.to_proto(model)


def loaded(model: onnx.ModelProto, precision: str = "fp32") -> Session:
    options = session_options(onnxruntime, precision, threads=1)
    return Session(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


Rewrite = Callable[[onnx.ModelProto], onnx.ModelProto]


def check(
    model: onnx.ModelProto, rows: int, precision: str = "fp32", rewrite: Rewrite = lambda packed: packed
) -> None:
    """Texts of different lengths packed give what each gives alone. rewrite: of the packed graph."""
    alone = loaded(model, precision)
    packed = loaded(rewrite(pack_rows(model, rows, "graph.onnx")), precision)
    ordered = any(value.name == "past_length" for value in alone.get_inputs())
    texts = []
    for row, (count, held) in enumerate(zip(COUNTS[:rows], HELD[:rows], strict=True)):
        if ordered:
            texts.append(fused_feeds(alone, count, held=held, capacity=40 + row, seed=row))
        else:
            texts.append(random_feeds(alone, count, slots=held, seed=row))
    found = outputs_of(run(packed, packed_feeds(texts)), COUNTS[:rows])
    for row, (text, mine) in enumerate(zip(texts, found, strict=True)):
        wanted = run(alone, text)
        assert wanted.keys() == mine.keys()
        for name, values in wanted.items():
            if name.startswith("present."):
                # What lies behind the positions is nobody's.
                end = HELD[row] + COUNTS[row]
                values, mine[name] = values[:, :, :end], mine[name][:, :, :end]
            assert share_apart(mine[name], values) <= APART[precision], (row, name)


# 1. The same numbers.


@pytest.mark.parametrize("name", MODELS)
def test_spelled_out_attention(name: str) -> None:
    config = config_of(MODELS[name])
    for stage in stage_names(config):
        check(ir.to_proto(build(config, stage, Recipe("fp32"))), 2 + len(name) % 4)


@fuses
@pytest.mark.parametrize("name", MODELS)
def test_fused_attention(name: str) -> None:
    config = config_of(widened(MODELS[name]))
    for stage in stage_names(config):
        check(fused(config, stage, Recipe("fp32")), 2 + len(name) % 4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", [name for name in APART if name != "fp32"])
@pytest.mark.parametrize("kind", ["spelled out", pytest.param("fused", marks=fuses)])
def test_precisions(precision: str, stage: str, kind: str) -> None:
    config = config_of(widened(BLOCKY) if kind == "fused" else BLOCKY)
    recipe = Recipe(precision, search="rtn", ranges=UnitRanges())
    model = fused(config, stage, recipe) if kind == "fused" else ir.to_proto(build(config, stage, recipe))
    check(model, 8, precision)


def joined(packed: onnx.ModelProto) -> onnx.ModelProto:
    """The packed graph as TensorRT is given it."""
    model = ir.from_proto(packed)
    assert join_attention(model, "graph.onnx") == 3 * 2
    return ir.to_proto(model)


@pytest.mark.parametrize("stage", STAGES)
def test_attention_can_be_joined_afterwards(stage: str) -> None:
    config = config_of(MODELS["gqa_everywhere_windows_16"], encoder_config=TWO_LAYERS)
    check(ir.to_proto(build(config, stage, Recipe("fp32"))), 3, rewrite=joined)


# 2. What stays as it is.


@pytest.mark.parametrize("stage", STAGES)
def test_weights_and_the_graph_that_was_given_stay(stage: str) -> None:
    model = ir.to_proto(build(config_of(BLOCKY), stage, Recipe("int4", search="rtn")))
    before = model.SerializeToString()
    packed = pack_rows(model, 4, stage)
    assert model.SerializeToString() == before
    assert list(packed.graph.initializer) == list(model.graph.initializer)
    assert list(packed.opset_import) == list(model.opset_import)
    names = [node.name for node in packed.graph.node]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("stage", STAGES)
def test_products_with_weights_are_there_once_and_attention_for_each_text(stage: str) -> None:
    model = ir.to_proto(build(config_of(BLOCKY), stage, Recipe("fp32")))
    weights = {tensor.name for tensor in model.graph.initializer}

    def products(graph: onnx.GraphProto) -> tuple[int, int]:
        """Products with weights, and those of attention."""
        found = [node for node in graph.node if node.op_type == "MatMul" and "self_attn" in node.name]
        own = sum(node.input[1] in weights for node in found)
        return own, len(found) - own

    with_weights, others = products(model.graph)
    assert products(pack_rows(model, 4, stage).graph) == (with_weights, 4 * others)


# 3. Graphs of another making.


def drop_positions(graph: onnx.GraphProto) -> None:
    (value,) = [value for value in graph.input if value.name == "positions"]
    graph.input.remove(value)


def turn_around(graph: onnx.GraphProto) -> None:
    nodes = list(graph.node)[::-1]
    del graph.node[:]
    graph.node.extend(nodes)


def branch(graph: onnx.GraphProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    graph.node[0].attribute.append(helper.make_attribute("body", inner))


def name_a_row(graph: onnx.GraphProto) -> None:
    graph.node[0].name = "row7.node"


def give_a_default(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1), np.int64), "positions"))


def make_twice(graph: onnx.GraphProto) -> None:
    graph.node.append(graph.node[0])


def gather_nothing(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Gather" and "patch_values" in node.input:
            node.op_type = "GatherElements"


def leave_out_the_products(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "MatMul":
            node.op_type = "Add"


def promise_more(graph: onnx.GraphProto) -> None:
    value = onnx.ValueInfoProto()
    value.CopyFrom(graph.output[0])
    value.name = "made_by_nobody"
    graph.output.append(value)


def ask_for_other_sizes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Shape" and "self_attn" in node.name:
            del node.attribute[:]


def empty(graph: onnx.GraphProto) -> None:
    for kind in ("node", "input", "output"):
        graph.ClearField(kind)


@pytest.mark.parametrize(
    "spoil",
    [
        drop_positions,
        turn_around,
        branch,
        name_a_row,
        give_a_default,
        make_twice,
        gather_nothing,
        leave_out_the_products,
        promise_more,
        ask_for_other_sizes,
        empty,
    ],
)
def test_it_is_refused_in_one_line(spoil: Callable[[onnx.GraphProto], None]) -> None:
    model = ir.to_proto(build(config_of(BLOCKY), "decoder", Recipe("fp32")))
    spoil(model.graph)
    with pytest.raises(BltError, match=r"^decoder\.onnx: it can't be packed \([^\n]*\); export it again$"):
        pack_rows(model, 2, "decoder.onnx")


def test_a_packed_graph_is_not_packed_again() -> None:
    packed = pack_rows(ir.to_proto(build(config_of(BLOCKY), "encoder", Recipe("fp32"))), 2, "encoder.onnx")
    with pytest.raises(BltError, match="it is packed already"):
        pack_rows(packed, 2, "encoder.onnx")
