"""The command; see the package."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import __doc__ as about
from .bundles import Engines, Graphs, ManifestFile
from .constraints import Constraints
from .server import Chats, Connections, Requests
from .states import States
from .targets import Calibration, Config, Files, Generation, Golden, Index, Meta, Pickle, Safetensors, Target
from .worker import Outcome, make, run

TARGETS: dict[str, type[Target]] = {
    kind.name: kind
    for kind in (
        *(ManifestFile, Graphs, Engines, Config, Generation, Safetensors, Index, Golden, Meta, Pickle),
        *(Calibration, Requests, Chats, Connections, States, Constraints),
    )
}
_ROW = "{:12} {:>8} {:>9} {:>8} {:>7} {:>8} {:>8}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m blt_edge.tools.fuzz",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default all")
    add("--seed", type=int, default=1, metavar="N", help="what inputs are made from; default 1")
    add("--count", type=int, metavar="N", help="inputs of each target; default 100,000 where they are cheap")
    add("--quick", action="store_true", help="as many inputs as the tests try, in a minute")
    add("--at", type=int, metavar="N", help="only the input of this number")
    add("--replay", type=Path, metavar="DIR", help="only an input that was saved")
    add("--save", type=Path, default=Path("fuzz-faults"), metavar="DIR", help="for inputs that fail")
    add("--jobs", type=int, default=1, metavar="N", help="targets at a time; default 1")
    arguments = parser.parse_args()
    for name in arguments.targets:
        if name not in TARGETS:
            parser.error(f"there is no target {name}; there are {', '.join(TARGETS)}")
    if (arguments.replay or arguments.at is not None) and len(arguments.targets) != 1:
        parser.error("one input is of one target: give its name")
    given = None if arguments.replay is None else _read(arguments.replay)
    if given == {}:
        parser.error(f"{arguments.replay} holds no input; give a directory that --save named")
    chosen = [TARGETS[name]() for name in arguments.targets or TARGETS]
    print(f"seed {arguments.seed}, {os.cpu_count()} cores of {_processor()}", flush=True)
    print(_ROW.format("target", "inputs", "accepted", "refused", "failed", "seconds", "peak MB"), flush=True)

    def attack(target: Target) -> bool:
        count = arguments.count or (target.quick if arguments.quick else target.count)
        numbers = range(count) if arguments.at is None else [arguments.at]

        def told(done: int) -> None:
            if sys.stderr.isatty():
                print(f"\r{target.name}: {done} of {len(numbers)} ", end="\r", file=sys.stderr, flush=True)

        outcome = run(target, arguments.seed, numbers if given is None else [-1], given, told)
        _show(target, outcome)
        _save(target, outcome, arguments.seed, arguments.save, given)
        return not outcome.faults

    with ThreadPoolExecutor(arguments.jobs) as pool:
        return int(not all(list(pool.map(attack, chosen))))


def _show(target: Target, outcome: Outcome) -> None:
    failed = outcome.inputs - outcome.accepted - outcome.refused
    counts = (outcome.inputs, outcome.accepted, outcome.refused, failed)
    row = _ROW.format(target.name, *counts, f"{outcome.seconds:.0f}", f"{outcome.peak / 1e6:.0f}")
    print(row if not outcome.skipped else f"{target.name:12} skipped, needs {outcome.skipped}", flush=True)


def _save(target: Target, outcome: Outcome, seed: int, folder: Path, given: Files | None) -> None:
    """Write the first input of each fault, and say how to run it again."""
    first = [fault.numbers[0] for fault in outcome.faults.values()]
    made = make(target, seed, first) if first and given is None else {}
    for fault in outcome.faults.values():
        number = fault.numbers[0]
        print(f"{target.name}: {len(fault.numbers)} x {fault.what}", flush=True)
        if given is not None:
            print(fault.trace)
            continue
        place = folder / f"{target.name}-{seed}-{number}"
        for name, data in made.get(number, {}).items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        place.mkdir(parents=True, exist_ok=True)
        (place / "fault.txt").write_text(f"{fault.what}\n{fault.numbers}\n\n{fault.trace}", "utf-8")
        print(f"  {place}; again: python -m blt_edge.tools.fuzz {target.name} --seed {seed} --at {number}")


def _read(folder: Path) -> Files:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "fault.txt")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _processor() -> str:
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    return models[0] if models else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
