"""`blt-edge quantize`: what reaches `export.quantize`, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.runtime.kernels import kernel_family
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.names import STAGES
from blt_edge.tools.cli.quantize import planned_memory
from blt_edge.tools.memory import running_memory


@pytest.fixture(scope="module")
def even_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle whose widths blocks of 32 divide."""
    from blt_edge.export import export_checkpoint
    from support.quantized import BLOCKY
    from support.random_models import write_random_model

    folder = tmp_path_factory.mktemp("even")
    write_random_model(BLOCKY, folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "bundle", context=500)


def source(verb: str, even_bundle: Path) -> Path:
    """What a verb takes."""
    return even_bundle if verb == "quantize" else even_bundle.parent / "checkpoint"


@pytest.mark.parametrize(
    ("flags", "precisions", "tables"),
    [
        ("--precision fp16", {"fp16"}, "fp32"),
        ("--precision int8w", {"int8w"}, "int8"),
        ("--precision int8w --tables keep", {"int8w"}, "fp32"),
        ("--precision decoder=int8w --tables int4", {"int8w", "fp32"}, "int4"),
        ("--tables fp16", {"fp32"}, "fp16"),
    ],
)
def test_bundle(
    cli, even_bundle: Path, tmp_path: Path, flags: str, precisions: set[str], tables: str
) -> None:
    output = tmp_path / "out"
    result = cli("quantize", even_bundle, "-o", output, "--no-validate", *flags.split(), code=0)
    assert result.stdout == f"{output}\n"
    manifest = load_manifest(output)
    assert {stage.precision for stage in manifest.stages.values()} == precisions
    assert manifest.embedding.precision == tables
    for words in (f"wrote {output}; blt-edge compare", "not validated: --no-validate", "embedding tables"):
        assert words in result.stderr


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_calibration_files(cli, even_bundle: Path, tmp_path: Path, verb: str) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text(f"This is text {file.name}. " * 100)
    flags = "--precision decoder=int8 --calibration-method minmax --windows 2 --seed 5 -q --no-validate"
    paths = (*files, source(verb, even_bundle), "-o", tmp_path / "out")
    assert cli(verb, "--calibration", *paths, *flags.split(), code=0).stderr == ""
    calibration = load_manifest(tmp_path / "out").to_dict()["quantization"]["calibration"]
    assert list(calibration["texts"]) == ["a.txt", "b.txt"]
    assert (calibration["method"], calibration["seed"], calibration["windows"]) == ("minmax", 5, 2)


REFUSED_BY_BOTH = [
    ("--precision int3", "--precision: got 'int3'"),
    ("--precision middle=int8", "--precision: got stage 'middle'"),
    ("--precision decoder=int9", "--precision: got 'int9' for decoder"),
    ("--precision int4 --block-size 31", "--block-size: got '31'"),
    ("--precision int4 --block-size 128", "128 does not divide"),
    ("--precision int4 --calibration empty.txt", "empty.txt is empty"),
    ("--tables int2", "--tables: got 'int2'"),
    ("--precision int8 --calibration empty.txt", "empty.txt is empty"),
    ("--precision int8 --calibration short.txt", "short.txt"),
    ("--precision int8 --calibration binary.txt", "binary.txt"),
    ("--precision int8 --calibration gone.txt", "gone.txt does not exist"),
    ("--precision int8 --calibration -", "--calibration: stdin can't be read"),
    ("--precision int8 --calibration-method best", "--calibration-method: got 'best'"),
    ("--precision int8 --windows 0", "--windows: got 0"),
    ("--precision int8 --smooth 2", "--smooth: got 2.0"),
    ("--precision int8 --seed -1", "--seed: got -1"),
    ("--precision int8 --rtol -1", "--rtol is -1.0"),
    ("--precision int8 -o here", "exists; give a new name, or --force"),
]


@pytest.mark.parametrize(
    ("verb", "flags", "line"),
    [
        *((verb, flags, line) for flags, line in REFUSED_BY_BOTH for verb in ("quantize", "export")),
        ("quantize", "-o out --precision fp32", "nothing to change"),
        ("quantize", "-o out --target-boundaries 2", "--target-boundaries is 2.0; allowed is"),
        ("quantize", "-o out --target-boundaries most", "'most'"),
        (
            "quantize",
            "-o out --precision fp16 --target-boundaries 0.9",
            "the patcher is fp16; drop the target",
        ),
        ("quantize", "-o out --target-boundaries 0.9 --windows 1", "--windows: got 1"),
        ("export", "--precision int8 --dry-run --calibration empty.txt", "empty.txt is empty"),
    ],
)
def test_refusals(
    cli, even_bundle: Path, tmp_path: Path, monkeypatch, verb: str, flags: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("empty.txt", b""), ("short.txt", b"short"), ("binary.txt", bytes(5000))):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "here").mkdir()
    output = [] if "-o" in flags.split() else ["-o", "out"]
    result = cli(verb, source(verb, even_bundle), *output, "-q", *flags.split(), code=2)
    assert result.stdout == ""
    assert line in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        ("--precision int4 --seed 3", "note: --seed changes nothing: no stage is int8"),
        ("--precision fp16 --block-size 32", "note: --block-size changes nothing: no stage is int8w or"),
        ("--precision fp16 --search mse", "note: --search changes nothing: no stage is int8 or"),
        ("--precision int8w --block-size 32 --search rtn", ""),
    ],
)
def test_options_that_change_nothing_are_named(
    cli, even_bundle: Path, tmp_path: Path, flags: str, unused: str
) -> None:
    words = ("-q", *flags.split())
    result = cli("quantize", even_bundle, "-o", tmp_path / "out", "--no-validate", *words, code=0)
    planned = cli("export", source("export", even_bundle), "--dry-run", *words, code=0)
    assert result.stderr == planned.stderr
    assert result.stderr.startswith(unused)
    assert result.stderr.count("\n") == bool(unused)


