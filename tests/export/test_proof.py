"""An engine that computes wrongly is neither published nor used, on any target."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export import build_ort, build_tensorrt, proof
from blt_edge.export.build_ort import build_engine
from blt_edge.export.build_tensorrt import TensorRtOptions, build_engines
from blt_edge.export.proof import WrongEngineError, build_steps
from blt_edge.export.quantize import QuantizationOptions, quantize_bundle
from blt_edge.export.tensorrt_worker import PlanFacts
from blt_edge.runtime import BackendError, BltModel, GenerationOptions
from blt_edge.runtime.backends.base import EngineLimits
from blt_edge.runtime.backends.ort import OrtCall, OrtStage
from blt_edge.runtime.backends.signatures import stage_inputs
from blt_edge.runtime.engines import was_proven
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.self_test import Hold, Run, TakeBack
from hypothesis import given
from hypothesis import strategies as st
from support.planted import ALIKE, MISTAKES, plant, reseal
from support.random_models import RandomModel, base_config, export_random_model
from support.simulated_gpu import SimulatedTensorRt, simulate, write_engines

TARGETS = ("tensorrt", "tensorrt-rtx")
WINDOWED = ("patcher", "encoder", "decoder")


@pytest.fixture(scope="module")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short windows, heads that are fused, 600 positions."""
    config = base_config(
        width=64,
        local_attention_window_len=24,
        patcher={"hidden_size": 64, "sliding_window": 16, "intermediate_size": 96, "num_key_value_heads": 2},
        encoder={"max_position_embeddings": 600, "intermediate_size": 64},
        decoder={"num_key_value_heads": 2, "intermediate_size": 96},
        global_stack={"hidden_size": 128, "intermediate_size": 96, "num_key_value_heads": 1},
    )
    return export_random_model(RandomModel("proof", config, share=0.3), tmp_path_factory.mktemp("proof"))


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8w", "int8", "int4"])
def any_bundle(request: pytest.FixtureRequest, float_bundle: Path) -> Path:
    """The same in every precision, all stages."""
    precision = str(request.param)
    if precision == "fp32":
        return float_bundle
    mix = ",".join(f"{stage}={precision}" for stage in load_manifest(float_bundle).stages)
    output = float_bundle.parent / precision
    return quantize_bundle(float_bundle, output, precision=mix, quantization=QuantizationOptions(windows=2))


@pytest.fixture
def bundle(any_bundle: Path, tmp_path: Path) -> Path:
    """A copy to put engines into."""
    ignored = shutil.ignore_patterns("engines")
    return Path(shutil.copytree(any_bundle, tmp_path / "bundle", ignore=ignored))


