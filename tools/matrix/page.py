"""The page docs/compatibility.md, and the summary on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from packaging.version import Version

from .plan import Cell, Kind
from .run import Report, Verdict

_WORDS = {Verdict.PASS: "passes", Verdict.REFUSED: "refused", Verdict.FAIL: "**fails**"}
_NOT_RUN = "not run"
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
    """The page in Markdown."""
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
    by_place = {(_minor(cell.version), cell.python): cell for cell in cells}
    minors = sorted({_minor(cell.version) for cell in cells}, key=Version, reverse=True)
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
        return "missing" if cell.python in report.plan.missing else _NOT_RUN
    return _WORDS.get(outcome.verdict, outcome.verdict.value)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _plain(line: str) -> str:
    # An engine's message may be a thousand characters; the JSON has all of it.
    shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
    return shown.replace("`", "'").replace("|", "\\|")


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
