"""The compatibility matrix: what is planned, how a cell is judged, and the page. Nothing is installed."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from blt_edge.export.golden import Golden, read_golden
from blt_edge.tools.matrix.__main__ import render, summary
from blt_edge.tools.matrix.environments import Interpreter, Prepared, clean_variables, find
from blt_edge.tools.matrix.plan import Cell, Claims, Kind, MatrixError, Plan, make_plan, select
from blt_edge.tools.matrix.run import (
    CellResult,
    Report,
    Verdict,
    judge,
    read_outcomes,
    run_cells,
    run_steps,
    steps_for,
    write_report,
)
from blt_edge.tools.steps import Done, Step
from packaging.version import Version

ROOT = Path(__file__).parents[2]
METADATA = """Metadata-Version: 2.4
Name: blt-edge
Requires-Python: >=3.10
Requires-Dist: numpy>=1.24
Provides-Extra: cpu
Requires-Dist: onnxruntime>=1.22; extra == "cpu"
Requires-Dist: onnx_ir>=1.1; extra == "export"
Requires-Dist: torch>=2.6; extra == "validate"
Requires-Dist: transformers<6,>=5.23; extra == "validate"
Requires-Dist: matplotlib>=3.8; extra == "plot"
"""
CLAIMS = Claims.of_metadata(METADATA, ("cpu", "export", "validate"))


class Shelf:
    """Releases from a table: by package, the Pythons that each has a wheel for."""

    OLD = ("3.10", "3.11", "3.12")
    NEW = ("3.11", "3.12", "3.13")
    TABLE: ClassVar = {
        "onnxruntime": {
            **dict.fromkeys(("1.20.1", "1.21.0", "1.21.1", "1.22.0", "1.22.1", "1.23.2"), OLD),
            "1.24.0": NEW,
        },
        "numpy": {"1.23.0": OLD, "1.24.0": OLD[:2], "1.26.4": OLD, "2.5.0": ("3.12", "3.13")},
        "onnx-ir": {"1.1.0": (*OLD, "3.13")},
        "transformers": {"5.23.0": OLD + NEW, "5.24.0": OLD + NEW},
    }

    def versions(self, package: str, python: str) -> list[Version]:
        # As `pip index` does, with releases that would have to be compiled.
        newer = [Version(v) for v, pythons in self.TABLE[package].items() if python in pythons]
        sources = [Version("1.24.0")] if package == "numpy" else []
        return sorted({*newer, *sources}, reverse=True)

    def has_wheel(self, package: str, version: Version, python: str) -> bool:
        return python in self.TABLE[package][str(version)]


def planned(*found: str) -> Plan:
    return make_plan(CLAIMS, Shelf(), found, "3.11", "2.13.0")


PLAN = planned("3.10", "3.11", "3.12")
SAME = ("3.12/onnxruntime-1.24.0", "3.12/numpy-2.5.0-newest", "3.11/numpy-1.24.0-minimum")


def test_minimums_are_those_of_the_metadata() -> None:
    assert CLAIMS.python == "3.10"
    claimed = " ".join(f"{name}>={version}" for name, version in CLAIMS.packages.items())
    assert claimed == "numpy>=1.24 onnxruntime>=1.22 onnx-ir>=1.1 torch>=2.6 transformers>=5.23"
    with pytest.raises(MatrixError, match=r"click<9: no minimum to try"):
        Claims.of_metadata(METADATA + "Requires-Dist: click<9\n", ())


def named(*kinds: Kind) -> list[str]:
    return [cell.name for cell in PLAN.cells if cell.kind in kinds]


def test_every_python_and_every_onnx_runtime_from_the_minimums_on() -> None:
    assert PLAN.pythons == ("3.10", "3.11", "3.12", "3.13")
    newer = ("1.24.0", "1.23.2", "1.22.1")
    grid = {"3.10": newer[1:], "3.11": newer, "3.12": newer, "3.13": newer[:1]}
    expected = [f"{python}/onnxruntime-{version}" for python, column in grid.items() for version in column]
    assert named(Kind.GRID) == expected
    assert named(Kind.BELOW) == ["3.10/onnxruntime-1.21.1", "3.10/onnxruntime-1.20.1"]


def test_other_packages_at_their_minimum_and_newest_where_there_is_a_wheel() -> None:
    assert named(Kind.MINIMUM, Kind.NEWEST) == [
        "3.11/numpy-1.24.0-minimum",
        "3.12/numpy-2.5.0-newest",
        "3.12/onnx-ir-1.1.0-minimum",
        "3.12/onnx-ir-1.1.0-newest",
        "3.11/transformers-5.23.0-minimum",
        "3.11/transformers-5.24.0-newest",
    ]
    assert {dict(cell.pins).get("torch") for cell in PLAN.cells if cell.with_torch} == {"2.13.0"}
    (minimums,) = (cell for cell in PLAN.cells if cell.kind is Kind.ALL_MINIMUMS)
    assert minimums.name == "3.10/all-minimums"
    assert minimums.pins == (("numpy", "1.24.0"), ("onnxruntime", "1.22.0"), ("onnx-ir", "1.1.0"))


@pytest.mark.parametrize(
    ("found", "missing", "newest"),
    [
        (("3.10", "3.11", "3.12", "3.13"), (), ["3.13/onnxruntime-1.24.0"]),
        (("3.10", "3.11"), ("3.12", "3.13"), ["3.11/onnxruntime-1.24.0", "3.13/onnxruntime-1.24.0"]),
    ],
)
def test_a_corner_whose_python_is_missing_stays_and_another_stands_in(
    found: tuple[str, ...], missing: tuple[str, ...], newest: list[str]
) -> None:
    plan = planned(*found)
    assert plan.missing == missing
    names = [cell.name for cell in select(plan.cells, ["corners"])]
    assert names == ["3.10/onnxruntime-1.23.2", *newest, "3.10/all-minimums"]


def test_no_interpreter_or_no_index_is_said() -> None:
    with pytest.raises(MatrixError, match=r"no interpreter of Python 3\.10, .* give one with --python"):
        planned("2.7")
    empty = type("Empty", (Shelf,), {"TABLE": {"onnxruntime": {}}})()
    with pytest.raises(MatrixError, match=r"finds no onnxruntime for Python 3\.10"):
        make_plan(CLAIMS, empty, ["3.10"], "3.11", "2.13.0")


def test_cells_are_chosen_by_pattern() -> None:
    names = [cell.name for cell in PLAN.cells]
    assert len(set(names)) == len(names)
    assert [cell.name for cell in select(PLAN.cells, [])] == names
    chosen = [cell.name for cell in select(PLAN.cells, ["*numpy-1*", "3.13/*"])]
    assert chosen == ["3.13/onnxruntime-1.24.0", "3.11/numpy-1.24.0-minimum"]
    with pytest.raises(MatrixError, match=r"--only 3\.9/\*: no cell of this name"):
        select(PLAN.cells, ["3.9/*"])


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_interpreters_are_this_one_and_those_that_are_named(tmp_path: Path) -> None:
    mine = program(tmp_path / "mine", "echo 3.2.1")
    found = find([mine])
    assert found["3.2"] == Interpreter(mine, "3.2.1")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in found
    assert list(found) == sorted(found, key=Version)
    shim = program(tmp_path / "shim", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    for path in (shim, tmp_path / "none"):
        with pytest.raises(MatrixError, match=r"--python .*; give the path of a Python"):
            find([path])


def done(name: str, exit_code: int | None = 0, traceback: bool = False, lines: int = 1) -> Done:
    ok = exit_code == 0 and not traceback
    return Done(name, exit_code, 1.0, f"{name} said", lines, traceback, ok)


@pytest.mark.parametrize(
    ("kind", "steps", "verdict", "step"),
    [
        (Kind.GRID, [done("export"), done("build")], Verdict.PASS, ""),
        (Kind.GRID, [done("export"), done("build", 1)], Verdict.FAIL, "build"),
        (Kind.BELOW, [done("export"), done("build", 1)], Verdict.REFUSED, "build"),
        (Kind.BELOW, [done("export"), done("build", 1, lines=2)], Verdict.FAIL, "build"),
        (Kind.BELOW, [done("export"), done("build", 1, traceback=True)], Verdict.FAIL, "build"),
        (Kind.BELOW, [done("export"), done("build", None)], Verdict.FAIL, "build"),
        (Kind.BELOW, [done("export", 1)], Verdict.FAIL, "export"),
        (Kind.GRID, [done("export", 0, traceback=True)], Verdict.FAIL, "export"),
    ],
)
def test_a_cell_is_judged_by_its_first_step_that_is_not_right(
    kind: Kind, steps: list[Done], verdict: Verdict, step: str
) -> None:
    *found, line = judge(kind, steps)
    assert (*found, "said" in line) == (verdict, step, bool(step))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden(ROOT / "export" / "demo" / "golden.safetensors")


def prepared(folder: Path, script: str) -> Prepared:
    """An environment whose blt-edge is this shell script."""
    program(folder / "bin" / "blt-edge", script)
    return Prepared(folder / "bin", clean_variables(), folder / "golden.safetensors", {})


def test_steps_end_with_the_first_that_fails(tmp_path: Path, golden: Golden) -> None:
    traceback = r"Traceback (most recent call last):\nValueError: x\n"
    loud = f"if [ $1 = loud ]; then printf '{traceback}' >&2; fi"
    here = prepared(tmp_path, loud)
    steps = [Step("first", ("quiet",)), Step("second", ("loud",)), Step("third", ("quiet",))]
    results = run_steps(steps, here, golden, tmp_path)
    assert [(one.name, one.ok, one.exit_code) for one in results] == [
        ("first", True, 0),
        ("second", False, 0),
    ]
    assert judge(Kind.GRID, results) == (Verdict.FAIL, "second", "traceback: ValueError: x")


def test_a_hub_id_is_found_in_a_cache_of_the_cell_s_own(tmp_path: Path, golden: Golden) -> None:
    here = prepared(tmp_path, "cat $HF_HOME/hub/models--blt-edge--demo/snapshots/*/config.json")
    here.golden.with_name("config.json").write_text("the wheel's")
    hub = next(one for one in steps_for(PLAN.cells[0], here, golden) if one.name == "export a hub id")
    (only,) = run_steps([replace(hub, check=lambda output: output)], here, golden, tmp_path)
    assert only.line == "the wheel's"


def step(cell: Cell, name: str, golden: Golden) -> Step:
    here = Prepared(Path("bin"), {}, Path("golden"), {})
    return next(one for one in steps_for(cell, here, golden) if one.name == name)


def check_of(cell: Cell, name: str, golden: Golden) -> Callable[[str], str | None]:
    check = step(cell, name, golden).check
    assert check is not None
    return check


def test_a_greedy_text_must_be_the_reference_s_from_the_engine_that_was_built(golden: Golden) -> None:
    check = check_of(PLAN.cells[0], "generate", golden)

    def output(text: bytes, engine: str, reason: str | None = None) -> str:
        encoded = base64.b64encode(text).decode()
        return json.dumps({"data_base64": encoded, "engine": {"name": engine, "reason": reason}})

    text = golden.greedy[:96]
    assert check(output(text, "engines/onnxruntime-0")) is None
    assert check(output(text, "portable graphs", "old")) == "ran on portable graphs: old"
    assert "at byte 4 of 96" in str(check(output(text[:4] + b"\0" + text[5:], "engines/x")))
    assert "at byte 4 of 96" in str(check(output(text[:4], "engines/x")))


@pytest.mark.parametrize("bits", [1.9, float("nan")])
def test_a_quantized_bundle_that_is_far_from_float32_fails(golden: Golden, bits: float) -> None:
    check = check_of(PLAN.cells[0], "compare", golden)

    def output(value: float) -> str:
        bundles = [("b", 1.8), ("b4", 1.81), ("b8", value)]
        return json.dumps({"bundles": [{"path": path, "total": {"bits_per_byte": b}} for path, b in bundles]})

    assert check(output(1.79)) is None
    assert str(check(output(bits))).startswith("b8: ")


def test_transformers_must_be_the_one_that_was_asked_for(golden: Golden) -> None:
    cell = next(cell for cell in PLAN.cells if cell.with_torch)
    assert cell.extras == ("cpu", "export", "validate")
    check = check_of(cell, "validate", golden)
    assert check('{"validation": {"against": "transformers 5.23.0"}}') is None
    wrong = check('{"validation": {"against": "transformers 5.24.0"}}')
    assert wrong == "compared with transformers 5.24.0, not with transformers 5.23.0"


@pytest.mark.parametrize(
    ("script", "told"),
    [("echo hello", "unexpected output"), ("echo building >&2; kill -11 $$", "ended by signal 11: building")],
)
def test_a_step_that_ends_badly_says_how(script: str, told: str, tmp_path: Path, golden: Golden) -> None:
    here = prepared(tmp_path, script)
    (only,) = run_steps([step(PLAN.cells[0], "generate", golden)], here, golden, tmp_path)
    assert not only.ok
    assert told in only.line


def test_a_missing_interpreter_is_an_outcome() -> None:
    (outcome,) = run_cells([PLAN.cells[0]], None, {}, [], print)
    assert (outcome.verdict, outcome.line) == (Verdict.MISSING, "no Python 3.10 on this machine")


def test_the_same_versions_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell's environment has the same; blt-edge adds a line to a file."""
    log = tmp_path / "log"
    shutil.copy(ROOT / "export" / "demo" / "golden.safetensors", tmp_path)
    always = replace(prepared(tmp_path, f"echo $1 >> {log}; exit 1"), versions={"numpy": "2.5.0"})
    monkeypatch.setattr("blt_edge.tools.matrix.run.prepare", lambda *arguments: always)
    cells = {cell.name: cell for cell in PLAN.cells}
    first, second, other = (cells[name] for name in SAME)
    pythons = {python: Interpreter(Path("python"), f"{python}.1") for python in ("3.11", "3.12")}
    run = list(run_cells([first, second, other], None, pythons, [], print))
    assert [outcome.same_as for outcome in run] == [None, first.name, None]
    assert [outcome.verdict for outcome in run] == [Verdict.FAIL] * 3
    assert log.read_text().split() == ["export", "export"]
    (again,) = run_cells([second], None, pythons, [(first, run[0]), (second, run[1])], print)
    assert (again.cell, again.same_as) == (second.name, first.name)


