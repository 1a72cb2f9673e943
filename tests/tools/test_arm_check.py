"""The proof on other processors: its steps, planted defects, and what it says. Nothing is emulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import blt_edge
import pytest
from blt_edge.export import demo
from blt_edge.export.golden import GOLDEN_NAME, read_golden
from blt_edge.runtime.host import describe_processor
from blt_edge.tools.arm import check
from blt_edge.tools.arm.plants import PLANTS, plant
from blt_edge.tools.arm.steps import serve_one, steps_for
from blt_edge.tools.arm.suite import read_report
from blt_edge.tools.matrix.environments import clean_variables
from blt_edge.tools.steps import Step

SCRIPT = Path(check.__file__).with_name("check.sh")
PACKAGE = Path(blt_edge.__file__).parent


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_arm_alone_and_is_taken_out(name: str, tmp_path: Path) -> None:
    file, text, other = PLANTS[name]
    source = Path(check.__file__).parents[2] / file
    copy = tmp_path / "blt_edge" / file
    copy.parent.mkdir(parents=True)
    copy.write_bytes(source.read_bytes())
    undo = plant(name, tmp_path)
    planted = copy.read_text()
    compile(planted, file, "exec")
    assert planted.count(other) == 1
    assert "aarch64" in other
    undo()
    assert copy.read_bytes() == source.read_bytes()
    copy.write_text(source.read_text().replace(text, ""))
    with pytest.raises(ValueError, match="0 times"):
        plant(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "machine", "features", "missing"),
    [
        ("cortex-a72", "aarch64", "asimd", "asimddp"),
        ("cortex-a76", "aarch64", "asimddp", "i8mm"),
        ("armv9", "aarch64", "i8mm", "avx2"),
        ("haswell", "x86_64", "avx2", "avx512f"),
        ("nehalem", "x86_64", "sse4_2", "avx"),
    ],
)
def test_processors_say_what_they_can_do(
    file: str, machine: str, features: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blt_edge.runtime.host._CPUINFO", SCRIPT.with_name("processors") / file)
    found = describe_processor()["features"].split()
    assert features in found
    assert missing not in found
    # Such a line is left out of a real one only where the architecture has none.
    assert bool(describe_processor()["processor"]), machine


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--processor", "z80"], 2, "allowed are cortex-a76"),
        (["--processor"], 2, "--processor needs a value"),
    ],
)
def test_script_refuses_in_one_line(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, "--cache", str(tmp_path), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_script_says_where_nothing_can_be_emulated(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("mkdir", "dirname", "realpath", "bash"):
        tools.joinpath(name).symlink_to(
            f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}"
        )
    tools.joinpath("uname").write_text("#!/bin/sh\n[ $1 = -m ] && echo riscv64 || echo Linux\n")
    tools.joinpath("uname").chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", SCRIPT, "--cache", str(tmp_path / "cache")],
        env={**os.environ, "PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 77
    assert "cortex-a76 can't be emulated here" in done.stderr


def test_bars_are_those_of_the_precision(tmp_path: Path) -> None:
    golden = read_golden(Path(demo.__path__[0], GOLDEN_NAME))
    subprocess.run(
        [sys.executable, "-m", "blt_edge", "export", "demo", "-o", tmp_path / "b", "--no-validate", "-q"],
        check=True,
    )
    bars = next(step for step in steps_for(golden, tmp_path, "int4") if step.arguments[0] == "compare").check
    assert bars is not None

    def document(bits: float, built: bool = True) -> str:
        total = {"mean_kl_bits": 0.0, "false_boundaries": 0.0, "missed_boundaries": 0.0}
        bundle = {"path": "b", "built": built, "engine": "portable", "total": total}
        return json.dumps({"bundles": [{**bundle, "against_first": {"more_bits_per_byte": bits}}]})

    assert bars(document(0.0)) is None
    assert "more bits per byte" in str(bars(document(0.5)))
    assert "nan" in str(bars(document(float("nan"))))
    assert "ran on portable" in str(bars(document(0.0, built=False)))


def test_full_steps_cover_what_quick_ones_do(tmp_path: Path) -> None:
    golden = read_golden(Path(demo.__path__[0], GOLDEN_NAME))
    quick, full = steps_for(golden, tmp_path, "int4"), steps_for(golden, tmp_path)
    assert {step.name for step in quick} - {"int4 beside fp32"} <= {step.name for step in full}
    verbs = {step.arguments[0] for step in full}
    assert verbs == {"validate", "generate", "build", "score", "compare", "quantize"}


def test_server_is_asked_and_ended(tmp_path: Path) -> None:
    program = (sys.executable, "-m", "blt_edge")
    subprocess.run([*program, "export", "demo", "-o", tmp_path / "b", "--no-validate", "-q"], check=True)
    done = serve_one(program, clean_variables(), tmp_path)
    assert done.ok, done.line
    (tmp_path / "b" / "manifest.json").write_text("{}")
    broken = serve_one(program, clean_variables(), tmp_path)
    assert not broken.ok
    assert "manifest.json" in broken.line


def test_report_of_tests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/>'
        '<testcase classname="a" name="y"><failure message="no&#10;more"/></testcase>'
        '<testcase classname="a" name="z"><skipped message="needs torch"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert read_report(path) == (("a.y: no",), {"needs torch": 1}, 3)


def test_report_is_kept_after_each_step(tmp_path: Path) -> None:
    report = check.Report("native", "", None, "2026-11-30")
    target = check.Target(Path(sys.executable), tmp_path, report, tmp_path / "r.json")
    assert target.facts()["machine"]
    target.run(Step("version", ("--version",)))
    target.run(Step("nothing", ("nothing",)))
    steps = json.loads((tmp_path / "r.json").read_text())["steps"]
    assert [step["ok"] for step in steps] == [True, False]
    assert "nothing" in steps[1]["line"]
