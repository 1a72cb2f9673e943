"""What does it save to have read a text before?

In each round, in turns: a prompt is read anew; its state is forked, saved, and restored from the file (which
the page cache has); a completion is made twice through one store; and of 1 and of 8 choices the time until
each has its first byte is taken. Medians, and the ratios of a round.

    python -m blt_edge.tools.bench.states --bundle demo-bundle --text FILE
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ...runtime import BltModel, GenerationOptions, PrefixStore
from ...runtime.vocabulary import encode
from ..profile.statistics import Spread, machine
from .common import options, print_json

_CHOICES = 8
_STORE_BYTES = 4 << 30


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--prompt-bytes", type=int, default=3500)
    parser.add_argument("--new-bytes", type=int, default=32)
    args = parser.parse_args()

    model = BltModel.load(args.bundle, threads=args.threads)
    prompt = args.text.read_bytes()[: args.prompt_bytes]
    print(
        f"{machine()}; {args.threads} threads; {args.rounds} rounds; {len(prompt)} bytes; {model.engine.name}"
    )
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            rounds.append(_round(model, prompt, args.new_bytes, Path(folder, "text.state")))
    columns = {name: [one[name] for one in rounds] for name in rounds[0]}
    for name, values in columns.items():
        unit = "MB" if name.endswith("file") else "s"
        print(f"{name:>32}: {Spread.of(values)} {unit}")
    ratios = {
        "restored / read": _ratio(columns, "restore", "read anew"),
        "second completion / first": _ratio(columns, "second completion", "first completion"),
        f"first bytes of {_CHOICES} / of 1": _ratio(
            columns, f"first bytes, n={_CHOICES}", "first bytes, n=1"
        ),
    }
    for name, value in ratios.items():
        print(f"{name:>32}: {value:.4f}")
    document: dict[str, Any] = {name: median(values) for name, values in columns.items()}
    print_json(
        {"benchmark": "states", "threads": args.threads, "prompt_bytes": len(prompt), **document, **ratios}
    )


def _round(model: BltModel, prompt: bytes, new_bytes: int, path: Path) -> dict[str, float]:
    """Seconds of each, and the file's size in MB."""
    sequence = model.sequence()
    found = {"read anew": _seconds(lambda: sequence.append(encode(prompt)))}
    found["fork"] = _seconds(sequence.fork)
    found["save"] = _seconds(lambda: sequence.save(path))
    found["file"] = path.stat().st_size / 1e6
    found["restore"] = _seconds(lambda: model.restore(path))
    asked = GenerationOptions(max_new_bytes=new_bytes)
    store = PrefixStore(model, memory=_STORE_BYTES)
    for which in ("first", "second"):
        found[f"{which} completion"] = _seconds(lambda: store.generate(prompt, asked))
    for count in (1, _CHOICES):
        found[f"first bytes, n={count}"] = _seconds(partial(_first_bytes, model, prompt, count))
    return found


def _first_bytes(model: BltModel, prompt: bytes, count: int) -> None:
    """Run until each choice has its first piece."""
    waiting = set(range(count))
    asked = GenerationOptions(max_new_bytes=4, temperature=0.8, seed=1)
    pieces = model.stream_choices(prompt, asked, n=count)
    for index, _ in pieces:
        waiting.discard(index)
        if not waiting:
            break
    pieces.close()  # type: ignore[attr-defined]


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _ratio(columns: dict[str, list[float]], part: str, whole: str) -> float:
    return median(one / other for one, other in zip(columns[part], columns[whole], strict=True))


if __name__ == "__main__":
    main()