@pytest.fixture
def own_float(float_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the float32 bundle."""
    return Path(shutil.copytree(float_bundle, tmp_path / "float", ignore=shutil.ignore_patterns("engines")))


# On the processor.


@pytest.mark.parametrize("stage", WINDOWED)
@pytest.mark.parametrize("offset", [-1, 1])
def test_a_window_that_is_one_off_is_not_published(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, stage: str, offset: int
) -> None:
    fuse = build_ort.fuse_attention

    def planted(model: Any, spec: Any, right: int) -> None:
        fuse(model, spec, right + (offset if spec.file == f"{stage}.onnx" else 0))

    monkeypatch.setattr(build_ort, "fuse_attention", planted)
    with pytest.raises(
        WrongEngineError, match=rf"^{stage}: the engine that ONNX Runtime \S+ made is wrong: "
    ):
        build_engine(bundle)
    assert not (bundle / "engines").exists()
    assert BltModel.load(bundle, "cpu").engine.directory is None


@pytest.mark.parametrize("stage", ["patcher", "encoder", "latent", "decoder"])
def test_another_operator_is_not_published(bundle: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    load = build_ort.load_stage

    def planted(directory: Path, spec: Any) -> Any:
        model = load(directory, spec)
        if spec.file == f"{stage}.onnx":
            MISTAKES["another operator"](model.graph)
        return model

    monkeypatch.setattr(build_ort, "load_stage", planted)
    with pytest.raises(WrongEngineError, match=rf"^{stage}: .*differs by .* %.*nothing was kept"):
        build_engine(bundle)
    assert not (bundle / "engines").exists()


def test_a_right_engine_passes_and_keeps_its_self_test(bundle: Path) -> None:
    engine = build_engine(bundle)
    assert engine.directory is not None
    assert was_proven(engine.directory)
    assert (engine.directory / "self_test.bin").stat().st_size > 0
    model = BltModel.load(bundle, "cpu")
    assert (model.engine.directory, model.engine.reason) == (engine.directory, None)


@pytest.mark.parametrize("run", [0, 14, 45])
def test_an_engine_that_fails_while_it_runs_gives_way(
    own_float: Path, monkeypatch: pytest.MonkeyPatch, run: int
) -> None:
    """At load it is passed over, later replaced in the middle of a text; the text is theirs."""
    build_engine(own_float)
    options = GenerationOptions(max_new_bytes=30, draft="none")
    wanted = BltModel.load(own_float, "cpu", portable=True).generate("Once upon a time", options)
    left, whole = [run], OrtCall.run

    def failing(self: Any, done: Any) -> None:
        left[0] -= "past_length" in self.inputs
        if left[0] < 0 and "past_length" in self.inputs:
            raise RuntimeError("Non-zero status code returned while running GroupQueryAttention node")
        whole(self, done)

    monkeypatch.setattr(OrtCall, "run", failing)
    with warnings.catch_warnings(record=True) as caught:
        model = BltModel.load(own_float, "cpu")
        assert model.generate("Once upon a time", options).data == wanted.data
    assert len(caught) == (run > 8)  # the self-test's runs are those of the load
    assert (model.engine.directory, model.engine.name) == (None, "portable graphs")
    assert "its graph failed at position" in str(model.engine.reason)


@pytest.mark.parametrize("window", [1, 2, 3, 450])
def test_windows_of_every_size_pass(tmp_path: Path, window: int) -> None:
    config = base_config(
        width=64,
        local_attention_window_len=window,
        patcher={"hidden_size": 64, "sliding_window": window},
        encoder={"max_position_embeddings": 400},
    )
    bundle = export_random_model(RandomModel("window", config, share=0.3), tmp_path)
    built = build_engine(bundle)
    model, portable = BltModel.load(bundle, "cpu", rollback=0), BltModel.load(bundle, "cpu", portable=True)
    assert model.engine.directory == built.directory
    text = bytes(range(256))
    np.testing.assert_allclose(model.logits(text), portable.logits(text), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", ["patcher", "encoder", "latent", "decoder"])
def test_an_engine_that_changed_since_is_not_used(own_float: Path, stage: str) -> None:
    built = build_engine(own_float).directory
    assert built is not None
    # Another library under the same version: what it computes is this, and every file is as recorded.
    wrong = plant(own_float / f"{stage}.onnx", MISTAKES["another operator"])
    shutil.move(wrong, built / f"{stage}.onnx")
    shutil.copy(own_float / f"{stage}.onnx.data", built / f"{stage}.onnx.data")
    reseal(built)
    model = BltModel.load(own_float, "cpu")
    assert model.engine.directory is None
    assert f"{stage}: its self-test failed, " in str(model.engine.reason)
    assert str(model.engine.reason).endswith("build it again")
    assert "\n" not in str(model.engine)
    assert np.isfinite(model.logits(b"abc")).all()
    assert BltModel.load(own_float, "cpu", probe=False).engine.directory == built


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:-4], "has not the"),
        (lambda data: data + b"\0\0\0\0", "has not the"),
        (lambda data: np.full(len(data) // 4, np.nan, "<f4").tobytes(), "self-test failed"),
        (lambda data: np.full(len(data) // 4, np.inf, "<f4").tobytes(), "self-test failed"),
        (lambda data: bytes(len(data)), "self-test failed"),
    ],
)
def test_a_damaged_self_test_is_a_reason(
    own_float: Path, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    built = build_engine(own_float).directory
    assert built is not None
    path = built / "self_test.bin"
    path.write_bytes(spoil(path.read_bytes()))
    reseal(built)
    model = BltModel.load(own_float, "cpu")
    assert model.engine.directory is None
    assert reason in str(model.engine.reason)


def test_an_operator_that_is_of_no_use_is_done_without(
    own_float: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_ort, "window_offset", lambda: None)
    built = build_engine(own_float).directory
    assert built is not None
    assert b"GroupQueryAttention" not in (built / "decoder.onnx").read_bytes()
    model, portable = BltModel.load(own_float, "cpu"), BltModel.load(own_float, "cpu", portable=True)
    assert model.engine.directory == built
    np.testing.assert_allclose(model.logits(b"abc" * 40), portable.logits(b"abc" * 40), rtol=0, atol=1e-4)


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("any_bundle", ["int8w", "int4"], indirect=True)
def test_blocks_are_one_operator_where_that_works(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    if not works:
        monkeypatch.setattr(build_ort, "multiplies_blocks", lambda bits: False)
        # What the engine itself makes of the spelled-out graph may still be wrong, which is then seen.
        monkeypatch.setattr(build_ort, "prove_engine", lambda *args, **_options: args[4].write_bytes(b""))
    built = build_engine(bundle, rows=()).directory
    assert built is not None
    files = {f"{stage}.onnx{data}" for stage in load_manifest(bundle).stages for data in ("", ".data")}
    assert {path.name for path in built.iterdir()} == files | {"engine.json", "self_test.bin"}
    if works:
        graph = (built / "latent.onnx").read_bytes()
        assert b"MatMulNBits" in graph
        assert b"DequantizeLinear" not in graph
        assert BltModel.load(bundle, "cpu").engine.reason is None


# On a GPU, simulated.


def build_on_gpu(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, target: str, stage: str, mistake: str, here: str | None
) -> Any:
    """`build --target` for a GPU of compute capability 8.6; one stage's engine has a mistake."""
    driver = simulate(monkeypatch, target)
    trt = SimulatedTensorRt(driver).as_module(target)

    def build(_target: str, graph: Path, ranges: Any, plan: Path, *_more: Any) -> PlanFacts:
        manifest = load_manifest(bundle)
        source = plant(graph, ALIKE[mistake]) if graph.stem == stage else graph
        axes = stage_inputs(manifest, graph.stem)
        shapes = [
            {
                name: [
                    [axis if isinstance(axis, int) else sizes[axis][bound] for axis in named]
                    for bound in range(3)
                ]
                for name, named in axes.items()
            }
            for sizes in ranges
        ]
        plan.write_text(json.dumps({"graph": str(source), "profiles": shapes}))
        return PlanFacts(plan.stat().st_size, 0.1, None, None)

    monkeypatch.setattr(build_tensorrt, "load_tensorrt", lambda _target: trt)
    monkeypatch.setattr(type(trt), "compute_capabilities", ("8.6",))
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: here)
    monkeypatch.setattr(build_tensorrt, "build_in_child", build)
    capability = ("8.6",) if target == "tensorrt-rtx" else ()
    return build_engines(bundle, TensorRtOptions(target, capability))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("stage", "mistake"),
    [*((stage, "a longer window") for stage in WINDOWED), ("latent", "another operator")],
)
def test_a_wrong_engine_is_not_published_on_a_gpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str, stage: str, mistake: str
) -> None:
    with pytest.raises(
        WrongEngineError, match=rf"^{stage}: the engine that TensorRT\S* 10\.3\.0 made is wrong"
    ):
        build_on_gpu(monkeypatch, bundle, target, stage, mistake, "8.6")
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_a_right_engine_is_published_and_used_on_a_gpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    built = build_on_gpu(monkeypatch, bundle, target, "decoder", "none", "8.6")
    assert built.proven
    assert was_proven(built.engine.directory)
    assert BltModel.load(bundle, target).engine.directory == built.engine.directory


