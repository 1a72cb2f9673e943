"""Cells one after another: a cell's commands, each typed as a user would, the verdict, and the report.

The report is a JSON file, and is up to date after every cell.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from ...export.golden import Golden, read_golden
from ...runtime.files import write_whole
from ..steps import Check, Done, Step, greedy_check, run_step
from .environments import InstallError, Interpreter, Prepared, Wheel, prepare
from .plan import Cell, Kind, MatrixError, Plan

_FORMAT = "blt-edge matrix 1"
_GREEDY_BYTES = 96
_LARGEST_LOSS = 0.05
"""Bits per byte that int4 and int8 may cost the demo; they cost it less than 0.01."""
_HUB_ID = "blt-edge/demo"
"""The demo checkpoint, as if it had been fetched from the hub."""


class Verdict(str, Enum):
    """What is said of a cell."""

    PASS = "pass"
    REFUSED = "refused"
    """In one line and before any work, by `blt-edge build`, where that is what is wanted."""
    FAIL = "fail"
    MISSING = "missing"
    """No interpreter is here."""


def steps_for(cell: Cell, prepared: Prepared, golden: Golden) -> list[Step]:
    """The commands of a cell, in an empty folder with prompt.bin and text.bin of the golden file in it."""
    file = str(prepared.golden)
    if cell.with_torch:
        against = f"transformers {cell.version}"
        return [
            Step("export, validate", ("export", "demo", "-o", "b", "--json", "-"), _against(against)),
            Step("build", ("build", "b")),
            Step("validate", ("validate", "b", "--reference", "demo", "--json", "-"), _against(against)),
        ]
    portable = [
        Step("export", ("export", "demo", "-o", "b", "--no-validate")),
        Step("validate the portable graphs", ("validate", "b", "--golden", file)),
        Step(
            "generate with the portable graphs", _generate(), greedy_check(golden, _GREEDY_BYTES, built=False)
        ),
        Step("build", ("build", "b")),
    ]
    if cell.kind is Kind.BELOW:
        return portable
    text = ("--text", "text.bin", "--max-bytes", "2000", "--prompts", "0")
    few = ("--new-bytes", "8", "--prompt-bytes", "32", "--repeat", "1")
    return [
        *portable,
        Step("validate", ("validate", "b", "--golden", file)),
        Step("generate", _generate(), greedy_check(golden, _GREEDY_BYTES, built=True)),
        Step("quantize to int4", ("quantize", "b", "-o", "b4", "--precision", "int4")),
        Step("build int4", ("build", "b4")),
        Step("quantize to int8", ("quantize", "b", "-o", "b8", "--precision", "int8", "--windows", "4")),
        Step("build int8", ("build", "b8")),
        Step("compare", ("compare", "b", "b4", "b8", *text, *few, "--json", "-"), _loss),
        Step("export a hub id", ("export", _HUB_ID, "-o", "bh", "--no-validate")),
    ]


def steps_digest() -> str:
    """Of their modules, 6 hexadecimal digits: who passed fewer or other steps has not passed these."""
    modules = (Path(__file__), Path(inspect.getfile(Step)))
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()[:6]


def run_steps(steps: Sequence[Step], prepared: Prepared, golden: Golden, folder: Path) -> list[Done]:
    """Run them in `folder` until one fails."""
    folder.joinpath("prompt.bin").write_bytes(golden.prompt)
    folder.joinpath("text.bin").write_bytes(golden.data)
    _fill_hub_cache(folder / "huggingface", prepared.golden.parent)
    variables = {
        **prepared.variables,
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        # torch's threads wait for each other by computing: beside other work they take many times as long.
        "OMP_NUM_THREADS": "1",
    }
    done: list[Done] = []
    for step in steps:
        done.append(run_step(step, (prepared.programs / "blt-edge",), variables, folder))
        if not done[-1].ok:
            break
    return done


def judge(kind: Kind, done: Sequence[Done]) -> tuple[Verdict, str, str]:
    """Verdict on a cell, the step that decided it ("" when it passed), and that step's line."""
    for step in done:
        if step.traceback:
            return Verdict.FAIL, step.name, f"traceback: {step.line}"
        if not step.ok:
            refused = kind is Kind.BELOW and step.name == "build" and step.exit_code and step.lines == 1
            return Verdict.REFUSED if refused else Verdict.FAIL, step.name, step.line
    return Verdict.PASS, "", ""


