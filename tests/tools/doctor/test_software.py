"""Versions by metadata, what an extra lacks, and what the worker's end is in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime.child import Outcome
from blt_edge.tools.doctor import software
from blt_edge.tools.doctor.software import Reply, ask, installed, missing_by_extra, versions

REQUIREMENTS = [
    "numpy>=1.24",
    'onnxruntime>=1.20; extra == "cpu"',
    'onnxruntime-gpu>=1.20; extra == "gpu"',
    "onnx>=1.18 ; extra == 'export'",
    'safetensors>=0.5; extra == "export"',
    'blt-edge[cpu,export]; extra == "optimum"',
    'optimum[onnx]>=2.0; extra == "optimum"',
    'onnxruntime-genai>=0.18; python_version >= "3.11" and extra == "bench"',
]


def test_missing_by_extra() -> None:
    here = {"onnxruntime-gpu": "1.31.0", "onnx": "1.17.0", "safetensors": "0.10.1", "optimum": "2.1.0.dev1"}
    found = missing_by_extra(here.get, REQUIREMENTS)
    assert found == {"cpu": [], "gpu": [], "export": ["onnx>=1.18, here is 1.17.0"], "optimum": []}
    nothing = missing_by_extra(lambda name: None, REQUIREMENTS)
    assert list(nothing) == list(found)
    assert nothing["export"] == ["onnx", "safetensors"]


def test_our_own_requirements_are_understood() -> None:
    found = missing_by_extra(lambda name: None)
    assert found["cpu"] == ["onnxruntime"]
    assert {"onnx", "onnx-ir", "onnxscript", "safetensors"} <= set(found["export"])
    assert {"torch", "transformers"} <= set(found["validate"])


def test_versions_show_what_matters() -> None:
    here = {"blt-edge": "1", "onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0", "torch": "2.13.0+cpu"}
    shown = versions(here.get)
    assert list(shown) == ["python", "blt-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "torch"]
    assert shown["numpy"] is versions(lambda name: None)["onnxruntime"] is None
    assert installed("numpy")
    assert installed("no-such-package-of-ours") is None


# The worker, however it ends.

LOG = "\x1b[1;31m2026-01-01 10:00:00.1 [E:onnxruntime:Default, x.cc:1 Get] Failed to load x.so\x1b[m\nbye\n"


@pytest.mark.parametrize(
    ("outcome", "reply"),
    [
        (Outcome({"version": "1"}), Reply({"version": "1"})),
        (Outcome({"error": "no device", "version": "1"}), Reply({"version": "1"}, "no device")),
        (Outcome({}, log=LOG), Reply(said="Failed to load x.so")),
        (Outcome({}, log="one\nlast\n\n"), Reply(said="last")),
        (Outcome(error=OSError("gone")), Reply(error="gone")),
        (Outcome(death="crashed (SIGSEGV)", log=LOG), Reply({}, "crashed (SIGSEGV)", "Failed to load x.so")),
    ],
)
def test_replies(monkeypatch: pytest.MonkeyPatch, outcome: Outcome, reply: Reply) -> None:
    monkeypatch.setattr(software, "run_child", lambda *_, **__: outcome)
    assert ask("cuda") == reply


def test_a_hang_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "PATIENCE", 0.01)
    assert ask("providers").error == "gave no answer within 0.01 s"


def test_the_users_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    reply = ask("cuda")
    assert reply.error is None or "code 3" not in reply.error


# What it says of engines, in this process.


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


def test_tensorrt_rtx_loads_without_a_gpu() -> None:
    need = "needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    pytest.importorskip("tensorrt_rtx_bindings", reason=need)
    facts = said("tensorrt", "tensorrt-rtx")
    assert facts["version"].startswith("1.")
    assert "8.6" in facts["builds_for"]


def test_what_raises_is_one_line() -> None:
    assert said("bundle", "/gone", "")["error"].startswith("/gone")


def test_a_bundle_without_engines_runs_from_its_graphs(tiny_model) -> None:
    facts = said("bundle", str(tiny_model.bundle), "")
    assert set(facts["stages"].values()) == {"fp32"}
    assert [form["target"] for form in facts["forms"]] == ["onnxruntime", "tensorrt", "tensorrt-rtx"]
    assert all(form["reason"] and not form["fits"] for form in facts["forms"])
