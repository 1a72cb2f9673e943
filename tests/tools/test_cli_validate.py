"""`blt-edge validate`: what is compared with what, and that the exit code is the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.runtime.manifest import load_manifest
from support.torch_only import transformers_or_skip


def test_against_transformers(cli, tiny_model, own_bundle: Path) -> None:
    transformers_or_skip()
    result = cli("validate", own_bundle, "--reference", tiny_model.checkpoint, "--verify")
    assert result.exit_code == 0
    for words in ("boundaries that differ", "byte states", "argmax", "greedy: equal bytes of 200", "passed"):
        assert words in result.stdout
    assert "checking files" in result.stderr
    assert load_manifest(own_bundle).validation["against"].startswith("transformers")


def test_against_a_golden_file_as_json(cli, tiny_model, own_bundle: Path) -> None:
    golden = tiny_model.checkpoint / "golden.safetensors"
    result = cli("validate", own_bundle, "--golden", golden, "--json", "-")
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert document["validation"]["passed"] is True
    assert load_manifest(own_bundle).validation == document["validation"]


def test_a_breach_fails_and_is_recorded(cli, tiny_model, own_bundle: Path, tmp_path: Path) -> None:
    golden = tiny_model.checkpoint / "golden.safetensors"
    flags = ("--golden", golden, "--rtol", 0, "--atol", 0, "-q", "--json", tmp_path / "out.json")
    result = cli("validate", own_bundle, *flags)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "FAIL" in result.stdout
    assert result.stderr.startswith(f"blt-edge: error: {own_bundle}: FAILED: ")
    assert load_manifest(own_bundle).validation["passed"] is False
    assert json.loads((tmp_path / "out.json").read_text())["validation"]["passed"] is False


def test_without_a_reference_files_are_checked(cli, own_bundle: Path) -> None:
    result = cli("validate", own_bundle, "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("9 files have the right sha256; nothing else was checked: neither")
    document = json.loads(cli("validate", own_bundle, "--json", "-").stdout)
    assert (document["validation"], document["files"]) == (None, 9)
    with (own_bundle / "tables.bin").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x07")
    result = cli("validate", own_bundle, "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "tables.bin was changed" in result.stderr


def test_against_another_checkpoint(cli, own_bundle: Path, bare_checkpoint: Path) -> None:
    transformers_or_skip()
    config = json.loads((bare_checkpoint / "config.json").read_text())
    config["patching_threshold"] += 0.5
    (bare_checkpoint / "config.json").write_text(json.dumps(config))
    result = cli("validate", own_bundle, "--reference", bare_checkpoint)
    assert result.exit_code == 1
    assert "note: the bundle was exported from other files" in result.stderr
    assert "patcher: boundaries that differ" in result.stdout


@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        (("--golden", "-"), 2, "--golden: can't be stdin"),
        (("--golden", "gone"), 2, "--golden: gone does not exist"),
        (("--golden", __file__, "--reference", "demo"), 2, "--reference and --golden are both given"),
        (("--reference", "gone"), 2, "--reference: gone does not exist; give a checkpoint's folder"),
        (("--golden", __file__), 1, Path(__file__).name),
    ],
)
def test_what_cannot_be_a_reference(cli, tiny_model, flags: tuple[str, ...], code: int, line: str) -> None:
    result = cli("validate", tiny_model.bundle, *flags, "-q")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert line in result.stderr


def test_a_read_only_bundle_can_be_validated(cli, tiny_model, own_bundle: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("blt_edge.runtime.manifest.write_manifest", refuse)
    result = cli("validate", own_bundle, "--golden", tiny_model.checkpoint / "golden.safetensors")
    assert result.exit_code == 0
    assert "the result could not be written into the manifest: Read-only file system" in result.stderr


def test_a_bundle_of_the_packaged_demo_knows_its_reference(
    cli, tiny_model, tmp_path: Path, monkeypatch, without_transformers
) -> None:
    monkeypatch.setattr("blt_edge.export.checkpoint._demo_folder", lambda: tiny_model.checkpoint)
    bundle = tmp_path / "bundle"
    exported = cli("export", "demo", "-o", bundle)
    assert exported.exit_code == 0
    assert "demo (huggingface layout)" in exported.stderr
    result = cli("validate", bundle)
    assert result.exit_code == 0
    assert "greedy: equal bytes of 12" in result.stdout
    monkeypatch.setattr("blt_edge.export.checkpoint._demo_folder", lambda: tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "9 files have the right sha256; nothing else was checked" in cli("validate", bundle).stdout
