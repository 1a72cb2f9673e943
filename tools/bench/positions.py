"""Does a byte late in a text cost more than an early one?

Theory: windowed caches make every stage but the global transformer cost the same at any position; the
global cache grows by one entry a patch, which is read once per patch. Bytes of a real text are read one by
one at two positions in turns; milliseconds a byte are printed with and without the latent stage.

    python -m blt_edge.tools.bench.positions --bundle demo-bundle --text FILE
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from ...runtime import BltModel, Sequence
from ...runtime.vocabulary import encode
from .engine import Spread, machine, print_json

__all__ = ["main"]


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--early", type=int, default=600)
    parser.add_argument("--late", type=int, default=8000)
    parser.add_argument("--bytes", type=int, default=64, help="bytes read one by one in each round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    model = BltModel.load(args.bundle, threads=args.threads, rollback=args.bytes)
    text = args.text.read_bytes()
    early, late = _read(model, text, args.early), _read(model, text, args.late)
    print(f"{machine()}; {args.threads} threads; {args.rounds} rounds of {args.bytes} bytes")
    readings: dict[str, list[tuple[float, float]]] = {"early": [], "late": []}
    for _ in range(args.rounds):
        for name, sequence in (("early", early), ("late", late)):
            readings[name].append(_measure(sequence, text, args.bytes))
    document: dict[str, object] = {"benchmark": "positions", "threads": args.threads}
    rows = {}
    for name, position in (("early", args.early), ("late", args.late)):
        total = Spread.of([all_stages for all_stages, _ in readings[name]])
        rest = Spread.of([without for _, without in readings[name]])
        rows[name] = (total.median, rest.median)
        print(f"position {position:>6}: {total} ms a byte; {rest} without the latent stage")
        document[name] = {"position": position, "ms": total.to_dict(), "ms_without_latent": rest.to_dict()}
    ratios = [late_value / early_value for early_value, late_value in zip(*rows.values(), strict=True)]
    print(f"late over early: {ratios[0]:.2f}; without the latent stage {ratios[1]:.2f}")
    print_json({**document, "ratio": ratios[0], "ratio_without_latent": ratios[1]})


def _read(model: BltModel, text: bytes, position: int) -> Sequence:
    sequence = model.sequence()
    sequence.append(encode(text[: position - 1]))
    return sequence


def _measure(sequence: Sequence, text: bytes, count: int) -> tuple[float, float]:
    """Milliseconds a byte in all and without the latent stage; the sequence is rolled back afterwards."""
    start = sequence.length - 1
    ids = encode(text[start : start + count])[1:]
    before = sequence.times["latent"].seconds
    started = time.perf_counter()
    for index in range(count):
        sequence.append(np.asarray(ids[index : index + 1]))
    seconds = time.perf_counter() - started
    latent = sequence.times["latent"].seconds - before
    sequence.roll_back(count)
    return 1000 * seconds / count, 1000 * (seconds - latent) / count


if __name__ == "__main__":
    main()
