"""What do caches in 8 bits bring a text that goes on byte by byte, and what do they cost?

Theory: a step reads every key and value that its windows see, and a quarter of the bytes takes less time the
longer the context is; what is rounded moves logits, and an entropy next to the threshold moves a boundary.
Two bundles that are alike but for their engines' caches read on in a text, in short blocks by turns, so that
whatever else the machine does meets both; then both read a stretch in passes of 16 bytes, and every byte's
distribution and the boundaries are compared.

    blt-edge build COPY --cache-precision int8
    python -m blt_edge.tools.bench.caches --bundle BUNDLE --narrow COPY --text FILE
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime import BltModel, Sequence
from ...runtime.narrow_cache import STEP_POSITIONS
from ...runtime.vocabulary import encode
from ..profile.statistics import Spread, machine
from .common import options, print_json

Floats = npt.NDArray[Any]
_NAMES = ("float32", "int8")


def main() -> None:
    parser = options(__doc__, rounds=15, help="its engine has float32 caches")
    parser.add_argument("--narrow", required=True, type=Path, help="a copy, its engine has int8 caches")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--context", type=int, default=640, help="bytes that are read before")
    parser.add_argument("--bytes", type=int, default=12, help="bytes read one by one in each block")
    parser.add_argument("--compare", type=int, default=0, help="bytes whose distributions are compared")
    args = parser.parse_args()

    models = [
        BltModel.load(bundle, "cpu", args.threads, prefill_chunk=256) for bundle in (args.bundle, args.narrow)
    ]
    if tuple(model.engine.caches for model in models) != _NAMES:
        engines = " and ".join(str(model.engine) for model in models)
        raise SystemExit(f"caches: {engines}: a float32 engine and one with int8 caches are needed")
    ids = encode(args.text.read_bytes())
    print(f"{machine()}; {args.threads} threads; {args.rounds} rounds of {args.bytes} bytes")
    document: dict[str, Any] = {"benchmark": "caches", "threads": args.threads, "context": args.context}
    document |= _speed(models, ids, args.context, args.bytes, args.rounds)
    if args.compare:
        document |= _agreement(models, ids[: 1 + args.compare])
    print_json(document)


def _speed(
    models: list[BltModel], ids: npt.NDArray[np.int64], context: int, count: int, rounds: int
) -> dict[str, Any]:
    sequences = [model.sequence() for model in models]
    for sequence in sequences:
        sequence.append(ids[:context])
    blocks: list[list[float]] = [[], []]
    stages: list[dict[str, list[float]]] = [{}, {}]
    for number in range(rounds + 1):
        part = ids[context + number * count : context + (number + 1) * count]
        for which in (0, 1) if number % 2 else (1, 0):
            milliseconds, each = _block(sequences[which], part)
            if number:  # the first binds buffers, and changes a cache to what steps read
                blocks[which].append(milliseconds)
                for name, value in each.items():
                    stages[which].setdefault(name, []).append(value)
    gain = Spread.of([one / other for one, other in zip(*blocks, strict=True)])
    found: dict[str, Any] = {"gain": gain.to_dict()}
    for which, name in enumerate(_NAMES):
        spread = Spread.of(blocks[which])
        state = sequences[which].state_bytes
        print(f"{name:>8}: {spread} ms a byte; a state of {state / 1e6:.1f} MB")
        runs = {stage: Spread.of(values).to_dict() for stage, values in stages[which].items()}
        found[name] = {"ms": spread.to_dict(), "state_bytes": state, "ms_a_run": runs}
    for stage in stages[0]:
        one, other = (Spread.of(each[stage]) for each in stages)
        print(f"{stage:>8}: {one} -> {other} ms a run")
    print(f"int8 caches: {gain} times as fast, block by block")
    return found


def _block(sequence: Sequence, ids: npt.NDArray[np.int64]) -> tuple[float, dict[str, float]]:
    """Milliseconds a byte, and of a run of each stage that ran."""
    before = {name: (each.seconds, each.calls) for name, each in sequence.times.items()}
    started = time.perf_counter()
    for place in range(len(ids)):
        sequence.append(ids[place : place + 1])
    seconds = time.perf_counter() - started
    runs = {
        name: 1000 * (each.seconds - before[name][0]) / (each.calls - before[name][1])
        for name, each in sequence.times.items()
        if each.calls > before[name][1]
    }
    return 1000 * seconds / len(ids), runs


def _agreement(models: list[BltModel], ids: npt.NDArray[np.int64]) -> dict[str, Any]:
    logs, starts = zip(*(_read(model, ids) for model in models), strict=True)
    following = ids[1:]
    bits = [float(-one[np.arange(len(following)), following].mean() / np.log(2)) for one in logs]
    apart = float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean() / np.log(2))
    same = float((logs[0].argmax(-1) == logs[1].argmax(-1)).mean())
    others = len(starts[0] ^ starts[1])
    print(
        f"{len(following)} bytes: {bits[0]:.4f} -> {bits[1]:.4f} bits a byte, KL {apart:.4f} bits, "
        f"same argmax {same:.2%}, boundaries {len(starts[0])} and {len(starts[1])}, {others} in one only"
    )
    return {"bits": bits, "kl_bits": apart, "same_argmax": same, "boundaries_in_one_only": others}


def _read(model: BltModel, ids: npt.NDArray[np.int64]) -> tuple[Floats, set[int]]:
    """Logarithms of the distributions [N, V] after each id, and where patches begin; read as steps are."""
    sequence, logits = model.sequence(), []
    for start in range(0, len(ids), STEP_POSITIONS):
        for chunk in sequence.extend(ids[start : start + STEP_POSITIONS]):
            logits.append(np.array(chunk.logits, np.float64))
    whole = np.concatenate(logits)
    whole -= whole.max(-1, keepdims=True)
    return whole - np.log(np.exp(whole).sum(-1, keepdims=True)), set(sequence.boundaries.starts)


if __name__ == "__main__":
    main()
