"""Attention over joined keys and values is the portable graphs' attention, and transformers'.

What fused attention computes is compared in tests/export/test_engines.py, beside the bundle it came from.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.export.build_tensorrt import _check_graph
from blt_edge.export.bundle import load_stage
from blt_edge.export.lint_tensorrt import RULES, lint_graph
from blt_edge.graphs.attention import fuse_attention, half_attention, join_attention
from blt_edge.graphs.quantize import Recipe
from blt_edge.graphs.stages import stage_stack
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.runtime.errors import BltError, BundleError
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.names import PRECISIONS, STAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_store import RandomModels
from support.parity_cases import CASES
from support.quantized import BLOCKY, Session, UnitRanges, build, config_of, random_feeds, session
from support.random_models import PARITY_TEXT, RandomModel, base_config
from support.simulated_gpu import simulate, write_engines

GQA = {"num_key_value_heads": 2}
MODELS = {
    "plain": BLOCKY,
    "grouped, windows of 9": RandomModel(
        "grouped",
        base_config(
            local_attention_window_len=9,
            patcher={**GQA, "sliding_window": 9},
            encoder={**GQA, "num_hidden_layers": 2},
            decoder={"num_key_value_heads": 1},
            global_stack=GQA,
        ),
    ),
}


@cache
def sessions(name: str, stage: str) -> list[Session]:
    """The portable float32 graph, joined, joined in float16."""
    config = config_of(MODELS[name])
    models = [build(config, stage, Recipe("fp32")) for _ in range(3)]
    for model, half in zip(models[1:], (False, True), strict=True):
        assert join_attention(model, stage, half=half) == stage_stack(config, stage).layers
    return [session(model) for model in models]


def run(graph: Session, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [value.name for value in graph.get_outputs()]
    return dict(zip(names, graph.run(names, inputs), strict=True))


# 1. The same numbers.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None)
@given(
    batch=st.sampled_from([1, 3]),
    count=st.integers(1, 12),
    slots=st.integers(0, 25),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_computes_what_the_portable_graph_computes(
    name: str, stage: str, batch: int, count: int, slots: int, seed: int
) -> None:
    portable, joined, half = sessions(name, stage)
    inputs = random_feeds(portable, count, batch=batch, slots=slots, seed=seed)
    inputs["positions"][1:, seed % count + 1 :] = -1  # rows padded to the length of the first
    wanted, found, rounded = (run(graph, inputs) for graph in (portable, joined, half))
    assert list(wanted) == list(found) == list(rounded)
    for output, values in wanted.items():
        scale = max(1.0, float(np.abs(values).max()))
        assert np.isfinite(found[output]).all()
        assert np.abs(found[output] - values).max() <= 1e-5 * scale, output
        # fp16's tolerance of a stage; a new key of a later layer follows from the rounded ones before.
        assert np.linalg.norm(rounded[output] - values) <= 0.005 * np.linalg.norm(values), output


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("half", [False, True])
def test_inputs_outputs_and_weights_are_the_same(stage: str, half: bool) -> None:
    config = config_of(MODELS["plain"])
    before, after = build(config, stage, Recipe("fp16")), build(config, stage, Recipe("fp16"))
    join_attention(after, stage, half=half)
    for attribute in ("inputs", "outputs"):
        described = [
            [(value.name, value.dtype, value.shape) for value in getattr(model.graph, attribute)]
            for model in (before, after)
        ]
        assert described[0] == described[1]
    large = [
        {name for name, value in model.graph.initializers.items() if value.const_value.nbytes > 1024}
        for model in (before, after)
    ]
    assert large[0] == large[1]
    names = [node.name for node in after.graph]
    assert len(names) == len(set(names))
    ir.passes.common.CheckerPass(full_check=True)(after)


@pytest.mark.parametrize("half", [False, True])
def test_only_the_two_products_read_float16(half: bool) -> None:
    model = build(config_of(MODELS["grouped, windows of 9"]), "decoder", Recipe("fp32"))
    join_attention(model, "decoder", half=half)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    by_operator: dict[str, int] = {}
    for node in proto.graph.node:
        if any(types.get(name) == onnx.TensorProto.FLOAT16 for name in node.input):
            by_operator[node.op_type] = by_operator.get(node.op_type, 0) + 1
    # Two layers: both products, the transposed keys, and the way back from both.
    assert by_operator == ({"MatMul": 4, "Transpose": 2, "Cast": 4} if half else {})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_brings_nothing_that_tensorrt_10_3_refuses(stage: str, precision: str) -> None:
    config = config_of(MODELS["plain"])
    recipe = Recipe(precision, search="rtn", ranges=UnitRanges())
    model = build(config, stage, recipe)
    before = lint_graph(ir.to_proto(model), stage, RULES["tensorrt-10.3"])
    join_attention(model, stage, half=precision != "fp32")
    assert lint_graph(ir.to_proto(model), stage, RULES["tensorrt-10.3"]) == before


# 2. In a bundle.


CASE = next(case for case in CASES if case.name == "gqa_everywhere_windows_16")


@pytest.fixture(scope="module")
def portable(random_models: RandomModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(random_models.folder(CASE), tmp_path_factory.mktemp("portable") / "bundle")


def joined_bundle(bundle: Path, target: Path) -> Path:
    """A copy whose stages are what TensorRT is given; weights where they were."""
    shutil.copytree(bundle, target)
    manifest = load_manifest(target)
    for spec in manifest.stages.values():
        model = load_stage(target, spec)
        join_attention(model, spec.file, half=half_attention(spec))
        (target / spec.file).write_bytes(ir.to_proto(model).SerializeToString())
    files = {name: file_record(target / name) for name in manifest.files}
    write_manifest(target, manifest.with_files(files))
    return target


def test_it_computes_what_transformers_computes(
    portable: Path, random_models: RandomModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = joined_bundle(portable, tmp_path / "joined")
    simulate(monkeypatch, "tensorrt")
    write_engines(bundle, "tensorrt")
    model = BltModel.load(bundle, "tensorrt", prefill_chunk=96)
    text = PARITY_TEXT[:700]
    wanted = random_models.reference(CASE).logits(PARITY_TEXT)[: 1 + len(text)]
    assert np.abs(model.logits(text) - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())
    sample = random_models.greedy(CASE, 64)
    for draft in ("none", "decoder"):
        result = model.generate(sample.prompt, GenerationOptions(max_new_bytes=64, draft=draft))
        assert result.data == sample.data[:64], draft


# 3. Graphs of another making.


@pytest.mark.parametrize(
    "spoil",
    [
        lambda node: setattr(node, "op_type", "Neg") if node.op_type == "Softmax" else None,
        lambda node: setattr(node, "op_type", "Sub") if node.op_type == "Add" else None,
        lambda node: setattr(node, "op_type", "Identity") if node.op_type == "Transpose" else None,
        lambda node: node.replace_input_with(2, node.inputs[3]) if node.op_type == "Slice" else None,
        lambda node: node.replace_input_with(0, None) if node.op_type == "MatMul" else None,
        lambda node: node.replace_input_with(0, node.inputs[1]) if node.op_type == "Concat" else None,
        lambda node: node.attributes.clear(),
    ],
)
def test_a_graph_of_another_making_is_refused_in_one_line(spoil: Callable[[ir.Node], object]) -> None:
    model = build(config_of(MODELS["plain"]), "decoder", Recipe("fp32"))
    for node in model.graph:
        if "/self_attn/" in str(node.name):
            spoil(node)
    with pytest.raises(BltError, match=r"^decoder\.onnx: its attention is not what [^\n]*$"):
        join_attention(model, "decoder.onnx")


def test_other_heads_than_the_manifest_s_are_refused(portable: Path) -> None:
    spec = load_manifest(portable).stages["decoder"]
    with pytest.raises(BltError, match=r"^decoder\.onnx: its heads are not those of the manifest"):
        fuse_attention(load_stage(portable, spec), replace(spec, kv_heads=99))


def test_attention_that_is_nowhere_is_missed(portable: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(portable, tmp_path / "bundle"))
    manifest = load_manifest(bundle)
    model: Any = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    for node in model.graph.node:
        node.name = ""
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())
    _check_graph(bundle, manifest, "encoder")
    with pytest.raises(BundleError, match=r"^decoder\.onnx: 0 attention layers found, the manifest has \d"):
        _check_graph(bundle, manifest, "decoder")
