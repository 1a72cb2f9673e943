"""Cells one after another: install, run, judge."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...export.golden import read_golden
from .environments import Environment, InstallError, Wheel, extras
from .interpreters import Interpreter
from .plan import Cell
from .results import Outcome
from .steps import Verdict, judge, run_steps, steps_for

__all__ = ["run_cells"]

Say = Callable[[str], None]
Signature = tuple[object, ...]


def run_cells(
    cells: Sequence[Cell],
    wheel: Wheel,
    interpreters: Mapping[str, Interpreter],
    cache: Path,
    torch: str,
    earlier: Sequence[tuple[Cell, Outcome]],
    say: Say,
) -> Iterator[Outcome]:
    """The outcome of each cell, in their order.

    torch: the version for cells with transformers.
    earlier: what need not be run again where it had the same versions.
    """
    environments: dict[tuple[str, bool], Environment] = {}
    known = {_signature(cell, outcome.versions): outcome for cell, outcome in earlier}
    for number, cell in enumerate(cells, 1):
        say(f"[{number}/{len(cells)}] {cell.name}")
        interpreter = interpreters.get(cell.python)
        if interpreter is None:
            yield Outcome(cell.name, Verdict.MISSING, "install", f"no Python {cell.python} on this machine")
            continue
        started = time.monotonic()
        try:
            key = cell.python, cell.with_torch
            if key not in environments:
                say(f"    environment of Python {interpreter.version}")
                environments[key] = Environment(cache, interpreter, wheel, torch if cell.with_torch else None)
            outcome = _run_cell(cell, environments[key], known)
        except InstallError as error:
            outcome = Outcome(cell.name, Verdict.FAIL, "install", str(error))
        yield replace(outcome, seconds=round(time.monotonic() - started, 1))


def _run_cell(cell: Cell, environment: Environment, known: dict[Signature, Outcome]) -> Outcome:
    prepared = environment.prepare(cell)
    # Most packages' newest release is what pip takes anyway: those cells are one.
    signature = _signature(cell, prepared.versions)
    if signature in known:
        same = known[signature]
        return replace(same, cell=cell.name, same_as=same.same_as or same.cell)
    golden = read_golden(prepared.golden)
    with tempfile.TemporaryDirectory(prefix="blt-edge-matrix-") as folder:
        done = run_steps(steps_for(cell, prepared, golden), prepared, golden, Path(folder))
    verdict, step, line = judge(cell.kind, done)
    outcome = Outcome(cell.name, verdict, step, line, versions=prepared.versions, steps=done)
    known[signature] = outcome
    return outcome


def _signature(cell: Cell, versions: Mapping[str, str]) -> Signature:
    return cell.python, extras(cell), *versions.items()
