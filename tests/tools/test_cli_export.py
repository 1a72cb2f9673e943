"""`blt-edge export` and `blt-edge validate`: what is compared with what, and what a breach does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from blt_edge.export.golden import read_golden
from blt_edge.runtime.manifest import load_manifest
from blt_edge.tools.cli import export, reference, validate
from support.torch_only import transformers_or_skip


@pytest.fixture
def without_transformers(monkeypatch) -> None:
    monkeypatch.setattr("blt_edge.export.reference.reference_available", lambda: False)


@pytest.fixture
def bare_checkpoint(tiny_model, tmp_path: Path) -> Path:
    """The tiny checkpoint without its golden file."""
    ignored = shutil.ignore_patterns("golden.safetensors")
    return Path(shutil.copytree(tiny_model.checkpoint, tmp_path / "bare", ignore=ignored))


def test_export_validates_against_transformers(cli, tiny_model, tmp_path: Path) -> None:
    transformers_or_skip()
    bundle = tmp_path / "bundle"
    result = cli("export", tiny_model.checkpoint, "-o", bundle)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{bundle}\n"
    order = [
        "peak memory about",
        "patcher graph",
        "embedding tables",
        "wrote",
        "greedy bytes",
        "passed: 11 checks",
    ]
    places = [result.stderr.rindex(words) for words in order]
    assert places == sorted(places)
    validation = load_manifest(bundle).validation
    assert validation is not None
    assert validation["passed"] is True
    assert validation["against"].startswith("transformers 5")


def test_export_falls_back_to_the_golden_file(cli, tiny_model, tmp_path: Path, without_transformers) -> None:
    result = cli("export", tiny_model.checkpoint, "-o", tmp_path / "bundle")
    assert result.exit_code == 0
    assert (
        "comparing with golden.safetensors: torch and transformers 5.23 or newer are not installed"
        in result.stderr
    )
    assert "greedy: equal bytes of 12" in result.stderr
    assert load_manifest(tmp_path / "bundle").validation["passed"] is True


def test_export_says_when_there_is_nothing_to_compare_with(
    cli, bare_checkpoint: Path, tmp_path: Path, without_transformers
) -> None:
    result = cli("export", bare_checkpoint, "-o", tmp_path / "bundle")
    assert result.exit_code == 0
    assert (
        "not validated, nothing was compared: torch and transformers 5.23 or newer are not installed, and "
        "there is no golden.safetensors beside the checkpoint"
    ) in result.stderr
    assert load_manifest(tmp_path / "bundle").validation is None


def test_a_checkpoint_too_large_for_transformers_is_no_crash(
    cli, bare_checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("blt_edge.export.reference.reference_available", lambda: True)
    monkeypatch.setattr(reference, "available_memory", lambda: 1000)
    result = cli("export", bare_checkpoint, "-o", tmp_path / "bundle")
    assert result.exit_code == 0
    assert "not validated, nothing was compared: transformers would need about" in result.stderr
    assert "1.0 KB are free" in result.stderr


def test_a_breach_fails_keeps_the_bundle_and_is_recorded(
    cli, tiny_model, tmp_path: Path, without_transformers
) -> None:
    bundle = tmp_path / "bundle"
    result = cli("export", tiny_model.checkpoint, "-o", bundle, "--rtol", 0, "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    golden = read_golden(tiny_model.checkpoint / "golden.safetensors")
    assert result.stderr.startswith(f"blt-edge: error: {bundle} differs from {golden.name}")
    assert "it is kept, and its manifest says so" in result.stderr
    assert load_manifest(bundle).validation["passed"] is False
    assert cli("generate", "-m", bundle, "-p", "x", "-n", 1).exit_code == 0


def test_no_validate_and_quiet(cli, tiny_model, tmp_path: Path) -> None:
    flags = ("--no-validate", "--tables", "fp16", "--context", 100)
    result = cli("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", *flags)
    assert "not validated: --no-validate" in result.stderr
    manifest = load_manifest(tmp_path / "bundle")
    assert manifest.model.trained_context == 100
    assert manifest.embedding.dtype == "float16"
    again = cli("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", "--no-validate", "--force", "-q")
    assert (again.exit_code, again.stderr) == (0, "")
    assert load_manifest(tmp_path / "bundle").embedding.dtype == "float32"


def test_dry_run_writes_nothing(cli, tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("export", tiny_model.checkpoint, "--dry-run", "-o", "bundle", "-q")
    assert result.exit_code == 0
    assert result.stderr == ""
    for words in (
        "latent graph",
        "embedding tables",
        "peak memory about",
        "of disk are free",
        "transformers",
    ):
        assert words in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("-o", "{tmp}"), "exists; give a new name, or --force"),
        (("-o", "{tmp}/gone/bundle"), "the directory {tmp}/gone does not exist; create it first"),
        (("-o", "{tmp}/new", "--context", "1"), "--context: got 1, a whole number from 2 to 500"),
        (("-o", "{tmp}/new", "--rtol", "-1"), "--rtol is -1.0; allowed is a finite number >= 0"),
        (("-o", "{tmp}/new", "--atol", "nan"), "--atol is nan; allowed is a finite number >= 0"),
        (("-o", "{tmp}", "--force"), "is not a bundle and not empty"),
    ],
)
def test_wrong_usage_writes_nothing(
    cli, tiny_model, tmp_path: Path, flags: tuple[str, ...], line: str
) -> None:
    (tmp_path / "mine").touch()
    result = cli("export", tiny_model.checkpoint, "-q", *(flag.format(tmp=tmp_path) for flag in flags))
    assert result.exit_code == 2
    assert result.stderr.startswith("blt-edge: error: --")
    assert line.format(tmp=tmp_path) in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_damaged_checkpoint_is_one_line(cli, bare_checkpoint: Path, tmp_path: Path) -> None:
    weights = bare_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = cli("export", bare_checkpoint, "-o", tmp_path / "bundle", "-q")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_validate_against_transformers(cli, tiny_model, own_bundle: Path) -> None:
    transformers_or_skip()
    result = cli("validate", own_bundle, "--reference", tiny_model.checkpoint, "--verify")
    assert result.exit_code == 0
    for words in (
        "boundaries that differ",
        "byte states",
        "argmax agreement",
        "greedy: equal bytes of 200",
        "passed",
    ):
        assert words in result.stdout
    assert "checking files" in result.stderr
    assert load_manifest(own_bundle).validation["against"].startswith("transformers")


def test_validate_against_a_golden_file_as_json(cli, tiny_model, own_bundle: Path) -> None:
    golden = tiny_model.checkpoint / "golden.safetensors"
    result = cli("validate", own_bundle, "--golden", golden, "--json", "-")
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert document["validation"]["passed"] is True
    assert load_manifest(own_bundle).validation == document["validation"]


def test_validate_breach(cli, tiny_model, own_bundle: Path, tmp_path: Path) -> None:
    golden = tiny_model.checkpoint / "golden.safetensors"
    flags = ("--golden", golden, "--rtol", 0, "--atol", 0, "-q", "--json", tmp_path / "out.json")
    result = cli("validate", own_bundle, *flags)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert result.stderr.startswith(f"blt-edge: error: {own_bundle}: FAILED: ")
    assert result.stderr.count("\n") == 1
    assert load_manifest(own_bundle).validation["passed"] is False
    assert json.loads((tmp_path / "out.json").read_text())["validation"]["passed"] is False


def test_validate_without_reference_checks_hashes(cli, own_bundle: Path) -> None:
    result = cli("validate", own_bundle, "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("9 files have the right sha256; nothing else was checked: neither")
    document = json.loads(cli("validate", own_bundle, "--json", "-").stdout)
    assert document["validation"] is None
    assert document["files"] == 9


def test_validate_a_changed_byte(cli, own_bundle: Path) -> None:
    with (own_bundle / "tables.bin").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x07")
    result = cli("validate", own_bundle, "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "tables.bin was changed" in result.stderr


def test_validate_against_another_checkpoint(
    cli, tiny_model, own_bundle: Path, bare_checkpoint: Path
) -> None:
    transformers_or_skip()
    config = json.loads((bare_checkpoint / "config.json").read_text())
    config["patching_threshold"] += 0.5
    (bare_checkpoint / "config.json").write_text(json.dumps(config))
    result = cli("validate", own_bundle, "--reference", bare_checkpoint)
    assert result.exit_code == 1
    assert "note: the bundle was exported from other files" in result.stderr
    assert "patcher: boundaries that differ" in result.stdout


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--golden", "-"), "--golden: can't be stdin"),
        (("--golden", "gone"), "--golden: gone does not exist"),
        (("--golden", __file__, "--reference", "demo"), "--reference and --golden are both given"),
        (("--reference", "gone"), "--reference: gone does not exist; give a checkpoint's folder"),
    ],
)
def test_validate_wrong_usage(cli, tiny_model, flags: tuple[str, ...], line: str) -> None:
    result = cli("validate", tiny_model.bundle, *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"blt-edge: error: {line}")


def test_validate_with_no_golden_file(cli, tiny_model) -> None:
    result = cli("validate", tiny_model.bundle, "--golden", tiny_model.checkpoint / "model.safetensors", "-q")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1


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
    for verb in (export, validate):
        monkeypatch.setattr(verb, "checkpoint_folder", lambda source: tiny_model.checkpoint)
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


def test_json_tells_what_is_planned_and_what_was_written(cli, tiny_model, tmp_path: Path) -> None:
    planned = cli("export", tiny_model.checkpoint, "--dry-run", "--json", "-", "-q")
    document = json.loads(planned.stdout)
    assert document["parts"]["tables"]["precision"] == "fp32"
    bundle = tmp_path / "bundle"
    written = cli("export", tiny_model.checkpoint, "-o", bundle, "--no-validate", "--json", "-", "-q")
    found = json.loads(written.stdout)
    assert found["bundle"] == str(bundle)
    assert found["validation"] is None
    assert found["parts"].keys() == document["parts"].keys()
    assert found["parts"]["tables"] == document["parts"]["tables"]
    assert found["parts"]["latent"]["parameters"] == document["parts"]["latent"]["parameters"]
