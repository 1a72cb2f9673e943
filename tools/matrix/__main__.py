"""Tries the project on Pythons and on versions of the packages that it needs, and writes what came of it.

Theory: a claim like "Python 3.10 or newer, ONNX Runtime 1.22 or newer" is worth what was tried. A cell is
one combination of versions: the project's wheel is installed as a user installs it, and in an empty folder a
bundle is exported, built, validated, generated from, quantized to int4 and int8, and compared.

Cells: every Python from the claimed minimum on with the newest patch release of every minor ONNX Runtime from
the claimed minimum on; two releases below it, which are to be refused in one line; every other package at its
claimed minimum and at its newest; every package at its claimed minimum at once. Releases are asked of pip;
environments are made by uv.
An interpreter that this machine lacks is said to be missing.

    python -m blt_edge.tools.matrix --page docs/compatibility.md
    python -m blt_edge.tools.matrix --only corners

Progress goes to stderr, the summary to stdout. Exits 1 when a cell fails, 2 when nothing could be tried.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from packaging.version import Version

from ..profile.statistics import machine
from .environments import build_wheel, find, minor_of
from .plan import Cell, Claims, Kind, MatrixError, Releases, make_plan, select
from .run import Report, Verdict, read_outcomes, run_cells, steps_digest, write_report

_WORDS = {Verdict.PASS: "passes", Verdict.REFUSED: "refused", Verdict.FAIL: "**fails**"}
_NO_WHEEL = "-"
_SHOWN = 240
"""Characters of a line that a step wrote."""


def summary(report: Report, cells: Sequence[Cell]) -> str:
    """Every cell that did not pass, and how many did what."""
    outcomes = [report.outcomes[cell.name] for cell in cells if cell.name in report.outcomes]
    others = [outcome for outcome in outcomes if outcome.verdict is not Verdict.PASS]
    told = [f"{o.cell}: {o.verdict.value}: {o.step}: {_plain(o.line)}" for o in others]
    counts = (f"{sum(o.verdict is verdict for o in outcomes)} {verdict.value}" for verdict in Verdict)
    return "\n".join([*told, f"{len(outcomes)} cells: {', '.join(counts)}"])


def render(report: Report) -> str:
    parts = [_head(report), _grid(report), _packages(report), _exceptions(report), _how(report)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(report: Report) -> str:
    pythons = ", ".join(report.interpreters[minor] for minor in report.interpreters)
    return f"""# Compatibility

What blt-edge was run with, written by `make matrix` on {report.day}: blt-edge {report.blt_edge} (code
`{report.digest}`) on {report.machine}, CPython {pythons}.

A combination passes when the wheel installs with those versions, and then the demo model is exported,
validated as portable graphs, built, validated as built, continues a text as transformers does, is quantized
to `int4` and `int8` and built as both, is within 0.05 bits per byte of float32 as either in `compare`, and is
exported by hub id from huggingface-hub's cache; with no traceback anywhere. All other versions
are the newest that go together."""


def _grid(report: Report) -> str:
    cells = [cell for cell in report.plan.cells if cell.kind in (Kind.GRID, Kind.BELOW)]
    by_place = {(minor_of(cell.version), cell.python): cell for cell in cells}
    minors = sorted({minor_of(cell.version) for cell in cells}, key=Version, reverse=True)
    rows = []
    for minor in minors:
        here = [by_place.get((minor, python)) for python in report.plan.pythons]
        versions = sorted({cell.version for cell in here if cell}, key=Version)
        rows.append([", ".join(versions), *(_word(report, cell) for cell in here)])
    return "\n\n".join(
        [
            "## Python and ONNX Runtime",
            _table(["ONNX Runtime", *(f"Python {python}" for python in report.plan.pythons)], rows),
            f"{_NO_WHEEL}: no wheel of ONNX Runtime for that Python, or one below the claimed minimum; "
            "missing: the machine had no such interpreter.",
        ]
    )


def _packages(report: Report) -> str:
    cells = [cell for cell in report.plan.cells if cell.kind in (Kind.MINIMUM, Kind.NEWEST)]
    rows = []
    for package in dict.fromkeys(cell.package for cell in cells):
        row = [package]
        for kind in (Kind.MINIMUM, Kind.NEWEST):
            (cell,) = (cell for cell in cells if cell.package == package and cell.kind is kind)
            row += [f"{cell.version} on Python {cell.python}", _word(report, cell)]
        rows.append(row)
    (together,) = (cell for cell in report.plan.cells if cell.kind is Kind.ALL_MINIMUMS)
    pins = ", ".join(f"{package} {version}" for package, version in together.pins)
    torch = next((dict(cell.pins)["torch"] for cell in cells if cell.with_torch), None)
    with_torch = (
        f"transformers is tried as the reference of `export` and `validate`, with torch {torch} only; other "
        "releases of torch have not been tried."
    )
    return "\n\n".join(
        [
            "## Other packages",
            "Each at its claimed minimum and at its newest, with the newest of all others:",
            _table(["package", "minimum", "", "newest", ""], rows),
            f"All minimums at once on Python {together.python}: {_word(report, together)} ({pins}).",
            *([with_torch] if torch else []),
            "The extras for GPUs, the server, plots, Optimum and benchmarks are not part of this.",
        ]
    )


def _exceptions(report: Report) -> str:
    outcomes = [report.outcomes[cell.name] for cell in report.plan.cells if cell.name in report.outcomes]
    told = [o for o in outcomes if o.verdict in (Verdict.FAIL, Verdict.REFUSED)]
    if not told:
        return ""
    rows = [[o.cell, _WORDS[o.verdict], o.step, f"`{_plain(o.line)}`"] for o in told]
    return "\n\n".join(["## What does not pass", _table(["cell", "", "at", "what it says"], rows)])


def _how(report: Report) -> str:
    count, seconds = len(report.outcomes), sum(outcome.seconds for outcome in report.outcomes.values())
    missing = (
        f"Missing on the machine: Python {', '.join(report.plan.missing)}."
        if report.plan.missing
        else "No interpreter was missing."
    )
    return f"""## Trying it again

    make matrix

