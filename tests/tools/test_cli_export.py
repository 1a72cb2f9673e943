"""`blt-edge export`: what is planned and written, what it is compared with, and what a breach does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from blt_edge.export.golden import read_golden
from blt_edge.runtime.manifest import load_manifest
from blt_edge.tools.cli import validate
from support.chat_templates import CHATML
from support.torch_only import transformers_or_skip


def test_it_is_validated_against_transformers(cli, tiny_model, tmp_path: Path) -> None:
    transformers_or_skip()
    bundle = tmp_path / "bundle"
    result = cli("export", tiny_model.checkpoint, "-o", bundle, code=0)
    assert result.stdout == f"{bundle}\n"
    order = ("peak memory about", "patcher graph", "embedding tables", "wrote", "greedy bytes", "passed: 11")
    places = [result.stderr.rindex(words) for words in order]
    assert places == sorted(places)
    (record,) = load_manifest(bundle).validation
    assert record.report["passed"] is True
    assert record.report["against"].startswith("transformers 5")


def test_it_falls_back_to_the_golden_file(cli, tiny_model, tmp_path: Path, without_transformers) -> None:
    result = cli("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", code=0)
    assert re.search(r"comparing with golden\.safetensors: torch and transformers .* not inst", result.stderr)
    assert "greedy: equal bytes of 12" in result.stderr
    assert load_manifest(tmp_path / "bundle").validation[0].report["passed"] is True


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        (False, "nothing was compared: torch and .*\\bthere is no golden.safetensors"),
        (True, "nothing was compared: transformers would need about .*1.0 KB are free"),
    ],
)
def test_nothing_to_compare_with_or_no_room_for_it_is_told(
    cli, bare_checkpoint: Path, tmp_path: Path, monkeypatch, installed: bool, words: str
) -> None:
    monkeypatch.setattr("blt_edge.export.reference.reference_available", lambda: installed)
    monkeypatch.setattr(validate, "available_memory", lambda: 1000)
    result = cli("export", bare_checkpoint, "-o", tmp_path / "bundle", code=0)
    assert re.search(words, result.stderr, re.S)
    assert load_manifest(tmp_path / "bundle").validation == ()


def test_a_breach_fails_keeps_the_bundle_and_is_recorded(
    cli, refused, tiny_model, tmp_path: Path, without_transformers
) -> None:
    bundle = tmp_path / "bundle"
    told = refused("export", tiny_model.checkpoint, "-o", bundle, "--rtol", 0, "-q", code=1)
    golden = read_golden(tiny_model.checkpoint / "golden.safetensors")
    assert told.startswith(f"{bundle} differs from {golden.name}")
    assert "it is kept, and its manifest says so" in told
    assert load_manifest(bundle).validation[0].report["passed"] is False
    cli("generate", "-m", bundle, "-p", "x", "-n", 1, code=0)


def test_no_validate_and_force(cli, tiny_model, tmp_path: Path) -> None:
    command = ("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", "--no-validate")
    result = cli(*command, "--tables", "fp16", "--context", 100)
    assert "not validated: --no-validate" in result.stderr
    manifest = load_manifest(tmp_path / "bundle")
    assert (manifest.model.trained_context, manifest.embedding.dtype) == (100, "float16")
    assert cli(*command, "--force", "-q", code=0).stderr == ""
    assert load_manifest(tmp_path / "bundle").embedding.dtype == "float32"


def test_packed_graphs_are_written_kept_and_shown(cli, tiny_model, tmp_path: Path) -> None:
    command = ("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", "--no-validate", "--rows", "3,2")
    cli(*command, code=0)
    assert load_manifest(tmp_path / "bundle").rows == (2, 3)
    half = ("--precision", "fp16", "--no-validate")
    cli("quantize", tmp_path / "bundle", "-o", tmp_path / "half", *half, code=0)
    for bundle in ("bundle", "half"):
        shown = cli("inspect", tmp_path / bundle, code=0).stdout
        assert "packed graphs for 2 and 3 texts at once, over the same weights: " in shown
    assert "packed graphs" not in cli("inspect", tiny_model.bundle, code=0).stdout


def test_what_is_planned_and_what_was_written(cli, tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    dry = ("export", tiny_model.checkpoint, "--dry-run", "-o", "bundle", "-q")
    result = cli(*dry, code=0)
    assert result.stderr == ""
    for words in ("latent graph", "embedding tables", "peak memory", "of disk are free", "transformers"):
        assert words in result.stdout
    planned = json.loads(cli(*dry, "--json", "-").stdout)["parts"]
    assert list(tmp_path.iterdir()) == []
    flags = ("-o", tmp_path / "bundle", "--no-validate", "--json", "-", "-q")
    written = json.loads(cli("export", tiny_model.checkpoint, *flags).stdout)
    assert written["bundle"] == str(tmp_path / "bundle")
    assert (written["validation"], written["validated_on"]) == (None, None)
    assert written["parts"].keys() == planned.keys()
    assert written["parts"]["tables"] == planned["tables"]
    assert planned["tables"]["precision"] == "fp32"
    assert written["parts"]["latent"]["parameters"] == planned["latent"]["parameters"]


def test_a_damaged_checkpoint_is_one_line(refused, bare_checkpoint: Path, tmp_path: Path) -> None:
    weights = bare_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    told = refused("export", bare_checkpoint, "-o", tmp_path / "bundle", "-q", code=1)
    assert "model.safetensors" in told
    assert not (tmp_path / "bundle").exists()


def test_a_revision_is_of_a_hub_id(refused, tmp_path: Path) -> None:
    asked = ("--revision", "v1", "-o", tmp_path / "out")
    assert "--revision is of a hub id; demo is none" in refused("export", "demo", *asked)
    assert "names one already" in refused("export", "owner/name@v2", *asked)


def test_a_chat_template_is_taken_and_told(cli, refused, bare_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2: pip install 'blt-edge[serve]'")
    given, bundle = tmp_path / "given.jinja", tmp_path / "bundle"
    given.write_text(CHATML)
    (bare_checkpoint / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    result = cli("export", bare_checkpoint, "-o", bundle, "--no-validate", "--chat-template", given, code=0)
    assert f"chat template: {given}; eos_token '<end>' is text that ends an answer\n" in result.stderr
    assert (bundle / "chat_template.jinja").read_text() == CHATML
    told = cli("inspect", bundle, code=0).stdout
    assert re.search(r"^chat +chat_template.jinja, \d+ bytes; '<end>' ends an answer$", told, re.M)
    plan = cli("export", bare_checkpoint, "--dry-run", "--json", "-", "--chat-template", given, code=0)
    assert json.loads(plan.stdout)["chat_template"] == {"file": str(given), "eos": "<end>"}
    plan = cli("export", bare_checkpoint, "--dry-run", "--json", "-", code=0)
    assert json.loads(plan.stdout)["chat_template"] is None
    given.write_text("{% if %}")
    told = refused("export", bare_checkpoint, "-o", tmp_path / "b", "-q", "--chat-template", given, code=1)
    assert re.search(r"given.jinja: .*TemplateSyntaxError in line 1.*--chat-template none$", told)
    assert not (tmp_path / "b").exists()
    for wrong in ("-", os.devnull, tmp_path, tmp_path / "nothing"):
        assert "--chat-template: " in refused("export", bare_checkpoint, "-o", "b", "--chat-template", wrong)


def test_without_a_chat_template_inspect_says_how_to_give_one(cli, tiny_model) -> None:
    told = cli("inspect", tiny_model.bundle, code=0).stdout
    assert "no template; blt-edge export --chat-template FILE adds one" in told
