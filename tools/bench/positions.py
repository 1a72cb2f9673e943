"""Does a byte late in a text cost more than an early one?

Theory: windowed caches make every stage but the global transformer cost the same at any position; the
global cache grows by one entry a patch, which is read once per patch. Bytes of a real text are read one by
one at two positions in turns; milliseconds a byte are printed with and without the latent stage.

    python -m blt_edge.tools.bench.positions --bundle demo-bundle --text FILE
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ...runtime import BltModel, Sequence
from ...runtime.vocabulary import encode
from ..profile.statistics import Spread, machine
from .common import options, print_json


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--early", type=int, default=600)
    parser.add_argument("--late", type=int, default=8000)
    parser.add_argument("--bytes", type=int, default=64, help="bytes read one by one in each round")
    args = parser.parse_args()

    model = BltModel.load(args.bundle, threads=args.threads, rollback=args.bytes)
    text = args.text.read_bytes()
    positions = {"early": args.early, "late": args.late}
    sequences = {name: model.sequence() for name in positions}
    for name, sequence in sequences.items():
        sequence.append(encode(text[: positions[name] - 1]))
    print(f"{machine()}; {args.threads} threads; {args.rounds} rounds of {args.bytes} bytes")
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in positions}
    for _ in range(args.rounds):
        for name, sequence in sequences.items():
            measured[name].append(_measure(sequence, text, args.bytes))
    document: dict[str, Any] = {"benchmark": "positions", "threads": args.threads}
    medians = {}
    for name, position in positions.items():
        total, rest = (Spread.of(column) for column in zip(*measured[name], strict=True))
        medians[name] = total.median, rest.median
        print(f"position {position:>6}: {total} ms a byte; {rest} without the latent stage")
        document[name] = {"position": position, "ms": total.to_dict(), "ms_without_latent": rest.to_dict()}
    ratios = [late / early for early, late in zip(medians["early"], medians["late"], strict=True)]
    print(f"late over early: {ratios[0]:.2f}; without the latent stage {ratios[1]:.2f}")
    print_json({**document, "ratio": ratios[0], "ratio_without_latent": ratios[1]})


def _measure(sequence: Sequence, text: bytes, count: int) -> tuple[float, float]:
    """Milliseconds a byte in all and without the latent stage; the sequence is rolled back afterwards."""
    start = sequence.length - 1
    ids = encode(text[start : start + count])[1:]
    before = sequence.times["latent"].seconds
    started = time.perf_counter()
    for index in range(count):
        sequence.append(ids[index : index + 1])
    seconds = time.perf_counter() - started
    latent = sequence.times["latent"].seconds - before
    sequence.roll_back(count)
    return 1000 * seconds / count, 1000 * (seconds - latent) / count


if __name__ == "__main__":
    main()
