"""`blt-edge validate`: what is compared with what, and that the exit code is the verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.export import validate
from blt_edge.runtime.host import processor_name
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.kernels import kernel_family
from blt_edge.runtime.manifest import load_manifest, write_manifest
from support.processors import ARM, X86, become, elsewhere
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
    assert load_manifest(own_bundle).validation[0].report["against"].startswith("transformers")


def test_against_a_golden_file_as_json(cli, golden: Path, own_bundle: Path) -> None:
    result = cli("validate", own_bundle, "--golden", golden, "--json", "-", code=0)
    document = json.loads(result.stdout)
    assert document["validation"]["passed"] is True
    (record,) = load_manifest(own_bundle).validation
    assert (document["validation"], document["validated_on"]) == (record.report, record.machine)
    assert record.kernels == kernel_family()
    assert record.processor == processor_name()


def test_each_family_of_kernels_has_its_own_record(
    cli, golden: Path, own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validated(machine: str, flags: str, *more: object) -> str:
        become(monkeypatch, tmp_path, machine, flags)
        return str(cli("validate", own_bundle, "--golden", golden, *more).stdout)

    def records() -> list[tuple[str | None, object]]:
        return [(one.kernels, one.report["passed"]) for one in load_manifest(own_bundle).validation]

    write_manifest(own_bundle, load_manifest(own_bundle).with_validation(elsewhere(None)))
    assert "\non aarch64 with dot product\n" in validated("aarch64", ARM)
    assert records() == [(None, True), ("aarch64 with dot product", True)]
    failing = ("--rtol", 0, "--atol", 0)
    assert "\nFAILED: " in validated("x86_64", X86, *failing)
    assert records() == [(None, True), ("aarch64 with dot product", True), ("x86-64 with AVX2", False)]
    validated("aarch64", ARM, *failing)
    assert records() == [(None, True), ("x86-64 with AVX2", False), ("aarch64 with dot product", False)]
    validated("x86_64", X86)
    assert records() == [(None, True), ("aarch64 with dot product", False), ("x86-64 with AVX2", True)]


def test_what_others_wrote_meanwhile_stays(cli, golden: Path, own_bundle: Path, monkeypatch) -> None:
    validate_bundle = validate.validate_bundle

    def meanwhile(change):
        def compare(*arguments: object, **named: object):
            write_manifest(own_bundle, change(load_manifest(own_bundle)))
            return validate_bundle(*arguments, **named)

        monkeypatch.setattr(validate, "validate_bundle", compare)
        return cli("validate", own_bundle, "--golden", golden, code=0)

    meanwhile(lambda manifest: manifest.with_validation(elsewhere()))
    assert [one.kernels for one in load_manifest(own_bundle).validation] == [
        elsewhere().kernels,
        kernel_family(),
    ]
    # An export to the same place, of which this comparison says nothing.
    (own_bundle / "more.bin").write_bytes(b"x")
    more = {"more.bin": file_record(own_bundle / "more.bin")}
    anew = meanwhile(lambda manifest: replace(manifest, validation=()).with_files({**manifest.files, **more}))
    assert "into the manifest: the bundle was written anew meanwhile; blt-edge validate" in anew.stderr
    assert load_manifest(own_bundle).validation == ()


def test_a_breach_fails_and_is_recorded(cli, golden: Path, own_bundle: Path, tmp_path: Path) -> None:
    flags = ("--rtol", 0, "--atol", 0, "-q", "--json", tmp_path / "out.json")
    result = cli("validate", own_bundle, "--golden", golden, *flags, code=1)
    assert "FAIL" in result.stdout
    assert result.stderr.startswith(f"blt-edge: error: {own_bundle}: FAILED: ")
    assert result.stderr.count("\n") == 1
    assert load_manifest(own_bundle).validation[0].report["passed"] is False
    assert json.loads((tmp_path / "out.json").read_text())["validation"]["passed"] is False


def test_without_a_reference_files_are_checked(cli, refused, own_bundle: Path) -> None:
    result = cli("validate", own_bundle, "-q", code=0)
    assert result.stderr == ""
    assert result.stdout.startswith("9 files have the right sha256; nothing else was checked: neither")
    document = json.loads(cli("validate", own_bundle, "--json", "-").stdout)
    assert (document["validation"], document["validated_on"], document["files"]) == (None, None, 9)
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