@pytest.mark.parametrize("mistake", ["none", "another operator"])
def test_an_engine_that_could_not_run_is_proven_when_it_is_loaded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    built = build_on_gpu(monkeypatch, bundle, "tensorrt-rtx", "latent", mistake, None)
    assert not built.proven
    if mistake == "none":
        assert BltModel.load(bundle, "tensorrt-rtx").engine.directory == built.engine.directory
        return
    with pytest.raises(BackendError, match=r"^latent: its self-test failed, .*; build it again$"):
        BltModel.load(bundle, "tensorrt-rtx")
    fallen_back = BltModel.load(bundle)
    assert fallen_back.engine.device == "CPU"
    assert "latent: its self-test failed" in str(fallen_back.engine.reason)


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_that_changed_since_is_not_used_on_a_gpu(
    own_float: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    simulate(monkeypatch, target)
    built = write_engines(own_float, target)
    assert BltModel.load(own_float, target).engine.directory == built
    plan = built / "decoder.plan"
    wrong = plant(own_float / "decoder.onnx", MISTAKES["a longer window"])
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "graph": str(wrong)}))
    reseal(built)
    with pytest.raises(BackendError, match=r"^decoder: its self-test failed"):
        BltModel.load(own_float, target)
    (built / "self_test.bin").write_bytes(b"x")
    reseal(built)
    with pytest.raises(BackendError, match=r"^self_test\.bin has not the \d+ bytes"):
        BltModel.load(own_float, target)
    assert BltModel.load(own_float).engine.device == "CPU"
    assert BltModel.load(own_float, target, probe=False).engine.directory == built


