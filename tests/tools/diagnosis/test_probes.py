"""Probes in processes of their own, however they end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from blt_edge.tools.doctor import engine_worker
from blt_edge.tools.doctor.engines import Answer, ask


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_an_answer_is_the_last_line() -> None:
    code = "import json, sys; print('engine loaded'); print(json.dumps({'asked': sys.argv[1:]}))"
    assert ask("cuda", "x", command=script(code)) == Answer({"asked": ["cuda", "x"]})


def test_an_error_keeps_its_facts() -> None:
    answer = ask("x", command=script("""print('{"error": "no device", "version": "1"}')"""))
    assert answer == Answer({"version": "1"}, "no device")


def test_a_crash_is_told() -> None:
    code = "import os; os.write(2, b'about to\\nerror: bad driver\\n'); os.kill(os.getpid(), 11)"
    answer = ask("x", command=script(code))
    assert answer == Answer(error="crashed (SIGSEGV)", said="error: bad driver")


def test_a_hang_ends() -> None:
    assert (
        ask("x", patience=0.3, command=script("import time; time.sleep(60)")).error
        == "no answer within 0.3 s"
    )


@pytest.mark.parametrize("output", ["", "[1]", "nonsense", "{", "\\xff"])
def test_no_answer(output: str) -> None:
    assert ask("x", command=script(f"print({output!r})")).error == "ended with exit code 0 and no answer"


def test_a_traceback_ends_in_its_last_line() -> None:
    answer = ask("x", command=script("raise ImportError('libfoo.so: cannot open shared object file')"))
    assert answer.error == "ImportError: libfoo.so: cannot open shared object file"


def test_a_log_line_loses_its_head() -> None:
    line = (
        "\\x1b[1;31m2026-01-01 10:00:00.1 [E:onnxruntime:Default, provider_bridge_ort.cc:1992 Get] "
        "Failed to load library libonnxruntime_providers_cuda.so\\x1b[m"
    )
    answer = ask("x", command=script(f"import sys; print('{{}}'); sys.stderr.write('{line}\\n')"))
    assert answer == Answer(said="Failed to load library libonnxruntime_providers_cuda.so")


def test_a_command_that_is_not_there() -> None:
    assert ask("x", command=["/no/such/program"]).error == "No such file or directory"


def test_the_users_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    answer = ask("cuda")
    assert answer.error is None or "exit code 3" not in answer.error


# What the probe itself says.


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    engine_worker.main(list(arguments))
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_processor_runs_a_product(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "CPUExecutionProvider" in said(capsys, "providers")["providers"]
    facts = said(capsys, "provider", "CPUExecutionProvider")
    assert facts == {"registered": ["CPUExecutionProvider"], "ran": ["CPUExecutionProvider"], "right": True}


def test_the_graph_is_one_product() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'blt-edge[export]'")
    model = onnx.load_from_string(engine_worker._GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]


def test_tensorrt_rtx_loads_without_a_gpu(capsys) -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    facts = said(capsys, "tensorrt", "tensorrt-rtx")
    assert facts["version"].startswith("1.")
    assert "8.6" in facts["builds_for"]


def test_what_raises_is_one_line(capsys) -> None:
    assert said(capsys, "bundle", "/gone", "")["error"].startswith("/gone")