writes this page; {count} of {len(report.plan.cells)} cells took {seconds / 60:.0f} minutes. {missing}
Interpreters are looked for on `PATH` and in pyenv; packages are kept in uv's cache.
Continuous integration runs the corners, `make matrix ONLY=corners`: the oldest Python with its newest ONNX
Runtime, the newest Python with the newest, and every package at its minimum."""


def _word(report: Report, cell: Cell | None) -> str:
    if cell is None:
        return _NO_WHEEL
    outcome = report.outcomes.get(cell.name)
    if outcome is None:
        return "missing" if cell.python in report.plan.missing else "not run"
    return _WORDS.get(outcome.verdict, outcome.verdict.value)


def _plain(line: str) -> str:
    # An engine's message may be a thousand characters; the JSON has all of it.
    shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
    return shown.replace("`", "'").replace("|", "\\|")


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_CHECKOUT = Path(__file__).resolve().parents[2]


def main() -> None:
    try:
        sys.exit(_matrix(_parser().parse_args()))
    except MatrixError as error:
        print(f"matrix: error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="matrix", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--only",
        action="append",
        default=[],
        metavar="corners|PATTERN",
        help="cells of continuous integration, or those whose name matches, such as '3.11/*'; repeatable",
    )
    add("--list", action="store_true", help="print the cells' names and run none")
    add("--python", action="append", default=[], type=Path, metavar="PATH", help="an interpreter; repeatable")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "blt-edge" / "matrix"
    add("--cache", type=Path, default=cache, help="folder of the wheel and of what came of the cells")
    add("--json", type=Path, help="what came of every cell; default: matrix.json in the cache")
    add("--resume", action="store_true", help="keep what passed in the JSON, if it was of the same code")
    add("--page", type=Path, help="also write what the JSON has as a page in Markdown")
    return parser


def _matrix(args: argparse.Namespace) -> int:
    cache: Path = args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    file: Path = args.json or cache / "matrix.json"
    # 1. What is there, and what is to be tried.
    interpreters = find(args.python)
    wheel = build_wheel(_CHECKOUT, cache / "wheel")
    # The only torch that is tried: others are gigabytes, for GPUs.
    constraints = _CHECKOUT / "constraints.txt"
    pinned = re.search(r"^torch==(\S+)", constraints.read_text(), re.M)
    if pinned is None:
        raise MatrixError(
            f"{constraints}: no line torch==VERSION, which says what transformers is tried with"
        )
    this_python = f"{sys.version_info.major}.{sys.version_info.minor}"
    claims = Claims.of_metadata(wheel.metadata, ("cpu", "export", "validate"))
    plan = make_plan(claims, Releases(), interpreters, this_python, pinned[1])
    cells = select(plan.cells, args.only)
    if args.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    for minor in plan.missing:
        _say(f"Python {minor}: missing on this machine, its cells are not tried")
    # 2. Trying it. The file is up to date after every cell: a run that is cut short goes on with --resume.
    digest = f"{wheel.digest}-{steps_digest()}"
    earlier = read_outcomes(file, digest) if args.resume else {}
    there = [(cell, earlier[cell.name]) for cell in plan.cells if cell.name in earlier]
    kept = [(cell, outcome) for cell, outcome in there if outcome.verdict in (Verdict.PASS, Verdict.REFUSED)]
    report = Report(
        blt_edge=wheel.version,
        digest=digest,
        day=date.today().isoformat(),
        machine=machine(),
        interpreters={minor: found.version for minor, found in interpreters.items() if minor in plan.pythons},
        plan=plan,
        outcomes={cell.name: outcome for cell, outcome in there},
    )
    passed = {cell for cell, _ in kept}
    todo = [cell for cell in cells if cell not in passed]
    for outcome in run_cells(todo, wheel, interpreters, kept, _say):
        _say(f"    {outcome}")
        report = replace(report, outcomes={**report.outcomes, outcome.cell: outcome})
        write_report(report, file)
    # 3. What is said of it.
    if args.page:
        args.page.write_text(render(report))
    print(summary(report, cells))
    return 1 if any(report.outcomes[cell.name].verdict is Verdict.FAIL for cell in cells) else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
