"""What the worker says of engines, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blt_edge.tools.doctor import software


def said(subject: str, *names: str) -> dict[str, Any]:
    return software.work({"subject": subject, "names": names}, lambda event: None)


def test_the_processor_runs_a_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "CPUExecutionProvider" in said("providers")["providers"]
    facts = said("provider", "CPUExecutionProvider")
    assert facts == {"registered": ["CPUExecutionProvider"], "ran": ["CPUExecutionProvider"], "right": True}


def test_the_graph_is_one_product() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'blt-edge[export]'")
    model = onnx.load_from_string(software._GRAPH)
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


def test_a_bundle_without_engines_runs_from_its_graphs(tiny_model) -> None:
    facts = said("bundle", str(tiny_model.bundle), "")
    assert set(facts["stages"].values()) == {"fp32"}
    assert [engine["target"] for engine in facts["forms"]] == ["onnxruntime", "tensorrt", "tensorrt-rtx"]
    assert not any(engine["fits"] for engine in facts["forms"])
    assert all(engine["reason"] for engine in facts["forms"])
