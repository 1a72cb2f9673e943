"""What does a decode step cost beside the graphs? The same loop, with graphs that compute nothing.

Theory: a step hashes, looks up rows, fills inputs, decides patches, keeps caches and logits, samples. None of
that depends on the model's size but for the copies, so on a small model it is what is left to save. Calls are
bound as ever; only the engine's run is taken out. Without entropies patches have a given length.

    python -m blt_edge.tools.bench.overhead --bundle demo-bundle
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...runtime import BltModel, GenerationOptions
from ...runtime.backends.base import CacheLimits, Done, OneText, StageBackend, StageCall
from ...runtime.cache import StageCache
from ..profile.statistics import Spread, machine
from .common import options, print_json


def main() -> None:
    parser = options(__doc__, rounds=9, threads=1)
    parser.add_argument("--prompt-bytes", type=int, default=256)
    parser.add_argument("--new-bytes", type=int, default=256)
    parser.add_argument("--bytes-a-patch", type=int, default=4)
    args = parser.parse_args()
    model = BltModel.load(args.bundle, threads=args.threads)
    print(f"{machine()}; {args.bundle}; engine: {model.engine}")
    runs: dict[str, Callable[[], float]] = {
        "the loop without graphs": lambda: _seconds_a_byte(_emptied(model, args.bytes_a_patch), args),
        "with graphs": lambda: _seconds_a_byte(model, args),
    }
    document: dict[str, Any] = {"benchmark": "overhead", "bundle": str(args.bundle)}
    for name, run in runs.items():
        spread = Spread.of([1000 * run() for _ in range(args.rounds)])
        print(f"{name:<26} {spread} ms a byte")
        document[name.replace(" ", "_")] = spread.to_dict()
    print_json(document)


class _Empty(OneText):
    """A stage whose calls are bound and then compute nothing: outputs stay as they are."""

    def __init__(self, stage: StageBackend) -> None:
        self._stage = stage
        self.memory = stage.memory

    def new_cache(self, limits: CacheLimits) -> StageCache:
        return self._stage.new_cache(limits)

    def bind(self, *arguments: Any) -> StageCall:
        call = self._stage.bind(*arguments)
        call.run = _nothing  # type: ignore[method-assign]
        if "logits" in call.outputs:
            call.outputs["logits"][..., 100] = 1.0  # else every text would end at once
        return call


def _nothing(done: Done) -> None:
    done(0.0)


def _emptied(model: BltModel, bytes_a_patch: int) -> BltModel:
    # The patcher runs as ever, where there is one.
    rule = replace(
        model.manifest.patching,
        mode="entropy" if "patcher" in model.manifest.stages else "static",
        threshold=1e9,
        patch_size=bytes_a_patch,
        max_patch_length=bytes_a_patch,
        monotonic=False,
        threshold_add=None,
    )
    stages: dict[str, StageBackend] = {name: _Empty(stage) for name, stage in model._backends.items()}
    return BltModel(replace(model.manifest, patching=rule), stages, model._table, model.limits, model.path)


def _seconds_a_byte(model: BltModel, args: argparse.Namespace) -> float:
    prompt = bytes(97 + index % 26 for index in range(args.prompt_bytes))
    chunks = model.stream(prompt, GenerationOptions(args.new_bytes, draft="none"))
    last = next(chunks)  # the prompt, and the first byte
    started = time.perf_counter()
    for chunk in chunks:
        last = chunk
    seconds = time.perf_counter() - started
    assert last.stats is not None
    if last.stats.new_bytes < 2:
        raise SystemExit("the text ended at its first byte; there is nothing to measure")
    return seconds / (last.stats.new_bytes - 1)


if __name__ == "__main__":
    main()
