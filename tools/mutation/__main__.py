"""The modules that are mutated, and the tests that each has to answer to: those beside it.

The command: mutants of the named modules, or of all, and whether the tests notice each.

Prints a table of modules and the survivors that are not known to be equivalent; exits with 1 when there are
any. With `--json` everything is written to a file, module by module.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import runner
from .operators import Mutant, mutants

__all__ = ["TARGETS", "tests_of"]

_STAGES = ("graphs/test_stages",)
_CONFIG = ("graphs/test_config",)

TARGETS: dict[str, tuple[str, ...]] = {
    "runtime.cache": ("runtime/test_cache",),
    "runtime.hashing": ("runtime/test_hashing",),
    "runtime.sampling": ("runtime/test_sampling",),
    "runtime.scoring": ("runtime/test_scoring", "runtime/test_model"),
    "runtime.patching": ("runtime/test_patching",),
    "runtime.sequence": ("runtime/test_sequence",),
    "runtime.speculation": ("runtime/test_speculation",),
    "runtime.generation": ("runtime/test_generation",),
    "graphs.rope": ("graphs/test_rope",),
    "graphs.config": _CONFIG,
    "graphs._fields": ("graphs/test_fields",),
    "graphs._inert": _CONFIG,
    "graphs.layers": _STAGES,
    "graphs.latent": _STAGES,
    "graphs.decoder": _STAGES,
    "graphs.encoder": _STAGES,
    "graphs.patcher": _STAGES,
    "graphs.stages": _STAGES,
    "graphs.weights": _STAGES,
}


def tests_of(target: str) -> list[str]:
    """Paths of the target's tests from the project's root."""
    return [f"tests/{name}.py" for name in TARGETS[target]]


_ROOT = Path(__file__).resolve().parents[2]
_EQUIVALENTS = Path(__file__).with_name("equivalents.json")


@dataclass
class _Result:
    """One module's mutants."""

    target: str
    rows: list[dict[str, Any]]
    seconds: float

    def count(self, *statuses: str) -> int:
        return sum(row["status"] in statuses for row in self.rows)

    def line(self) -> str:
        every, equivalent = len(self.rows), self.count("equivalent")
        killed = self.count("killed", "timeout")
        score = 100 * killed / max(1, every - equivalent)
        survived = every - killed - equivalent
        name = f"`{self.target}`"
        return f"| {name:22} | {every:7} | {killed:6} | {survived:8} | {equivalent:10} | {score:6.1f} % |"


def _known() -> dict[tuple[str, str, str, str], str]:
    """Reasons by module, function, statement and change; the file groups changes that share a reason."""
    return {
        (group["module"], function, was, becomes): group["reason"]
        for group in json.loads(_EQUIVALENTS.read_text())
        for function, was, becomes in group["mutants"]
    }


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["function"], row["was"], row["becomes"]


def _run(target: str, arguments: argparse.Namespace) -> _Result:
    began = time.monotonic()
    path = _ROOT / f"{target.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(), str(path))
    chosen = mutants(tree)
    if arguments.function:
        chosen = [mutant for mutant in chosen if mutant.function.startswith(arguments.function)]
    if arguments.sample and arguments.sample < len(chosen):
        kept = set(random.Random(0).sample(range(len(chosen)), arguments.sample))
        chosen = [mutant for place, mutant in enumerate(chosen) if place in kept]
    known = _known()
    rows: list[dict[str, Any]] = []
    if arguments.survivors:
        before = json.loads(Path(arguments.survivors).read_text()).get(target, [])
        there = {mutant.key for mutant in chosen}
        rows = [row for row in before if row["status"] in ("killed", "timeout") and _key(row) in there]
        killed = {_key(row) for row in rows}
        chosen = [mutant for mutant in chosen if mutant.key not in killed]
    files = [name for name in tests_of(target) if (_ROOT / name).exists()]
    # Lines are traced under the name that the module is imported by, which may lead through a link.
    module = f"blt_edge.{target}"
    place = _imported_from(module)
    baseline = runner.measure(place, files)

    def done(mutant: Mutant, outcome: runner.Outcome) -> None:
        status, reason = outcome.status, ""
        if status in ("survived", "uncovered"):
            reason = known.get((target, *mutant.key), "")
            status = "equivalent" if reason else status
        rows.append(
            {
                "line": mutant.line,
                "function": mutant.function,
                "was": mutant.was,
                "becomes": mutant.becomes,
                "status": status,
                "reason": reason,
                "test": outcome.test,
                "seconds": outcome.seconds,
            }
        )
        if status in ("survived", "uncovered"):
            print(f"{target}:{mutant.line} {mutant.function}: {status}", flush=True)
            print(f"    - {mutant.was.strip()}\n    + {mutant.becomes.strip()}", flush=True)
        elif sys.stderr.isatty():
            print(f"\r{target}: {len(rows)} of {len(chosen)}", end="", file=sys.stderr, flush=True)

    runner.run(module, place, tree, chosen, files, baseline, arguments.jobs, done)
    return _Result(target, rows, time.monotonic() - began)


def _imported_from(module: str) -> Path:
    """The path that the module would be imported from; nothing of the project is imported."""
    package, _, name = module.rpartition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / f"{name}.py"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m blt_edge.tools.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as runtime.cache; default all")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="only N mutants of each module, always the same"
    )
    parser.add_argument("--function", metavar="NAME", help="only those of functions whose name begins so")
    parser.add_argument(
        "--survivors",
        metavar="FILE",
        help="take killed mutants from this JSON file of an earlier run, run the rest",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time; default 1")
    parser.add_argument("--json", metavar="FILE", help="write every mutant's result; kept up to date")
    arguments = parser.parse_args()
    targets = arguments.modules or list(TARGETS)
    for target in targets:
        if target not in TARGETS:
            parser.error(f"{target} is no module to mutate; known are {', '.join(TARGETS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # leaves no process behind
    runner.preload()
    results = []
    for target in targets:
        result = _run(target, arguments)
        results.append(result)
        if arguments.json:
            file = Path(arguments.json)
            everything = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({**everything, target: result.rows}, indent=1) + "\n")
        print(f"{result.line()} {result.seconds:.0f} s", flush=True)
    print(f"| {'module':22} | mutants | killed | survived | equivalent | score    |")
    print(f"|{'-' * 24}|{'-' * 9}|{'-' * 8}|{'-' * 10}|{'-' * 12}|{'-' * 10}|")
    for result in results:
        print(result.line())
    return int(any(result.count("survived", "uncovered") for result in results))


if __name__ == "__main__":
    sys.exit(main())