def test_a_mix_is_searched_row_by_row(cli, even_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("This is some text, to be read in windows. " * 100)
    flags = ("--target-boundaries", "0.01", "--windows", 2, "--seed", 1, "--calibration", tmp_path / "a.txt")
    result = cli("quantize", even_bundle, "-o", tmp_path / "out", *flags, "--no-validate", code=0)
    assert result.stdout == f"{tmp_path / 'out'}\n"
    lines = result.stderr.splitlines()
    rows = [line.split()[:3] for line in lines if line[:1].isdecimal() and "%" in line]
    assert rows[0] == ["0", "of", "8"]
    assert rows[-1] == ["8", "of", "8"]
    assert any(line.split()[:2] == ["4-bit", "matrices"] for line in lines)
    assert "changes nothing" not in result.stderr
    assert any(line.startswith("patcher: 8 of 8 matrices in 4 bits, ") for line in lines)
    assert load_manifest(tmp_path / "out").stages["patcher"].precision == "int4"


def test_a_target_out_of_reach_is_no_wrong_usage(refused, even_bundle: Path, tmp_path: Path) -> None:
    flags = ("--target-boundaries", "1", "--windows", "40", "-q")
    line = refused("quantize", even_bundle, "-o", tmp_path / "out", *flags, code=1)
    assert "target boundaries: 1 is out of reach" in line
    assert not (tmp_path / "out").exists()


def test_a_quantized_bundle_and_no_output_are_refused(
    cli, refused, even_bundle: Path, tmp_path: Path
) -> None:
    cli("quantize", even_bundle, "-o", tmp_path / "once", "--precision", "int8w", "--no-validate")
    told = refused("quantize", tmp_path / "once", "-o", tmp_path / "twice", "--precision", "int4")
    assert "is quantized already (int8w)" in told
    # Nor is the precision told that would be taken.
    assert "is quantized already" in refused("quantize", tmp_path / "once", "-o", tmp_path / "twice")
    assert "--output is missing" in refused("quantize", even_bundle)


def test_without_a_precision_there_is_a_default_and_it_is_told(
    cli, even_bundle: Path, tmp_path: Path
) -> None:
    result = cli("quantize", even_bundle, "-o", tmp_path / "out", "--no-validate", code=0)
    assert "took --precision int8w: " in result.stderr
    manifest = load_manifest(tmp_path / "out")
    assert {stage.precision for stage in manifest.stages.values()} == {"int8w"}
    assert manifest.embedding.precision == "int8"


def test_a_precision_that_fits_a_size_of_memory(cli, refused, even_bundle: Path, tmp_path: Path) -> None:
    """What is foretold is what inspecting the real bundle foretells, but for the graph, which counts."""
    before, needed = load_manifest(even_bundle), {}
    for word in ("int8w", "int4"):
        cli("quantize", even_bundle, "-o", tmp_path / word, "--precision", word, "--no-validate", code=0)
        needed[word] = planned_memory(even_bundle, before, word)
        real = running_memory(load_manifest(tmp_path / word), prepared=False, positions=500)
        assert needed[word] == pytest.approx(sum(real.values()), rel=0.02)
    assert needed["int4"] < needed["int8w"]
    for limit, word in ((needed["int8w"], "int8w"), (needed["int8w"] - 1, "int4")):
        flags = ("--max-memory", limit, "--no-validate", "--force")
        result = cli("quantize", even_bundle, "-o", tmp_path / "out", *flags, code=0)
        assert f"took --precision {word}: about " in result.stderr
        assert load_manifest(tmp_path / "out").stages["latent"].precision == word
    line = refused("quantize", even_bundle, "-o", tmp_path / "none", "--max-memory", "1MB")
    assert "--max-memory: even int4 takes about " in line
    both = ("--max-memory", "1GB", "--precision", "int4")
    assert "both given" in refused("quantize", even_bundle, "-o", tmp_path / "none", *both)


def test_a_breach_fails_names_the_next_step_and_keeps_the_bundle(
    refused, even_bundle: Path, tmp_path: Path
) -> None:
    flags = ("-o", tmp_path / "out", "--precision", "decoder=int8w", "--rtol", "1e-9", "-q")
    line = refused("quantize", even_bundle, *flags, code=1)
    assert "differs from the float32 bundle" in line
    assert "try --precision decoder=fp16: the encoder is the first to differ" in line
    assert load_manifest(tmp_path / "out").validation[0].report["passed"] is False


def test_the_result_is_validated_and_told(cli, even_bundle: Path, tmp_path: Path) -> None:
    target, output = tmp_path / "written.json", tmp_path / "out"
    result = cli("quantize", even_bundle, "-o", output, "--precision", "fp16", "--json", target, code=0)
    assert result.stdout == f"{output}\n"
    assert "against the float32 bundle" in result.stderr
    document = json.loads(target.read_text())
    (record,) = load_manifest(output).validation
    assert (document["validation"], document["validated_on"]) == (record.report, record.machine)
    assert record.kernels == kernel_family()
    assert (document["validation"]["passed"], document["validation"]["precision"]) == (True, "fp16")
    precisions = {name: part["precision"] for name, part in document["parts"].items()}
    assert precisions == {**dict.fromkeys(STAGES, "fp16"), "tables": "fp32"}
