"""`blt-edge validate`: what is compared with what, and that the exit code is the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.runtime.manifest import load_manifest
from support.torch_only import transformers_or_skip


@pytest.fixture
def golden(tiny_model) -> Path:
    return tiny_model.checkpoint / "golden.safetensors"


def test_against_transformers(cli, tiny_model, own_bundle: Path) -> None:
    transformers_or_skip()
    result = cli("validate", own_bundle, "--reference", tiny_model.checkpoint, "--verify", code=0)
    for words in ("boundaries that differ", "byte states", "argmax", "greedy: equal bytes of 200", "passed"):
        assert words in result.stdout
    assert "checking files" in result.stderr
    assert load_manifest(own_bundle).validation["against"].startswith("transformers")


def test_against_a_golden_file_as_json(cli, golden: Path, own_bundle: Path) -> None:
    result = cli("validate", own_bundle, "--golden", golden, "--json", "-", code=0)
    validation = json.loads(result.stdout)["validation"]
    assert validation["passed"] is True
    assert load_manifest(own_bundle).validation == validation


def test_a_breach_fails_and_is_recorded(cli, golden: Path, own_bundle: Path, tmp_path: Path) -> None:
    flags = ("--rtol", 0, "--atol", 0, "-q", "--json", tmp_path / "out.json")
    result = cli("validate", own_bundle, "--golden", golden, *flags, code=1)
    assert "FAIL" in result.stdout
    assert result.stderr.startswith(f"blt-edge: error: {own_bundle}: FAILED: ")
    assert result.stderr.count("\n") == 1
    assert load_manifest(own_bundle).validation["passed"] is False
    assert json.loads((tmp_path / "out.json").read_text())["validation"]["passed"] is False


def test_without_a_reference_files_are_checked(cli, refused, own_bundle: Path) -> None:
    result = cli("validate", own_bundle, "-q", code=0)
    assert result.stderr == ""
    assert result.stdout.startswith("9 files have the right sha256; nothing else was checked: neither")
    document = json.loads(cli("validate", own_bundle, "--json", "-").stdout)
    assert (document["validation"], document["files"]) == (None, 9)
    assert Path(__file__).name in refused("validate", own_bundle, "--golden", __file__, "-q", code=1)
    with (own_bundle / "tables.bin").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x07")
    assert "tables.bin was changed" in refused("validate", own_bundle, "-q", code=1)


def test_against_another_checkpoint(cli, own_bundle: Path, bare_checkpoint: Path) -> None:
    transformers_or_skip()
    path = bare_checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["patching_threshold"] += 0.5
    path.write_text(json.dumps(config))
    result = cli("validate", own_bundle, "--reference", bare_checkpoint, code=1)
    assert "exported from other files" in result.stderr
    assert "patcher: boundaries that differ" in result.stdout


def test_a_read_only_bundle_can_be_validated(cli, golden: Path, own_bundle: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("blt_edge.runtime.manifest.write_manifest", refuse)
    result = cli("validate", own_bundle, "--golden", golden, code=0)
    assert "could not be written into the manifest: Read-only file system" in result.stderr


def test_a_bundle_of_the_packaged_demo_knows_its_reference(
    cli, tiny_model, tmp_path: Path, monkeypatch, without_transformers
) -> None:
    monkeypatch.setattr("blt_edge.export.checkpoint._demo_folder", lambda: tiny_model.checkpoint)
    bundle = tmp_path / "bundle"
    assert "demo (huggingface layout)" in cli("export", "demo", "-o", bundle, code=0).stderr
    assert "greedy: equal bytes of 12" in cli("validate", bundle, code=0).stdout
    monkeypatch.setattr("blt_edge.export.checkpoint._demo_folder", lambda: tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "9 files have the right sha256; nothing else was checked" in cli("validate", bundle).stdout
