"""Which device a model runs on: the one that was asked for, the best there is, or a reason."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BackendError, BltModel, BundleError, OptionError
from blt_edge.runtime.backends import ort_gpu
from blt_edge.runtime.backends.ort_gpu import PROVIDERS
from blt_edge.runtime.errors import requirement
from support.simulated_gpu import SimulatedOrt, simulate, write_engines


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to put engines into."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("device", "options", "said"),
    [
        ("gpu", {}, r"device: got 'gpu', allowed are auto, cpu, tensorrt, tensorrt-rtx, "),
        ("cpu", {"provider_options": {"a": "b"}}, r"provider_options: device 'cpu' has none; .* cuda, ort-"),
        ("tensorrt", {"threads": 2}, r"threads: got 2, device 'tensorrt' computes on the GPU"),
    ],
)
def test_what_a_device_does_not_have_is_refused(
    tiny_bundle: Path, device: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        BltModel.load(tiny_bundle, device, **options)


def test_auto_takes_engines_first(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "tensorrt", "cuda")
    write_engines(bundle, "tensorrt")
    model = BltModel.load(bundle)
    assert model.engine.device == "Simulated, TensorRT 10.3.0"
    assert model.kernels == "TensorRT on Simulated"
    assert str(model.engine).startswith("engines/tensorrt-")


def test_auto_takes_cuda_where_there_are_no_engines(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "tensorrt", "cuda")
    model = BltModel.load(bundle)
    assert model.engine.device == "Simulated, CUDAExecutionProvider of ONNX Runtime 1.99"
    assert model.kernels == "CUDAExecutionProvider on Simulated"


def test_auto_says_why_the_gpu_is_not_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "tensorrt")
    write_engines(bundle, "tensorrt", capability="8.7")
    model = BltModel.load(bundle)
    assert model.engine.device == "CPU"
    assert "was built for compute capability 8.7, here it is 8.6" in str(model.engine.reason)
    with pytest.raises(BackendError, match=r"built for compute capability 8\.7, here it is 8\.6"):
        BltModel.load(bundle, "tensorrt")


def test_engines_for_less_than_asked_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "tensorrt-rtx")
    write_engines(bundle, "tensorrt-rtx", prefill_chunk=64)
    with pytest.raises(BackendError, match=r"prefill_chunk of up to 64, here it is 256"):
        BltModel.load(bundle, "tensorrt-rtx")
    assert BltModel.load(bundle, "tensorrt-rtx", prefill_chunk=64).engine.device.startswith("Simulated")


def test_without_engines_it_says_how_to_build_them(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "tensorrt")
    with pytest.raises(BackendError, match=r"no engines here; blt-edge build .* --target tensorrt makes"):
        BltModel.load(bundle, "tensorrt")


def test_a_provider_that_falls_back_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = simulate(monkeypatch, "cuda")
    module = SimulatedOrt(driver, PROVIDERS["cuda"].name, falls_back=True)
    monkeypatch.setattr(ort_gpu, "import_onnxruntime", lambda: module)
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider was asked for, but .* run it on nothing"):
        BltModel.load(bundle, "cuda")


def test_a_provider_that_is_not_there_is_refused(bundle: Path) -> None:
    needed = f"needs ONNX Runtime's CUDAExecutionProvider.*{re.escape(requirement('gpu'))}"
    with pytest.raises(BackendError, match=needed):
        BltModel.load(bundle, "cuda")


def test_providers_are_told_stream_ranges_and_caches(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = simulate(monkeypatch, "ort-tensorrt")
    BltModel.load(bundle, "ort-tensorrt", provider_options={"trt_fp16_enable": "True"})
    told = ort_gpu.import_onnxruntime().options
    assert len(told) == 4
    for options in told:
        assert options["user_compute_stream"] == str(driver.stream)
        assert options["trt_fp16_enable"] == "True"
        assert Path(options["trt_engine_cache_path"]).is_dir()
        assert Path(options["trt_engine_cache_path"]).parent.parent == bundle
        names = {part.split(":")[0] for part in options["trt_profile_max_shapes"].split(",")}
        assert {"positions", "past_positions", "past.0.key"} <= names
        assert "0x" not in options["trt_profile_min_shapes"]


def test_a_gpu_that_computes_nonsense_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "cuda")
    # Memory stays as it was: NaN.
    monkeypatch.setattr("support.simulated_ort.compute", lambda *arguments: None)
    with pytest.raises(BackendError, match=r"computes no finite numbers; see blt-edge doctor"):
        BltModel.load(bundle, "cuda")
    model = BltModel.load(bundle)
    assert model.engine.device == "CPU"
    assert "computes no finite numbers" in str(model.engine.reason)


def test_auto_does_not_hide_a_damaged_engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "tensorrt")
    write_engines(bundle, "tensorrt")
    monkeypatch.setattr(
        "blt_edge.runtime.backends.tensorrt_stage.stage_signature", lambda *arguments: ({}, {})
    )
    with pytest.raises(BundleError, match=r"input .* the manifest asks for absent"):
        BltModel.load(bundle)


def test_what_a_provider_says_is_told(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(monkeypatch, "ort-tensorrt")
    with pytest.raises(BackendError, match=r"refused it: The value for the key 'trt_fp16_enable' should be"):
        BltModel.load(bundle, "ort-tensorrt", provider_options={"trt_fp16_enable": "1"})
    assert capsys.readouterr().out == ""


def test_graphs_that_cannot_be_captured_run_without(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = simulate(monkeypatch, "cuda")
    module = SimulatedOrt(driver, PROVIDERS["cuda"].name, captures=False)
    monkeypatch.setattr(ort_gpu, "import_onnxruntime", lambda: module)
    model = BltModel.load(bundle, "cuda")
    assert model.engine.device.endswith("1.99, without CUDA graphs for patcher, encoder, latent, decoder")
    assert np.isfinite(model.logits(b"abc")).all()
    model = BltModel.load(bundle, "cuda", provider_options={"enable_cuda_graph": "0"})
    assert model.engine.device.endswith("ONNX Runtime 1.99")
