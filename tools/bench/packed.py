"""What do several texts at once gain over one: bytes a second of 1, 2, 4 and 8 texts, in turns.

Theory: weights are read once for all texts of a pass, so that passes of a large model cost little more for
eight texts than for one; attention, and what the host does, are each text's own. Each text goes on in another
part of FILE, byte by byte as in decoding without drafts; passes are counted by how many texts they were for.

    python -m blt_edge.tools.bench.packed --bundle demo-bundle --text tests/data/alice.txt
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime import BltModel, Sequence
from ...runtime.names import STAGES
from ...runtime.vocabulary import byte_ids, encode
from ..profile.statistics import Spread, machine
from .common import options, print_json

_Passes = defaultdict[tuple[str, int], list[float]]


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=300, help="bytes that each text begins with")
    parser.add_argument("--bytes", type=int, default=128, help="bytes that each goes on with")
    args = parser.parse_args()
    model = BltModel.load(args.bundle, threads=args.threads)
    text, span = args.text.read_bytes(), args.context + args.bytes
    most = max(args.texts)
    if len(text) < most * span:
        parser.error(f"--text: {args.text} has {len(text)} bytes, {most} texts of {span} are needed")
    begun = []
    for number in range(most):
        first = number * (len(text) // most)
        sequence = model.sequence()
        sequence.append(encode(text[first : first + args.context]))
        begun.append((sequence, byte_ids(text[first + args.context : first + span])))
    print(f"{machine()}; {args.bundle}; engine: {model.engine}; graphs for {model.rows} texts")
    rates: dict[int, list[float]] = {count: [] for count in args.texts}
    passes: dict[int, _Passes] = {count: defaultdict(list) for count in args.texts}
    for count in args.texts:  # what is prepared once
        _rate(model, begun[:count], defaultdict(list))
    for _ in range(args.rounds):
        for count in args.texts:
            rates[count].append(_rate(model, begun[:count], passes[count]))
    least = min(args.texts)
    document: dict[str, Any] = {"benchmark": "packed", "bundle": str(args.bundle), "threads": args.threads}
    for count in args.texts:
        ratio = Spread.of([many / one for many, one in zip(rates[count], rates[least], strict=True)])
        told = {stage: _told(passes[count], stage) for stage in STAGES}
        print(f"{count} texts: {Spread.of(rates[count])} bytes a second, {ratio} times those of {least}")
        for stage, sizes in told.items():
            shown = ", ".join(
                f"{texts}: {each['ms']:.2f} ({each['passes']})" for texts, each in sizes.items()
            )
            if shown:
                print(f"    {stage:<8} texts: ms a pass (passes)  {shown}")
        document[str(count)] = {
            "bytes_per_second": Spread.of(rates[count]).to_dict(),
            "ratio": ratio.to_dict(),
            "passes": told,
        }
    print_json(document)


def _rate(model: BltModel, begun: list[tuple[Sequence, Any]], passes: _Passes) -> float:
    """Bytes a second of all texts together; the sequences stay where they are."""
    batch = model.batch()
    batch.observer = lambda stage, texts, seconds: passes[stage, texts].append(seconds)

    def reading(sequence: Sequence, ids: Any) -> Callable[[], None]:
        def run() -> None:
            for index in range(len(ids)):
                sequence.append(ids[index : index + 1])

        return run

    tasks = []
    for sequence, ids in begun:
        fork = sequence.fork()
        fork.append(ids[:1])  # which copies what it shares
        tasks.append(batch.start(reading(fork, ids[1:])))
    started = time.perf_counter()
    while batch.step():
        pass
    seconds = time.perf_counter() - started
    for task in tasks:
        if task.error is not None:
            raise task.error
    return sum(len(ids) - 1 for _, ids in begun) / seconds


def _told(passes: _Passes, stage: str) -> dict[int, dict[str, float]]:
    found = sorted((texts, seconds) for (name, texts), seconds in passes.items() if name == stage)
    return {
        texts: {"ms": round(1000 * float(np.median(seconds)), 3), "passes": len(seconds)}
        for texts, seconds in found
    }


if __name__ == "__main__":
    main()
