"""Every stage and precision builds for GPUs that are not here; refusals and deaths are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export import tensorrt_worker
from blt_edge.export.tensorrt_worker import Moment, PlanFacts, PlanOptions, Ranges, build_in_child, build_plan
from blt_edge.graphs.config import ModelConfig
from blt_edge.graphs.quantize import Recipe
from blt_edge.graphs.stages import axis_ranges, stage_stack
from blt_edge.runtime.backends.tensorrt import TensorRtModule
from blt_edge.runtime.backends.tensorrt_profiles import Profiles
from blt_edge.runtime.child import Outcome
from blt_edge.runtime.errors import BackendError
from blt_edge.runtime.names import PRECISIONS, STAGES
from onnx import TensorProto, helper, numpy_helper
from support.bundles import describe
from support.onnx_graphs import FEW, plain_product, save_graph
from support.quantized import UnitRanges, config_of, save_random_stage
from support.random_models import RandomModel, base_config

ONE = {"num_hidden_layers": 1}

# Grouped queries and several blocks of 32 in every matrix.
SMALL = RandomModel(
    "small",
    base_config(
        width=32,
        local_attention_window_len=24,
        patcher={**ONE, "hidden_size": 64, "intermediate_size": 96, "sliding_window": 16},
        encoder={**ONE, "intermediate_size": 64},
        decoder={**ONE, "intermediate_size": 96, "num_key_value_heads": 2},
        global_stack={**ONE, "intermediate_size": 96},
    ),
)
# The released 1B's heads, windows and positions, an eighth as wide, one layer of each.
LOCAL = {**ONE, "num_attention_heads": 2, "intermediate_size": 352, "max_position_embeddings": 24576}
SHRUNKEN = RandomModel(
    "shrunken",
    base_config(
        width=128,
        local_attention_window_len=512,
        patcher={
            **LOCAL,
            "hidden_size": 128,
            "intermediate_size": 256,
            "sliding_window": 512,
            "max_position_embeddings": 8192,
        },
        encoder=LOCAL,
        decoder=LOCAL,
        global_stack={**LOCAL, "intermediate_size": 704, "max_position_embeddings": 4096},
    ),
)
# One layer as wide as the released 1B's: an engine's size is then its weights, not its kernels.
WIDE = RandomModel(
    "wide",
    base_config(
        width=1024,
        encoder={"num_attention_heads": 16, "intermediate_size": 2816},
        decoder={"num_attention_heads": 16, "intermediate_size": 2816},
        global_stack={**ONE, "num_attention_heads": 16, "intermediate_size": 5632},
    ),
)


def ranges_for(config: ModelConfig) -> Profiles:
    """The profiles of a model that is in no bundle."""
    base = describe()
    manifest = replace(
        base,
        model=replace(base.model, max_positions=config.encoder.max_positions),
        stages={
            name: replace(
                base.stages[name],
                window=stage_stack(config, name).window,
                max_positions=stage_stack(config, name).max_positions,
            )
            for name in STAGES
        },
        axes=axis_ranges(config),
    )
    return Profiles.of(manifest)


def ranges_of(config: ModelConfig, stage: str) -> Ranges:
    """Both profiles of a stage."""
    pair = ranges_for(config).stages[stage]
    return tuple({name: (axis.min, axis.opt, axis.max) for name, axis in axes.items()} for axes in pair)


def build_random(
    trt: TensorRtModule, folder: Path, model: RandomModel, stage: str, precision: str, *capabilities: str
) -> PlanFacts:
    config = config_of(model)
    # Plain rounding: the search would change nothing that TensorRT sees.
    path = save_random_stage(folder, config, stage, Recipe(precision, search="rtn", ranges=UnitRanges()))
    options = PlanOptions(capabilities or ("8.6",), half_attention=precision != "fp32")
    return build_plan(trt, path, ranges_of(config, stage), folder / "stage.plan", options)


# 1. Graphs.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", [SMALL, SHRUNKEN], ids=lambda model: model.name)
def test_a_stage_builds_with_both_profiles(
    rtx: TensorRtModule, model: RandomModel, stage: str, precision: str, tmp_path: Path
) -> None:
    facts = build_random(rtx, tmp_path, model, stage, precision)
    assert facts.bytes == (tmp_path / "stage.plan").stat().st_size > 0
    assert facts.activations is not None


@pytest.mark.parametrize(
    ("stage", "precision"), [*zip(STAGES, ("fp32", "int8w", "fp16", "int4"), strict=True)]
)
def test_a_stage_builds_for_several_texts(
    rtx: TensorRtModule, stage: str, precision: str, tmp_path: Path
) -> None:
    config = config_of(SMALL)
    recipe = Recipe(precision, search="rtn", ranges=UnitRanges())
    path = save_random_stage(tmp_path, config, stage, recipe)
    axes = ranges_for(config).packed(stage, 3)
    ranges = ({name: (axis.min, axis.opt, axis.max) for name, axis in axes.items()},)
    options = PlanOptions(("8.6",), half_attention=precision != "fp32", rows=3)
    facts = build_plan(rtx, path, ranges, tmp_path / "packed.plan", options)
    assert facts.bytes > 0
    # What a graph for one is built for is no profile of it.
    with pytest.raises(BackendError, match="for which the profiles have no range"):
        build_plan(rtx, path, ranges_of(config, stage), tmp_path / "x.plan", options)
    with pytest.raises(BackendError, match="for which the profiles have no range"):
        build_plan(rtx, path, ranges, tmp_path / "x.plan", replace(options, rows=1))


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_builds_for_other_gpus(rtx: TensorRtModule, stage: str, tmp_path: Path) -> None:
    build_random(rtx, tmp_path, SMALL, stage, "fp16", "8.0", "8.9", "12.0")


def test_engine_sizes_show_that_precisions_are_real(rtx: TensorRtModule, tmp_path: Path) -> None:
    sizes = {}
    for precision in ("fp16", "int8", "int8w", "int4"):
        (tmp_path / precision).mkdir()
        sizes[precision] = build_random(rtx, tmp_path / precision, WIDE, "latent", precision).bytes
    assert sizes["int8"] <= 0.65 * sizes["fp16"]
    assert sizes["int8w"] <= 0.65 * sizes["fp16"]
    assert sizes["int4"] <= 0.4 * sizes["fp16"]


def test_fewer_patches_take_less_gpu_memory(rtx: TensorRtModule, tmp_path: Path) -> None:
    config = config_of(SMALL)
    path = save_random_stage(tmp_path, config, "latent", Recipe("fp16"))
    taken = []
    for most in (4096, 512):
        ranges = tuple({**axes, "past": (1, 512, most)} for axes in ranges_of(config, "latent"))
        facts = build_plan(rtx, path, ranges, tmp_path / f"{most}.plan", PlanOptions(("8.6",)))
        taken.append(facts.activations or 0)
    assert taken[0] > 2 * taken[1] > 0


def test_joined_attention_takes_less_gpu_memory(
    rtx: TensorRtModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = {"num_attention_heads": 8, "num_hidden_layers": 3, "intermediate_size": 64}
    config = config_of(RandomModel("deep", base_config(width=512, global_stack=stack)))
    path = save_random_stage(tmp_path, config, "latent", Recipe("fp32"))
    # One byte a patch, so that it is attention that takes the memory.
    ranges = {"batch": (1, 1, 1), "patches": (1, 1, 16), "patch_length": (1, 1, 1), "past": (1, 512, 4096)}

    def taken(plan: str, half: bool) -> int:
        options = PlanOptions(("8.6",), half_attention=half)
        return build_plan(rtx, path, (ranges,), tmp_path / plan, options).activations or 0

    joined, half = taken("joined", False), taken("half", True)
    monkeypatch.setattr(tensorrt_worker, "_prepared", lambda graph, options: graph.read_bytes())
    apart = taken("apart", False)
    assert 0 < 2 * half < joined < apart / 2


# 2. What TensorRT refuses: the node, the reason, and nothing on stderr.


def refusal(
    trt: TensorRtModule,
    path: Path,
    capfd: pytest.CaptureFixture[str],
    ranges: Ranges = FEW,
    capability: str = "8.6",
    **options: Any,
) -> str:
    plan = path.with_suffix(".plan")
    with pytest.raises(BackendError) as caught:
        build_plan(trt, path, ranges, plan, PlanOptions((capability,), **options))
    assert not plan.exists()
    assert capfd.readouterr().err == ""
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("broken.onnx: ")
    return message


SCATTER = [
    helper.make_node("Add", ["x", "x"], ["twice"], name="double"),
    helper.make_node("ScatterElements", ["twice", "i", "x"], ["y"], name="pool/max", reduction="max"),
]
FUSED = helper.make_node(
    "GroupQueryAttention", ["x"], ["y"], name="attn", domain="com.microsoft", num_heads=1, kv_num_heads=1
)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (SCATTER, "node 'pool/max' (ScatterElements): Unsupported reduction type"),
        ([FUSED], "node 'attn' (GroupQueryAttention): the operator is com.microsoft's own, not one of"),
    ],
)
def test_a_node_that_is_refused(
    rtx: TensorRtModule, tmp_path: Path, capfd: Any, nodes: Any, reason: str
) -> None:
    indices = helper.make_tensor_value_info("i", TensorProto.INT64, ["bytes", 4])
    message = refusal(rtx, save_graph(tmp_path, nodes, inputs=[indices]), capfd)
    by = f"TensorRT-RTX {rtx.version} refused it for compute capability 8.6"
    assert message.startswith(f"broken.onnx: {by}: {reason}")


def fp8_product(folder: Path) -> Path:
    nodes = []
    for name in ("x", "w"):
        small, back = [f"{name}8"], [f"{name}_back"]
        nodes += [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], small, name=f"quantize_{name}"),
            helper.make_node("DequantizeLinear", [*small, "scale", "zero"], back, name=f"dequantize_{name}"),
        ]
    nodes.append(helper.make_node("MatMul", ["x_back", "w_back"], ["y"], name="product"))
    inits = [
        numpy_helper.from_array(np.ones((4, 4), np.float32), "w"),
        numpy_helper.from_array(np.float32(0.1), "scale"),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
    ]
    return save_graph(folder, nodes, inits)


def test_a_type_that_the_gpu_lacks(rtx: TensorRtModule, tmp_path: Path, capfd: Any) -> None:
    path = fp8_product(tmp_path)
    message = refusal(rtx, path, capfd)
    assert "node 'quantize_x' gives FP8; Cannot compile for target(s) sm86" in message
    assert "fp8_e4m3" in message
    build_plan(rtx, path, FEW, tmp_path / "ada.plan", PlanOptions(("8.9",)))


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ({"bytes": (4, 2, 1)}, "range of bytes is 4, 2, 1; smallest <= tuned for <= largest is needed"),
        (
            {"past": (1, 1, 1)},
            "'x' has an axis 'bytes', for which the profiles have no range; they have past",
        ),
    ],
)
def test_a_profile_that_does_not_fit(
    rtx: TensorRtModule, tmp_path: Path, capfd: Any, ranges: dict[str, Any], reason: str
) -> None:
    assert refusal(rtx, plain_product(tmp_path), capfd, (ranges,)).endswith(reason)


def test_a_profile_beyond_the_graphs_range(rtx: TensorRtModule, tmp_path: Path, capfd: Any) -> None:
    rows = numpy_helper.from_array(np.ones((3, 4), np.float32), "w")
    path = save_graph(tmp_path, [helper.make_node("Add", ["x", "w"], ["y"], name="sum")], [rows])
    message = refusal(rtx, path, capfd, ({"bytes": (2, 2, 2)},))
    assert message.endswith("IElementWiseLayer sum: broadcast dimensions must be conformable")


def test_too_small_a_workspace(rtx: TensorRtModule, tmp_path: Path, capfd: Any) -> None:
    message = refusal(rtx, plain_product(tmp_path), capfd, workspace=1)
    assert message.endswith("; give a larger --workspace")


@pytest.mark.parametrize("data", [b"hello" * 100, b""])
def test_a_file_that_is_no_graph(rtx: TensorRtModule, tmp_path: Path, capfd: Any, data: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    assert "refused it" in refusal(rtx, path, capfd)


# 3. In a process of its own.


def test_a_child_builds_and_reports(rtx: TensorRtModule, tmp_path: Path) -> None:
    moments: list[Moment] = []
    graph, plan = plain_product(tmp_path), tmp_path / "x.plan"
    facts = build_in_child(rtx.target, graph, FEW, plan, PlanOptions(("8.6",)), moments.append)
    assert facts.bytes == plan.stat().st_size
    assert moments
    assert all(0 <= moment.done <= moment.steps for moment in moments)


def test_a_childs_errors_come_through(rtx: TensorRtModule, tmp_path: Path, capfd: Any) -> None:
    path, options = plain_product(tmp_path), PlanOptions(("8.6",))
    with pytest.raises(BackendError, match="the profile's range of bytes is 4, 2, 1"):
        build_in_child(rtx.target, path, ({"bytes": (4, 2, 1)},), tmp_path / "x", options)
    with pytest.raises(FileNotFoundError, match="none/x"):
        build_in_child(rtx.target, path, FEW, tmp_path / "none" / "x", options)
    assert capfd.readouterr() == ("", "")


def test_a_child_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_worker, "run_child", lambda *_: Outcome(death="crashed (SIGSEGV)"))
    with pytest.raises(BackendError, match=r"broken\.onnx: .* crashed \(SIGSEGV\); close other programs"):
        build_in_child("tensorrt-rtx", plain_product(tmp_path), FEW, tmp_path / "x", PlanOptions(("8.6",)))
