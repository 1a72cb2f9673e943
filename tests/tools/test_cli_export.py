"""`blt-edge export`: what is planned and written, what it is compared with, and what a breach does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.export.golden import read_golden
from blt_edge.runtime.manifest import load_manifest
from blt_edge.tools.cli import validate
from support.torch_only import transformers_or_skip


def test_it_is_validated_against_transformers(cli, tiny_model, tmp_path: Path) -> None:
    transformers_or_skip()
    bundle = tmp_path / "bundle"
    result = cli("export", tiny_model.checkpoint, "-o", bundle)
    assert (result.exit_code, result.stdout) == (0, f"{bundle}\n"), result.stderr
    order = ("peak memory about", "patcher graph", "embedding tables", "wrote", "greedy bytes", "passed: 11")
    places = [result.stderr.rindex(words) for words in order]
    assert places == sorted(places)
    validation = load_manifest(bundle).validation
    assert validation["passed"] is True
    assert validation["against"].startswith("transformers 5")


def test_it_falls_back_to_the_golden_file(cli, tiny_model, tmp_path: Path, without_transformers) -> None:
    result = cli("export", tiny_model.checkpoint, "-o", tmp_path / "bundle")
    assert result.exit_code == 0
    why = "torch and transformers 5.23 or newer are not installed"
    assert f"comparing with golden.safetensors: {why}" in result.stderr
    assert "greedy: equal bytes of 12" in result.stderr
    assert load_manifest(tmp_path / "bundle").validation["passed"] is True


def test_it_says_when_there_is_nothing_to_compare_with(
    cli, bare_checkpoint: Path, tmp_path: Path, without_transformers
) -> None:
    result = cli("export", bare_checkpoint, "-o", tmp_path / "bundle")
    assert result.exit_code == 0
    assert (
        "nothing was compared: torch and transformers 5.23 or newer are not installed, and" in result.stderr
    )
    assert "there is no golden.safetensors beside the checkpoint" in result.stderr
    assert load_manifest(tmp_path / "bundle").validation is None


def test_a_checkpoint_too_large_for_transformers_is_no_crash(
    cli, bare_checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("blt_edge.export.reference.reference_available", lambda: True)
    monkeypatch.setattr(validate, "available_memory", lambda: 1000)
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
    assert f"error: {bundle} differs from {golden.name}" in result.stderr
    assert "it is kept, and its manifest says so" in result.stderr
    assert load_manifest(bundle).validation["passed"] is False
    assert cli("generate", "-m", bundle, "-p", "x", "-n", 1).exit_code == 0


def test_no_validate_and_force(cli, tiny_model, tmp_path: Path) -> None:
    flags = ("--no-validate", "--tables", "fp16", "--context", 100)
    result = cli("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", *flags)
    assert "not validated: --no-validate" in result.stderr
    manifest = load_manifest(tmp_path / "bundle")
    assert (manifest.model.trained_context, manifest.embedding.dtype) == (100, "float16")
    again = cli("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", "--no-validate", "--force", "-q")
    assert (again.exit_code, again.stderr) == (0, "")
    assert load_manifest(tmp_path / "bundle").embedding.dtype == "float32"


def test_dry_run_writes_nothing(cli, tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("export", tiny_model.checkpoint, "--dry-run", "-o", "bundle", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
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
        (("-o", "{tmp}/gone/bundle"), "its parent {tmp}/gone does not exist; create it first"),
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
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_json_tells_what_is_planned_and_what_was_written(cli, tiny_model, tmp_path: Path) -> None:
    planned = json.loads(cli("export", tiny_model.checkpoint, "--dry-run", "--json", "-", "-q").stdout)
    bundle = tmp_path / "bundle"
    flags = ("-o", bundle, "--no-validate", "--json", "-", "-q")
    written = json.loads(cli("export", tiny_model.checkpoint, *flags).stdout)
    assert (written["bundle"], written["validation"]) == (str(bundle), None)
    assert written["parts"].keys() == planned["parts"].keys()
    assert written["parts"]["tables"] == planned["parts"]["tables"]
    assert planned["parts"]["tables"]["precision"] == "fp32"
    assert written["parts"]["latent"]["parameters"] == planned["parts"]["latent"]["parameters"]
