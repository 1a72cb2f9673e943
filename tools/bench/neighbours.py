"""What do threads cost beside other work?

Theory: a stage's threads wait for each other after every product. One that waits by computing keeps whoever
has the missing part from the processor, so on a busy machine more threads are slower, unless they give the
processor up soon. Models with every number of threads and several bounds on that waiting take the same text
in turns, beside none, one, and as many busy neighbours as there are cores; bytes a second are printed.

    python -m blt_edge.tools.bench.neighbours --bundle demo-bundle --text FILE
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...runtime import BltModel, GenerationOptions
from ...runtime.backends import ort_session as ort
from ...runtime.processors import usable_cores
from ..profile.statistics import Spread, machine
from ..tables import print_table
from .common import options, print_json

# What ONNX Runtime does when nothing is said: it waits by computing for as long as it takes.
_UNBOUNDED = "10000000"
_PROMPT_BYTES = 400


def main() -> None:
    cores = usable_cores()
    parser = options(__doc__, rounds=7, threads=cores)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--new-bytes", type=int, default=100)
    parser.add_argument("--spin", nargs="*", default=["20", "100", "500", _UNBOUNDED], help="microseconds")
    args = parser.parse_args()

    cases = {"1 thread": _load(args.bundle, 1, ort.SPIN_MICROSECONDS)}
    for spin in sorted({*args.spin, ort.SPIN_MICROSECONDS}, key=int):
        waits = "waits without bound" if spin == _UNBOUNDED else f"waits {spin} us"
        cases[f"{args.threads} threads, {waits}"] = _load(args.bundle, args.threads, spin)
    prompt = args.text.read_bytes()[1000 : 1000 + _PROMPT_BYTES]
    wanted = GenerationOptions(max_new_bytes=args.new_bytes, draft="none")
    print(f"{machine()}; {cores} cores; {args.rounds} rounds of {args.new_bytes} bytes; {args.bundle}")
    columns: dict[str, dict[str, list[float]]] = {}
    for count in sorted({0, 1, cores}):
        measured: dict[str, list[float]] = {name: [] for name in cases}
        with _neighbours(count):
            for _ in range(args.rounds):
                for name, model in cases.items():
                    measured[name].append(model.generate(prompt, wanted).stats.bytes_per_second)
        columns[f"{count} neighbours"] = measured
    rows = [(name, *(f"{Spread.of(each[name])}" for each in columns.values())) for name in cases]
    print_table(("bytes/s", *(f">{name}" for name in columns)), rows, sys.stdout)
    print_json(
        {
            "benchmark": "neighbours",
            "bytes_per_second": {
                column: {name: Spread.of(values).to_dict() for name, values in each.items()}
                for column, each in columns.items()
            },
        }
    )


def _load(bundle: Path, threads: int, spin: str) -> BltModel:
    usual, ort.SPIN_MICROSECONDS = ort.SPIN_MICROSECONDS, spin
    try:
        return BltModel.load(bundle, "cpu", threads)
    finally:
        ort.SPIN_MICROSECONDS = usual


@contextmanager
def _neighbours(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
