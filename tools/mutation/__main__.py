"""Mutation testing of the modules that decide what a model computes: small wrong changes, one by one.

    python -m blt_edge.tools.mutation [MODULE ...] [--sample N] [--jobs N]

runs a module's tests against every mutant of it (`operators`), each in a forked process (`runner`) in which
the module is compiled from the changed tree. A mutant that no test notices has survived: the tests lack
something, or the change is none (`equivalents.json` lists those, each with the reason).

Why not a library: mutmut 3.8 leaves out properties, class bodies and whatever runs at import, drops neither
statements nor operands, and fills the list of survivors with messages and arguments turned into None;
cosmic-ray 8 starts Python and pytest anew for every mutant, which takes longer here than the tests.

Prints a table of modules and the survivors that are not known to be equivalent; exits with 1 when there are
any. With `--json` every mutant's result is written to a file, module by module.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import runner
from .operators import Mutant, mutants

_RUNTIME = (
    *("cache", "hashing", "fields", "sampling", "scoring"),
    *("patching", "sequence", "speculation", "generation"),
)
_GRAPHS = ("rope", "config", "layers", "stages")
TARGETS = (*(f"runtime.{name}" for name in _RUNTIME), *(f"graphs.{name}" for name in _GRAPHS))
"""The tests that a module has to answer to are those beside it, and these:"""
_FURTHER = {"runtime.scoring": ("runtime/test_model",), "graphs.layers": ("graphs/test_stages",)}
_ROOT = Path(__file__).resolve().parents[2]
_EQUIVALENTS = Path(__file__).with_name("equivalents.json")
_COLUMNS = ("module", "mutants", "killed", "survived", "equivalent", "score")
_ROW = "| {:22} | {:>7} | {:>6} | {:>8} | {:>10} | {:>7} |"

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m blt_edge.tools.mutation", description=__doc__)
    add = parser.add_argument
    add("modules", nargs="*", metavar="MODULE", help="such as runtime.cache; default all")
    add("--sample", type=int, metavar="N", help="only N mutants of each module, always the same")
    add("--survivors", metavar="FILE", help="JSON of an earlier run: what was killed there is not run again")
    add("--jobs", type=int, default=1, metavar="N", help="processes at a time; default 1")
    add("--json", metavar="FILE", help="write every mutant's result; up to date after every module")
    arguments = parser.parse_args()
    targets = arguments.modules or TARGETS
    for target in targets:
        if target not in TARGETS:
            parser.error(f"{target} is no module to mutate; known are {', '.join(TARGETS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # leaves no process behind
    runner.preload()
    results: dict[str, list[Row]] = {}
    for target in targets:
        began = time.monotonic()
        results[target] = _run(target, arguments)
        if arguments.json:
            file = Path(arguments.json)
            everything = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({**everything, target: results[target]}, indent=1) + "\n")
        print(f"{_line(target, results[target])} {time.monotonic() - began:.0f} s", flush=True)
    print(_ROW.format(*_COLUMNS), _ROW.format(*["---"] * len(_COLUMNS)), sep="\n")
    for target, rows in results.items():
        print(_line(target, rows))
    return int(any(row["status"] in ("survived", "uncovered") for rows in results.values() for row in rows))


def _line(target: str, rows: list[Row]) -> str:
    count = Counter(row["status"] for row in rows)
    killed, left = count["killed"], count["survived"] + count["uncovered"]
    score = f"{100 * killed / max(1, killed + left):.1f} %"
    return _ROW.format(f"`{target}`", len(rows), killed, left, count["equivalent"], score)


def _run(target: str, arguments: argparse.Namespace) -> list[Row]:
    path = _ROOT / f"{target.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(), str(path))
    chosen = mutants(tree)
    # Reasons by function, statement and change; the file groups changes that share a reason.
    known: dict[tuple[str, str, str], str] = {
        (function, was, becomes): group["reason"]
        for group in json.loads(_EQUIVALENTS.read_text())
        if group["module"] == target
        for function, was, becomes in group["mutants"]
    }
    for function, was, becomes in set(known) - {mutant.key for mutant in chosen}:
        print(f"{_EQUIVALENTS.name}: {target} {function}: no such mutant: {was.strip()} -> {becomes.strip()}")
    if arguments.sample and arguments.sample < len(chosen):
        kept = random.Random(0).sample(range(len(chosen)), arguments.sample)
        chosen = [chosen[place] for place in sorted(kept)]
    before = json.loads(Path(arguments.survivors).read_text()) if arguments.survivors else {}
    rows: list[Row] = [row for row in before.get(target, []) if row["status"] == "killed"]
    killed = {(row["function"], row["was"], row["becomes"]) for row in rows}
    chosen = [mutant for mutant in chosen if mutant.key not in killed]
    beside = (target.replace(".", "/test_"), *_FURTHER.get(target, ()))
    files = [f"tests/{name}.py" for name in beside if (_ROOT / f"tests/{name}.py").exists()]
    baseline = runner.measure(path, files)

    def done(mutant: Mutant, status: str, test: str) -> None:
        function, was, becomes = mutant.key
        line, reason = mutant.lines.start, ""
        if status in ("survived", "uncovered"):
            reason = known.get(mutant.key, "")
            status = "equivalent" if reason else status
        row = {"line": line, "function": function, "was": was, "becomes": becomes}
        rows.append({**row, "status": status, "reason": reason, "test": test})
        if status in ("survived", "uncovered"):
            print(f"{target}:{line} {function}: {status}\n    - {was.strip()}\n    + {becomes.strip()}")
        elif sys.stderr.isatty():
            print(f"\r{target}: {len(rows)} of {len(chosen)}", end="", file=sys.stderr, flush=True)

    runner.run(f"blt_edge.{target}", path, tree, chosen, baseline, arguments.jobs, done)
    return rows


if __name__ == "__main__":
    sys.exit(main())
