"""The GPU proof: what it compares, and that it says what it could not run."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.backends.ort_gpu import PROVIDERS
from blt_edge.tools.gpu import check
from support.simulated_gpu import simulate, write_engines

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"
SCRIPT = str(Path(__file__).parents[2] / "tools" / "gpu" / "check.sh")
ROW = {"engine": {"device": "A GPU, CUDA"}, "parity": {"breaches": []}}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of some bytes, one round."""
    for name, value in (("_PARITY_BYTES", 200), ("_GREEDY_BYTES", 20), ("_ROUNDS", 1)):
        monkeypatch.setattr(check, name, value)


@pytest.mark.parametrize("device", ["tensorrt", *PROVIDERS])
def test_a_device_that_is_right_passes(
    device: str, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, device)
    if device == "tensorrt":
        write_engines(own_bundle, device, rows=(2, 3))
    found = check.measure(own_bundle, device, TEXT.read_bytes(), 10)
    assert found["engine"]["device"].startswith("Simulated, ")
    assert found["parity"]["breaches"] == []
    assert found["parity"]["greedy_bytes_equal"] == 20
    assert found["speed"]["no_drafts"]["ms_per_byte"] > 0
    assert found["cuda_graphs"]["refusal"] is None
    assert (found["cuda_graphs"]["captured"] > 0) == (device == "tensorrt")
    assert (found["packed"] is not None) == (device == "tensorrt")
    if device == "tensorrt":
        assert (found["packed"]["rows"], found["packed"]["equal"]) == ([2, 3], 3)
        assert found["packed"]["breaches"] == []
    json.dumps(found)


@pytest.mark.parametrize("off", [0.02, np.nan])
def test_a_device_that_is_wrong_is_found(
    off: float, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no number is out of bounds, too."""
    wrong, cpu = (BltModel.load(own_bundle, "cpu", threads=1) for _ in range(2))
    right = wrong.logits

    def with_a_fault(data: bytes) -> np.ndarray:
        logits = right(data).copy()
        if off > 0:
            logits += np.float32(off)
        else:
            logits[7, 40] = off
        return logits

    monkeypatch.setattr(wrong, "logits", with_a_fault)
    breaches = check.parity(wrong, cpu, TEXT.read_bytes())["breaches"]
    assert {breach.split()[0] for breach in breaches} >= {"logits_max", "logits_mean"}


def test_plans_for_several_texts_that_are_wrong_are_found(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, "tensorrt")
    engine = write_engines(own_bundle, "tensorrt", rows=(3,))
    model = BltModel.load(own_bundle, "tensorrt")
    (engine / "decoder.rows3.plan").write_text("damaged")
    found = check.packed(model, TEXT.read_bytes(), 10)
    assert found is not None
    assert found["breaches"]
    assert all("decoder: a pass over several texts failed" in breach for breach in found["breaches"])
    assert not check._breaches_of(ROW)
    assert check._breaches_of({**ROW, "packed": found}) == found["breaches"]


def test_without_a_gpu_it_says_what_could_not_run(
    tmp_path: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_bundle", lambda *arguments: own_bundle)
    target = tmp_path / "gpu.json"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = ["--precisions", "fp32", "--devices", "cuda,tensorrt", "--json", str(target)]
    assert check.main([*arguments, "--text", str(TEXT)]) == 1
    document = json.loads(target.read_text())
    assert (document["rows"], document["passed"]) == ([], False)
    reasons = {entry["device"]: entry["reason"] for entry in document["could_not_run"]}
    assert list(reasons) == ["cuda", "tensorrt", "transformers"]
    assert all(reasons.values())
    shown = capsys.readouterr().out
    assert "nothing ran on a GPU" in shown
    assert json.loads(shown.splitlines()[-1]) == {"passed": False, "json": str(target)}


def test_what_fails_for_one_precision_does_not_end_the_others(
    tmp_path: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bundle(work: Path, checkpoint: str, precision: str, rows: tuple[int, ...]) -> Path:
        if precision == "int4":
            raise ValueError("no such kernel")
        return own_bundle

    monkeypatch.setattr(check, "_bundle", bundle)
    monkeypatch.setattr(check, "_in_child", lambda asked: ROW if "bundle" in asked else {"error": "no torch"})
    monkeypatch.setattr(check, "_summarize", lambda document: None)
    target = tmp_path / "gpu.json"
    arguments = ["--precisions", "int4,fp32", "--devices", "cuda", "--text", str(TEXT)]
    assert check.main([*arguments, "--work", str(tmp_path / "work"), "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    reasons = [entry["reason"] for entry in document["could_not_run"]]
    assert reasons == ["ValueError: no such kernel", "no torch"]
    assert document["complete"]
    assert document["gpus"] == ["A GPU"]


def test_what_is_measured_is_kept_at_once(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_measure", lambda *arguments: ROW)
    monkeypatch.setattr(check, "_in_child", lambda asked: {"error": "no torch"})
    kept: list[tuple[int, bool]] = []
    args = argparse.Namespace(work=own_bundle, checkpoint="demo", text=TEXT)
    args.precisions, args.devices, args.rows = ["fp32"], ["cuda", "tensorrt"], (2,)
    check.check(args, lambda so_far: kept.append((len(so_far["rows"]), so_far["complete"])))
    assert kept == [(1, False), (2, False), (2, True)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--wheels"], "--wheels needs a folder"), (["--wheels", "/no/such"], "/no/such is no folder")],
)
def test_the_script_refuses_what_it_cannot_use(arguments: list[str], told: str) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr


def test_the_script_installs_the_checkout_in_place(tmp_path: Path) -> None:
    """A wheel has no gpu tools in it: one more install of it would take them away."""
    log, stubs = tmp_path / "log", tmp_path / "venv" / "bin"
    stubs.mkdir(parents=True)
    for name in ("pip", "python"):
        (stubs / name).write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
        (stubs / name).chmod(0o755)
    subprocess.run([SCRIPT, "--venv", str(tmp_path / "venv"), "--json", "x.json"], check=True)
    asked = log.read_text().splitlines()
    assert [" -e .[" in line for line in asked if " .[" in line] == [True] * 4
    assert asked[-1] == "-m blt_edge.tools.gpu.check --json x.json"