def test_other_packages_are_not_let_in() -> None:
    variables = {"PYTHONPATH": "x", "PYTHONHOME": "y", "VIRTUAL_ENV": "z", "PATH": "p"}
    assert set(clean_variables(variables)) == {"PATH", "PYTHONNOUSERSITE"}
    assert clean_variables({"PIP_FIND_LINKS": "wheels"})["UV_FIND_LINKS"] == "wheels"


def report(*outcomes: CellResult) -> Report:
    head = ("0.1.0", "0123456789ab", "2026-11-28", "a processor, 2 cores", {"3.10": "3.10.13"})
    return Report(*head, PLAN, {outcome.cell: outcome for outcome in outcomes})


PASSED = CellResult("3.11/onnxruntime-1.24.0", Verdict.PASS, seconds=30, steps=(done("export"),))
REFUSED = CellResult("3.10/onnxruntime-1.20.1", Verdict.REFUSED, "build", "error: too old | `x`")
FAILED = CellResult("3.12/numpy-2.5.0-newest", Verdict.FAIL, "validate", "y" * 1000)


def test_the_page_has_every_cell() -> None:
    page = render(report(PASSED, REFUSED, FAILED))
    for line in (
        "on 2026-11-28",
        "| ONNX Runtime | Python 3.10 | Python 3.11 | Python 3.12 | Python 3.13 |",
        "| 1.24.0 | - | passes | not run | missing |",
        "| 1.20.1 | refused | - | - | - |",
        "| numpy | 1.24.0 on Python 3.11 | not run | 2.5.0 on Python 3.12 | **fails** |",
        r"| refused | build | `error: too old \| 'x'` |",
        "| validate | `" + "y" * 240 + "...` |",
        "Missing on the machine: Python 3.13.",
        "3 of 18 cells",
        "with torch 2.13.0 only",
    ):
        assert line in page


def test_the_summary_names_what_did_not_pass() -> None:
    refusal, total = summary(report(PASSED, REFUSED), PLAN.cells).splitlines()
    assert refusal.startswith("3.10/onnxruntime-1.20.1: refused: build: error: too old")
    assert total == "2 cells: 1 pass, 1 refused, 0 fail, 0 missing"


def test_outcomes_are_kept_for_the_same_code(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    assert read_outcomes(path, "0123456789ab") == {}
    reused = replace(PASSED, cell="3.11/x", same_as=PASSED.cell, versions={"numpy": "2.5.0"})
    write_report(report(PASSED, reused), path)
    kept = read_outcomes(path, "0123456789ab")
    same = {name: replace(one, steps=tuple(one.steps)) for name, one in kept.items()}
    assert same == {PASSED.cell: PASSED, "3.11/x": reused}
    assert read_outcomes(path, "another code") == {}
    for text, reason in (('{"format": "blt-edge matrix 0"}', "delete it"), ("[", "no report of the matrix")):
        path.write_text(text)
        with pytest.raises(MatrixError, match=reason):
            read_outcomes(path, "0123456789ab")
