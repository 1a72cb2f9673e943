"""`blt-edge inspect`, and the memory it foretells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.vocabulary import encode
from blt_edge.tools.cli.memory import available_memory, peak_resident, state_memory


def test_shows_what_is_there(cli, own_bundle) -> None:
    write_manifest(own_bundle, load_manifest(own_bundle).with_validation(None))
    result = cli("inspect", own_bundle)
    assert result.exit_code == 0
    assert result.stderr == ""
    for word in (
        "checkpoint (huggingface layout)",
        "ok (fast check",
        "patcher.onnx",
        "tables.bin",
        "patch_slots",
    ):
        assert word in result.stdout
    assert "validation  none; blt-edge validate compares" in result.stdout
    assert "at full length" in result.stdout


def test_json_is_one_document_with_the_whole_manifest(cli, tiny_model) -> None:
    result = cli("inspect", tiny_model.bundle, "--json", "-", "--verify", "-q")
    document = json.loads(result.stdout)
    assert document["manifest"] == load_manifest(tiny_model.bundle).to_dict()
    assert document["check"] == {"whole_files": True, "fault": None}
    assert document["bytes"] == sum(
        path.stat().st_size for path in tiny_model.bundle.iterdir() if path.name != "manifest.json"
    )


def test_a_damaged_file_is_shown_and_fails(cli, own_bundle: Path) -> None:
    with (own_bundle / "encoder.onnx").open("r+b") as file:
        file.write(b"x")
    result = cli("inspect", own_bundle)
    assert result.exit_code == 1
    assert "DAMAGED" in result.stdout
    assert result.stderr.startswith("blt-edge: error: encoder.onnx was changed")
    document = json.loads(cli("inspect", own_bundle, "--json", "-").stdout)
    assert "encoder.onnx was changed" in document["check"]["fault"]


def test_a_damaged_manifest_fails(cli, own_bundle: Path) -> None:
    manifest = own_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace("fp32", "fp16"))
    result = cli("inspect", own_bundle)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "manifest.json was changed" in result.stderr


def test_a_failed_validation_is_shown(cli, own_bundle: Path) -> None:
    rows = [{"check": "logits", "ok": False}, {"check": "greedy", "ok": True}]
    report = {"passed": False, "against": "golden", "data_bytes": 9, "rows": rows}
    write_manifest(own_bundle, load_manifest(own_bundle).with_validation(report))
    assert "FAILED (logits), 2 checks against golden" in cli("inspect", own_bundle).stdout


def test_state_memory_is_what_the_runtime_takes(tiny_model) -> None:
    model = BltModel.load(tiny_model.bundle, threads=1)
    foretold = state_memory(model.manifest)
    sequence = model.sequence()
    text = bytes(range(256)) * 2
    sequence.append(encode(text[: foretold.positions - 1]))
    assert sequence.length == foretold.positions
    taken = sequence.state_bytes
    patches = foretold.patches * foretold.per_patch
    # The global cache is made for as many patches as it may need at once, and buffers are powers of two.
    assert foretold.at_full_length - patches <= taken + foretold.per_patch
    most = foretold.fixed + foretold.windowed + foretold.positions * foretold.per_patch
    assert taken <= 1.5 * most


def test_state_memory_of_a_longer_chunk_is_larger(tiny_model) -> None:
    manifest = load_manifest(tiny_model.bundle)
    assert state_memory(manifest, prefill_chunk=512).fixed > state_memory(manifest).fixed
    assert state_memory(manifest, rollback=0).windowed < state_memory(manifest).windowed


def test_the_machine_is_asked() -> None:
    peak, free = peak_resident(), available_memory()
    assert peak is None or peak > 1 << 20
    assert free is None or free > 0


@pytest.mark.parametrize("flag", ["--verify", "--json=-"])
def test_wrong_bundle(cli, tmp_path: Path, flag: str) -> None:
    result = cli("inspect", tmp_path, flag)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has no manifest.json" in result.stderr
