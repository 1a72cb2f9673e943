"""`blt-edge quantize`: what reaches `export.quantize`, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.names import STAGES


@pytest.fixture(scope="module")
def even_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle whose widths blocks of 32 divide."""
    from blt_edge.export import export_checkpoint
    from support.random_models import RandomModel, base_config, write_random_model

    wide = {"hidden_size": 64, "intermediate_size": 64}
    config = base_config(
        patcher=wide,
        decoder={"intermediate_size": 64},
        global_stack={"intermediate_size": 96},
        encoder={"max_position_embeddings": 500},
    )
    folder = tmp_path_factory.mktemp("even")
    write_random_model(RandomModel("even", config, share=0.3), folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "bundle")


@pytest.mark.parametrize(
    ("flags", "precisions", "tables"),
    [
        (["--precision", "fp16"], {"fp16"}, "fp32"),
        (["--precision", "int8w"], {"int8w"}, "int8"),
        (["--precision", "int8w", "--tables", "keep"], {"int8w"}, "fp32"),
        (["--precision", "decoder=int8w", "--tables", "int4"], {"int8w", "fp32"}, "int4"),
        (["--tables", "fp16"], {"fp32"}, "fp16"),
    ],
)
def test_bundle(
    cli, even_bundle: Path, tmp_path: Path, flags: list[str], precisions: set[str], tables: str
) -> None:
    result = cli("quantize", even_bundle, "-o", tmp_path / "out", "--no-validate", *flags)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n"
    manifest = load_manifest(tmp_path / "out")
    assert {stage.precision for stage in manifest.stages.values()} == precisions
    assert manifest.embedding.precision == tables
    assert f"wrote {tmp_path / 'out'}; blt-edge compare" in result.stderr
    assert "not validated: --no-validate" in result.stderr
    assert "embedding tables" in result.stderr


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_calibration_files(cli, even_bundle: Path, tmp_path: Path, verb: str) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"This is text {name}. " * 100)
    flags = ("--precision", "decoder=int8", "--calibration-method", "minmax", "--windows", 2, "--seed", 5)
    files = ("--calibration", tmp_path / "a.txt", tmp_path / "b.txt")
    source = even_bundle if verb == "quantize" else even_bundle.parent / "checkpoint"
    result = cli(verb, *files, source, "-o", tmp_path / "out", *flags, "-q", "--no-validate")
    assert (result.exit_code, result.stderr) == (0, "")
    calibration = load_manifest(tmp_path / "out").to_dict()["quantization"]["calibration"]
    assert list(calibration["texts"]) == ["a.txt", "b.txt"]
    assert (calibration["method"], calibration["seed"], calibration["windows"]) == ("minmax", 5, 2)


# Of both verbs.
INT8 = ("--precision", "int8")
REFUSED = [
    (("--precision", "int3"), "--precision: got 'int3', allowed are"),
    (("--precision", "middle=int8"), "--precision: got stage 'middle', this model has"),
    (("--precision", "decoder=int9"), "--precision: got 'int9' for decoder"),
    (("--precision", "int4", "--block-size", "31"), "--block-size: got 31, allowed are"),
    (("--precision", "int4", "--block-size", "128"), "128 does not divide"),
    (("--precision", "int4", "--calibration", "empty.txt"), "empty.txt is empty; calibration needs text"),
    (("--tables", "int2"), "--tables: got 'int2', this version has"),
    ((*INT8, "--calibration", "empty.txt"), "empty.txt is empty; calibration needs text"),
    ((*INT8, "--calibration", "short.txt"), "short.txt"),
    ((*INT8, "--calibration", "binary.txt"), "binary.txt"),
    ((*INT8, "--calibration", "gone.txt"), "gone.txt does not exist"),
    ((*INT8, "--calibration", "-"), "--calibration: stdin can't be read"),
    ((*INT8, "--calibration-method", "best"), "--calibration-method: got 'best'"),
    ((*INT8, "--windows", "0"), "--windows: got 0"),
    ((*INT8, "--smooth", "2"), "--smooth: got 2.0"),
    ((*INT8, "--seed", "-1"), "--seed: got -1"),
    ((*INT8, "--rtol", "-1"), "--rtol is -1.0"),
    ((*INT8, "-o", "here"), "exists; give a new name, or --force"),
]


@pytest.mark.parametrize(
    ("verb", "flags", "line"),
    [
        *((verb, flags, line) for flags, line in REFUSED for verb in ("quantize", "export")),
        ("quantize", ("-o", "out"), "nothing to change"),
        ("export", (*INT8, "--dry-run", "--calibration", "empty.txt"), "empty.txt is empty"),
    ],
)
def test_refusals(
    cli,
    even_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    flags: tuple[str, ...],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.txt").write_bytes(bytes(5000))
    (tmp_path / "here").mkdir()
    source = even_bundle if verb == "quantize" else even_bundle.parent / "checkpoint"
    result = cli(verb, source, "-o", "out", "-q", *flags)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert line in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_output_is_missing(cli, even_bundle: Path) -> None:
    assert "--output is missing" in cli("quantize", even_bundle).stderr


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        (["--precision", "int4", "--seed", 3], "--seed changes nothing: no stage is int8"),
        (["--precision", "fp16", "--block-size", 32], "--block-size changes nothing: no stage is int8w or"),
        (["--precision", "fp16", "--search", "mse"], "--search changes nothing: no stage is int8 or"),
        (["--precision", "int8w", "--block-size", 32, "--search", "rtn"], ""),
    ],
)
def test_options_that_change_nothing_are_named(
    cli, even_bundle: Path, tmp_path: Path, flags: list[object], unused: str
) -> None:
    result = cli("quantize", even_bundle, "-o", tmp_path / "out", "--no-validate", "-q", *flags)
    planned = cli("export", even_bundle.parent / "checkpoint", "--dry-run", "-q", *flags)
    assert (result.exit_code, planned.exit_code) == (0, 0), result.stderr
    assert result.stderr == planned.stderr
    assert result.stderr.startswith(f"note: {unused}" if unused else "")
    assert result.stderr.count("\n") == bool(unused)


def test_a_quantized_bundle_is_refused(cli, even_bundle: Path, tmp_path: Path) -> None:
    cli("quantize", even_bundle, "-o", tmp_path / "once", "--precision", "int8w", "--no-validate")
    result = cli("quantize", tmp_path / "once", "-o", tmp_path / "twice", "--precision", "int4")
    assert result.exit_code == 2
    assert "is quantized already (int8w); give the float32 bundle it was made from" in result.stderr


def test_a_breach_fails_and_keeps_the_bundle(cli, even_bundle: Path, tmp_path: Path) -> None:
    flags = ("--precision", "int8w", "--rtol", "1e-9", "-q")
    result = cli("quantize", even_bundle, "-o", tmp_path / "out", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "differs from the float32 bundle" in result.stderr
    assert load_manifest(tmp_path / "out").validation["passed"] is False


def test_the_result_is_validated_and_told(cli, even_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "written.json"
    flags = ("--precision", "fp16", "--json", target)
    result = cli("quantize", even_bundle, "-o", tmp_path / "out", *flags)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n"), result.stderr
    assert "against the float32 bundle" in result.stderr
    document = json.loads(target.read_text())
    assert document["validation"] == load_manifest(tmp_path / "out").validation
    assert (document["validation"]["passed"], document["validation"]["precision"]) == (True, "fp16")
    precisions = {name: part["precision"] for name, part in document["parts"].items()}
    assert precisions == {**dict.fromkeys(STAGES, "fp16"), "tables": "fp32"}