def _fill_hub_cache(home: Path, checkpoint: Path) -> None:
    # As snapshot_download leaves it, so that the client's own code finds it without a network.
    commit = "0" * 40
    repository = home / "hub" / f"models--{_HUB_ID.replace('/', '--')}"
    for folder in (repository / "refs", repository / "snapshots" / commit):
        folder.mkdir(parents=True)
    repository.joinpath("refs", "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        repository.joinpath("snapshots", commit, name).symlink_to(checkpoint / name)


# What a step's JSON must say.


def _generate() -> tuple[str, ...]:
    return ("generate", "-m", "b", "--prompt-file", "prompt.bin", "-n", str(_GREEDY_BYTES), "--json", "-")


def _against(name: str) -> Check:
    def check(output: str) -> str | None:
        against = json.loads(output)["validation"]["against"]
        return None if against == name else f"compared with {against}, not with {name}"

    return check


def _loss(output: str) -> str | None:
    first, *others = json.loads(output)["bundles"]
    reference = first["total"]["bits_per_byte"]
    for bundle in others:
        bits = bundle["total"]["bits_per_byte"]
        if not abs(bits - reference) <= _LARGEST_LOSS:
            return f"{bundle['path']}: {bits:.4f} bits per byte, float32 {reference:.4f}"
    return None


# The report.


@dataclass(frozen=True)
class CellResult:
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
    """Every package in its environment."""
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
    outcomes: Mapping[str, CellResult]
    """By the cell's name."""


def write_report(report: Report, path: Path) -> None:
    """Write the JSON, whole or not at all."""
    document = {"format": _FORMAT, **asdict(report)}
    document["outcomes"] = list(document["outcomes"].values())
    write_whole(path, lambda partial: partial.write_text(json.dumps(document, indent=1) + "\n"))


def read_outcomes(path: Path, digest: str) -> dict[str, CellResult]:
    """Outcomes by cell of an earlier run; {} where there is none, or it was of another digest.

    Raises MatrixError.
    """
    if not path.exists():
        return {}
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        if document["format"] != _FORMAT:
            raise MatrixError(f"{path}: its format is {document['format']!r}, not {_FORMAT!r}; delete it")
        if document["digest"] != digest:
            return {}
        return {entry["cell"]: _outcome(entry) for entry in document["outcomes"]}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise MatrixError(
            f"{path}: no report of the matrix ({error}); delete it or give another --json"
        ) from error


def _outcome(entry: dict[str, Any]) -> CellResult:
    steps = [Done(**step) for step in entry["steps"]]
    return CellResult(**{**entry, "verdict": Verdict(entry["verdict"]), "steps": steps})


# Cells.

Say = Callable[[str], None]
Signature = tuple[object, ...]


def run_cells(
    cells: Sequence[Cell],
    wheel: Wheel,
    interpreters: Mapping[str, Interpreter],
    earlier: Sequence[tuple[Cell, CellResult]],
    say: Say,
) -> Iterator[CellResult]:
    """The outcome of each cell, in their order.

    earlier: what need not be run again where it had the same versions.
    """
    known = {_signature(cell, outcome.versions): outcome for cell, outcome in earlier}
    for number, cell in enumerate(cells, 1):
        say(f"[{number}/{len(cells)}] {cell.name}")
        interpreter = interpreters.get(cell.python)
        if interpreter is None:
            yield CellResult(
                cell.name, Verdict.MISSING, "install", f"no Python {cell.python} on this machine"
            )
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="blt-edge-matrix-") as folder:
            try:
                outcome = _run_cell(cell, prepare(cell, interpreter, wheel, Path(folder, "env")), known)
            except InstallError as error:
                outcome = CellResult(cell.name, Verdict.FAIL, "install", str(error))
        yield replace(outcome, seconds=round(time.monotonic() - started, 1))


def _run_cell(cell: Cell, prepared: Prepared, known: dict[Signature, CellResult]) -> CellResult:
    # Most packages' newest release is what is taken anyway: those cells are one.
    signature = _signature(cell, prepared.versions)
    if signature in known:
        same = known[signature]
        return replace(same, cell=cell.name, same_as=same.same_as or same.cell)
    golden = read_golden(prepared.golden)
    with tempfile.TemporaryDirectory(prefix="blt-edge-matrix-") as folder:
        done = run_steps(steps_for(cell, prepared, golden), prepared, golden, Path(folder))
    verdict, step, line = judge(cell.kind, done)
    known[signature] = CellResult(cell.name, verdict, step, line, versions=prepared.versions, steps=done)
    return known[signature]


def _signature(cell: Cell, versions: Mapping[str, str]) -> Signature:
    return cell.python, cell.extras, *versions.items()
