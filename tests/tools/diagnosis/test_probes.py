"""Probes in processes of their own, however they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime.child import Outcome
from blt_edge.tools.doctor import engine_worker, engines
from blt_edge.tools.doctor.engines import Answer


@pytest.mark.parametrize(
    ("outcome", "answer"),
    [
        (Outcome({"version": "1"}), Answer({"version": "1"})),
        (Outcome({"version": "1", "error": "no device"}), Answer({"version": "1"}, "no device")),
        (
            Outcome(death="crashed (SIGSEGV)", log="about to\nerror: bad driver\n"),
            Answer(error="crashed (SIGSEGV)", said="error: bad driver"),
        ),
        (
            Outcome(
                {},
                log="\x1b[1;31m2026-01-01 10:00:00.1 [E:onnxruntime:Default, bridge.cc:1992 Get] "
                "Failed to load library libonnxruntime_providers_cuda.so\x1b[m\n",
            ),
            Answer(said="Failed to load library libonnxruntime_providers_cuda.so"),
        ),
    ],
)
def test_however_it_ends_it_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome, answer: Answer
) -> None:
    monkeypatch.setattr(engines, "run_child", lambda *_, **__: outcome)
    assert engines.ask("cuda") == answer


# What the probe itself says.


def said(subject: str, *names: str) -> dict[str, Any]:
    return engine_worker.work({"subject": subject, "names": names}, lambda event: None)


def test_the_processor_runs_a_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "CPUExecutionProvider" in said("providers")["providers"]
    facts = said("provider", "CPUExecutionProvider")
    assert facts == {"registered": ["CPUExecutionProvider"], "ran": ["CPUExecutionProvider"], "right": True}


def test_the_graph_is_one_product() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'blt-edge[export]'")
    model = onnx.load_from_string(engine_worker._GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]


def test_tensorrt_rtx_loads_without_a_gpu() -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    facts = said("tensorrt", "tensorrt-rtx")
    assert facts["version"].startswith("1.")
    assert "8.6" in facts["builds_for"]


def test_what_raises_is_one_line() -> None:
    assert said("bundle", "/gone", "")["error"].startswith("/gone")
