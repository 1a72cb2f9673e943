"""The GPU proof: what it compares, and that it says what it could not run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.backends.ort_gpu import PROVIDERS
from blt_edge.tools.gpu import check, measure
from support.simulated_gpu import simulate, write_engines

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["tensorrt", *PROVIDERS])
def test_a_device_that_is_right_passes(
    device: str, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, device)
    if device == "tensorrt":
        write_engines(own_bundle, device)
    monkeypatch.setattr(measure, "_PARITY_BYTES", 200)
    monkeypatch.setattr(measure, "_GREEDY_BYTES", 20)
    monkeypatch.setattr(measure, "_ROUNDS", 1)
    found = measure.measure(own_bundle, device, TEXT.read_bytes(), 10)
    assert found["engine"]["device"].startswith("Simulated, ")
    assert found["parity"]["breaches"] == []
    assert found["parity"]["greedy_bytes_equal"] == 20
    assert found["speed"]["no_drafts"]["ms_per_byte"] > 0
    assert found["cuda_graphs"]["refusal"] is None
    assert (found["cuda_graphs"]["captured"] > 0) == (device == "tensorrt")
    json.dumps(found)


def test_a_device_that_is_wrong_is_found(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_PARITY_BYTES", 200)
    monkeypatch.setattr(measure, "_GREEDY_BYTES", 20)
    wrong = BltModel.load(own_bundle, "cpu", threads=1)
    right = wrong.logits
    monkeypatch.setattr(wrong, "logits", lambda data: right(data) + np.float32(0.02))
    breaches = measure.parity(wrong, BltModel.load(own_bundle, "cpu", threads=1), TEXT.read_bytes())[
        "breaches"
    ]
    assert [breach.split()[0] for breach in breaches] == ["logits_max", "logits_mean"]


def test_what_is_no_number_is_out_of_bounds(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_PARITY_BYTES", 200)
    monkeypatch.setattr(measure, "_GREEDY_BYTES", 20)
    wrong = BltModel.load(own_bundle, "cpu", threads=1)
    right = wrong.logits

    def one_nan(data: bytes) -> np.ndarray:
        logits = right(data).copy()
        logits[7, 40] = np.nan
        return logits

    monkeypatch.setattr(wrong, "logits", one_nan)
    breaches = measure.parity(wrong, BltModel.load(own_bundle, "cpu", threads=1), TEXT.read_bytes())[
        "breaches"
    ]
    assert {breach.split()[0] for breach in breaches} >= {"logits_max", "logits_mean"}


def test_without_a_gpu_it_says_what_could_not_run(
    tmp_path: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_bundle", lambda *arguments: own_bundle)
    target = tmp_path / "gpu.json"
    arguments = ["--precisions", "fp32", "--devices", "cuda,tensorrt", "--json", str(target)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check.main([*arguments, "--text", str(TEXT)]) == 1
    document = json.loads(target.read_text())
    assert document["rows"] == []
    assert not document["passed"]
    assert [entry["device"] for entry in document["could_not_run"]] == ["cuda", "tensorrt", "transformers"]
    assert all(entry["reason"] for entry in document["could_not_run"])
    shown = capsys.readouterr().out
    assert "nothing ran on a GPU: see blt-edge doctor" in shown
    assert json.loads(shown.splitlines()[-1]) == {"passed": False, "json": str(target)}


def test_what_fails_for_one_precision_does_not_end_the_others(
    tmp_path: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bundle(work: Path, checkpoint: str, precision: str, say: check.Say) -> Path:
        if precision == "int4":
            raise ValueError("no such kernel")
        return own_bundle

    row = {"engine": {"device": "A GPU, CUDA"}, "parity": {"breaches": []}}
    answers = {"measure": row, "reference": {"error": "no torch"}}
    monkeypatch.setattr(check, "_bundle", bundle)
    monkeypatch.setattr(check, "_run", lambda arguments: answers[arguments[0]])
    kept: list[tuple[int, bool]] = []
    document = check.check(
        tmp_path,
        "demo",
        TEXT,
        ["int4", "fp32"],
        ["cuda"],
        1,
        print,
        lambda so_far: kept.append((len(so_far["rows"]), so_far["complete"])),
    )
    assert [entry["reason"] for entry in document["could_not_run"]] == [
        "ValueError: no such kernel",
        "no torch",
    ]
    assert kept == [(0, False), (1, False), (1, True)]
    assert document["passed"]
    assert document["gpus"] == ["A GPU"]


def test_a_process_that_dies_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No module named" in check._run(["no_such_module"])["error"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--wheels"], "--wheels needs a folder"), (["--wheels", "/no/such"], "/no/such is no folder")],
)
def test_the_script_refuses_what_it_cannot_use(arguments: list[str], told: str) -> None:
    script = [str(ROOT / "tools" / "gpu" / "check.sh"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr
