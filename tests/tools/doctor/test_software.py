"""Versions by metadata, what an extra lacks, and what the worker's end is in words."""

from __future__ import annotations

from pathlib import Path

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
    assert missing_by_extra(here.get, REQUIREMENTS) == {
        "cpu": [],
        "gpu": [],
        "export": ["onnx>=1.18, here is 1.17.0"],
        "optimum": [],
    }
    assert missing_by_extra(lambda name: None, REQUIREMENTS) == {
        "cpu": ["onnxruntime"],
        "gpu": ["onnxruntime-gpu"],
        "export": ["onnx", "safetensors"],
        "optimum": ["optimum"],
    }


def test_our_own_requirements_are_understood() -> None:
    found = missing_by_extra(lambda name: None)
    assert found["cpu"] == ["onnxruntime"]
    assert {"onnx", "onnx-ir", "onnxscript", "safetensors"} <= set(found["export"])
    assert {"torch", "transformers"} <= set(found["validate"])


def test_versions_show_what_matters() -> None:
    here = {"blt-edge": "1", "onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0", "torch": "2.13.0+cpu"}
    shown = versions(here.get)
    assert list(shown) == ["python", "blt-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "torch"]
    assert shown["numpy"] is None
    assert versions(lambda name: None)["onnxruntime"] is None


def test_metadata_is_asked() -> None:
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
