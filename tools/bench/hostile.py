"""What do constraints that somebody wrote to hurt cost: until they are refused, and for each byte of a text?

Theory: a constraint is compiled in a process that has a second and 256 MiB, then here, once more; what a byte
takes is bounded by llguidance's limits of a step, which are lowered (`runtime.constraint_compiler`). Each
constraint of `tools.fuzz.hostile_constraints` is followed in a process of its own, wherever its letters a and
b go, or anything allowed where they can't come. Steps are in the processor's time of the thread that decodes;
memory is the largest resident: of the process it was tried in (30 MB are Python and the library), and of the
one that followed it, beyond what that had before.

    python -m blt_edge.tools.bench.hostile
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Mapping
from random import Random
from typing import Any

from ...runtime import Constraint, GenerationOptions, OptionError, constraint_library
from ...runtime.child import Tell, run_child
from ...runtime.constraint_library import LibraryRule, compiled
from ...runtime.guide import prepare
from ...runtime.host import peak_resident, reset_peak_resident
from ..fuzz.hostile_constraints import COSTLY, REFUSED
from .common import print_json

_ROW = "{:<36} {:>9} {:>7} {:>6} {:>9} {:>9} {:>9}  {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="bytes of a text; default 10,000")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a constraint; default all")
    arguments = parser.parse_args()
    print(_ROW.format("", "ready, ms", "tried MB", "bytes", "mean, us", "worst, ms", "then, MB", "end"))
    document: dict[str, Any] = {}
    for name in arguments.names or [*REFUSED, *COSTLY]:
        outcome = run_child("blt_edge.tools.bench.hostile", {"name": name, "steps": arguments.steps})
        if outcome.result is None:
            raise SystemExit(f"{name}: its process {outcome.death or outcome.error}")
        found = document[name] = outcome.result
        figures = (found["ready_ms"], found["tried_mb"], found["bytes"], found["mean_us"], found["worst_ms"])
        print(_ROW.format(name[:36], *figures, found["mb"], found["end"][:90]), flush=True)
    print_json({"benchmark": "hostile", "steps": arguments.steps, "constraints": document})


def work(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Follow one constraint: its figures."""
    compiled(Constraint.regex("what is prepared once"))
    reset_peak_resident()
    at_first, steps, end, rule = peak_resident() or 0, [0.0], "", None
    began = time.monotonic()
    try:
        constraint = {**REFUSED, **COSTLY}[request["name"]]()
        if prepare(GenerationOptions(constraint=constraint)) is not None:
            rule = compiled(constraint)
    except OptionError as error:
        end = str(error)
    ready = time.monotonic() - began
    if rule is not None:
        steps, end = _follow(rule, request["steps"])
    grown = (peak_resident() or 0) - at_first
    constraint_library._trial.close()
    return {
        "ready_ms": round(1e3 * ready, 1),
        "tried_mb": _children_peak() >> 20,
        "bytes": len(steps) - 1,
        "mean_us": round(1e6 * sum(steps) / len(steps), 1),
        "worst_ms": round(1e3 * max(steps), 2),
        "mb": grown >> 20,
        "end": end.removeprefix("constraint: "),
    }


def _follow(rule: LibraryRule, count: int) -> tuple[list[float], str]:
    """Seconds of each step, the first 0, and what the rule says at the end."""
    random, steps = Random(1), [0.0]
    for _ in range(count):
        began = time.thread_time()
        try:
            rule.forced()
            allowed = rule.allowed().nonzero()[0].tolist()
            if not allowed:
                return steps, "the text has ended"
            letters = [byte for byte in allowed if byte in b"ab"]
            rule.advance(random.choice(letters if letters and random.random() < 0.9 else allowed))
        except OptionError as error:
            return [*steps, time.thread_time() - began], str(error)
        steps.append(time.thread_time() - began)
    return steps, "goes on"


def _children_peak() -> int:
    """Bytes of the largest process that has ended of those started here."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    main()
