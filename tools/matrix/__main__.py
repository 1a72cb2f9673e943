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
from dataclasses import replace
from datetime import date
from pathlib import Path

from ..profile.statistics import machine
from .environments import build_wheel, find
from .page import render, summary
from .plan import Claims, MatrixError, Releases, make_plan, select
from .run import Report, Verdict, read_outcomes, run_cells, steps_digest, write_report

_CHECKOUT = Path(__file__).resolve().parents[2]
_KEPT = (Verdict.PASS, Verdict.REFUSED)


def main() -> None:
    """Command-line entry."""
    args = _parser().parse_args()
    try:
        sys.exit(_matrix(args))
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
    torch = _pinned_torch()
    this_python = f"{sys.version_info.major}.{sys.version_info.minor}"
    claims = Claims.of_metadata(wheel.metadata, ("cpu", "export", "validate"))
    plan = make_plan(claims, Releases(), interpreters, this_python, torch)
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
    kept = [(cell, outcome) for cell, outcome in there if outcome.verdict in _KEPT]
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


def _pinned_torch() -> str:
    """The only torch that is tried: others are gigabytes, for GPUs."""
    file = _CHECKOUT / "constraints.txt"
    pinned = re.search(r"^torch==(\S+)", file.read_text(), re.M)
    if pinned is None:
        raise MatrixError(f"{file}: no line torch==VERSION, which says what transformers is tried with")
    return pinned[1]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