# What runs.


@given(
    window=st.one_of(st.none(), st.integers(1, 700)),
    most=st.integers(1, 900),
    rows=st.integers(1, 300),
    rollback=st.integers(0, 70),
    stage=st.sampled_from(["patcher", "latent"]),
)
def test_steps_keep_within_what_the_engine_takes(
    float_bundle: Path, window: int | None, most: int, rows: int, rollback: int, stage: str
) -> None:
    spec = replace(load_manifest(float_bundle).stages[stage], window=window, max_positions=most)
    reach = EngineLimits(most, most, 8, 1, rows, rollback)
    length = base = 0
    kinds = set()
    for step in build_steps(stage, spec, reach):
        kinds.add(type(step))
        if isinstance(step, Hold):
            base = length = step.first + step.count
        elif isinstance(step, TakeBack):
            assert 0 < step.count <= rollback
            length -= step.count
            assert length >= base
        else:
            assert 1 <= step.rows <= rows
            length += step.rows
        assert length <= most
    assert Run in kinds
    if most > (window or 0) + 300 and rows >= 64 and rollback >= 8:
        assert kinds == {Run, Hold, TakeBack}
        past = [step for step in build_steps(stage, spec, reach) if isinstance(step, Hold)]
        assert all(step.count >= (window or 1) - 1 for step in past)


def test_the_portable_graph_is_read_as_it_stands(own_float: Path, tmp_path: Path) -> None:
    """Proving is no matter of two copies of one mistake: the reference is not the engine."""
    manifest, asked = load_manifest(own_float), []

    def open_stage(stage: str) -> OrtStage:
        asked.append(stage)
        return OrtStage(own_float, manifest, stage, 1)

    reach = EngineLimits(600, 600, 8)
    proof.prove_engine(
        own_float, manifest, open_stage, reach, tmp_path / "self_test.bin", name="it", alike=True
    )
    assert asked == list(manifest.stages)
