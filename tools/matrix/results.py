"""What came of the cells, and the JSON file that keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .plan import Plan
from .steps import Done, Verdict

__all__ = ["Outcome", "Report", "ReportError", "read_outcomes", "write_report"]

_FORMAT = "blt-edge matrix 1"


class ReportError(Exception):
    """A file that is no report of this version."""


@dataclass(frozen=True)
class Outcome:
    """What came of one cell."""

    cell: str
    """Its name."""
    verdict: Verdict
    step: str = ""
    """The step that decided; "" for a pass."""
    line: str = ""
    """What that step said."""
    seconds: float = 0.0
    same_as: str | None = None
    """The cell with the same versions of everything that was run in its place."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Every package that pip chose."""
    steps: Sequence[Done] = ()

    def __str__(self) -> str:
        told = f"{self.verdict.value}, {self.seconds:.0f} s"
        if self.same_as:
            told += f", of {self.same_as} with the same versions"
        return f"{told}; {self.step}: {self.line}" if self.step else told


@dataclass(frozen=True)
class Report:
    """A run of the matrix, or of parts of it."""

    blt_edge: str
    """The version."""
    digest: str
    """Of the wheel and of the steps: what passed others is not kept."""
    day: str
    """Such as 2026-11-28."""
    machine: str
    interpreters: Mapping[str, str]
    """Versions by minor release."""
    plan: Plan
    outcomes: Mapping[str, Outcome]
    """By the cell's name."""


def write_report(report: Report, path: Path) -> None:
    """Write the JSON, whole or not at all."""
    document = {"format": _FORMAT, **asdict(report)}
    document["outcomes"] = list(document["outcomes"].values())
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def read_outcomes(path: Path, digest: str) -> dict[str, Outcome]:
    """Outcomes by cell of an earlier run; {} where there is none, or it was of another digest.

    Raises ReportError.
    """
    if not path.exists():
        return {}
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        if document["format"] != _FORMAT:
            raise ReportError(f"{path}: its format is {document['format']!r}, not {_FORMAT!r}; delete it")
        if document["digest"] != digest:
            return {}
        return {entry["cell"]: _outcome(entry) for entry in document["outcomes"]}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ReportError(
            f"{path}: no report of the matrix ({error}); delete it or give another --json"
        ) from error


def _outcome(entry: dict[str, Any]) -> Outcome:
    return Outcome(
        **{**entry, "verdict": Verdict(entry["verdict"]), "steps": [Done(**step) for step in entry["steps"]]}
    )
