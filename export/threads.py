"""With how many threads an engine is fastest, measured when it is built.

Small models lose more by waiting for a second thread than it computes for them; where that turns depends on
the processor. What is measured is a turn of a text: a prompt is read, and bytes are added one by one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from ..calibration.data import Window, bundled_texts
from ..runtime.errors import BltError, BltWarning
from ..runtime.host import OtherLoad
from ..runtime.manifest import load_manifest
from ..runtime.model import BltModel
from ..runtime.options import GenerationOptions
from ..runtime.processors import usable_cores

__all__ = ["candidates", "measure_threads"]

_ROUNDS = 5
# Bytes of the prompt, and new ones; the first for models that take longer for it than `_QUICK` seconds.
_TURNS = ((16, 16), (128, 128))
_QUICK = 0.1
# More threads have to be faster by this: on a busy machine they are slower.
_GAIN = 1.1
# Processors that others may use meanwhile.
_QUIET = 0.3


def candidates(cores: int) -> list[int]:
    """Numbers of threads to try: powers of two, and all cores."""
    return [*(1 << power for power in range(cores.bit_length()) if 1 << power < cores), cores]


def measure_threads(bundle: Path, watch: Callable[[str], None] = lambda what: None) -> int | None:
    """How many threads run the bundle's engine for this machine fastest; of about equal ones, the fewest.

    None where there is one core, others used the processor meanwhile, or that many models do not fit into
    memory: each is loaded, and their weights are mapped from the same files. watch(what is done).
    """
    tried = candidates(usable_cores())
    if len(tried) == 1:
        return None
    try:
        with warnings.catch_warnings():
            # Whether the bundle is right is not what is asked.
            warnings.simplefilter("ignore", BltWarning)
            return _fastest(bundle, tried, watch)
    except (BltError, MemoryError):
        return None


def _fastest(bundle: Path, tried: list[int], watch: Callable[[str], None]) -> int | None:
    longest = load_manifest(bundle).axes["bytes"].max
    chunk, rollback = min(_TURNS[-1][0], longest), min(64, longest)
    load = partial(BltModel.load, bundle, "cpu", probe=False, prefill_chunk=chunk, rollback=rollback)
    models = {count: load(threads=count) for count in tried}
    room = models[tried[0]].limits.max_positions - 1
    text = Window(bundled_texts()[0], 0, _TURNS[-1][0]).read()

    def turn(model: BltModel, size: tuple[int, int]) -> float:
        started = time.perf_counter()
        model.generate(text[: min(size[0], room // 2)], GenerationOptions(max_new_bytes=size[1]))
        return time.perf_counter() - started

    watch(f"trying {', '.join(map(str, tried[:-1]))} and {tried[-1]} threads")
    size = _TURNS[min(turn(model, _TURNS[0]) for model in models.values()) < _QUICK]
    with OtherLoad() as others:
        rounds = [{count: turn(model, size) for count, model in models.items()} for _ in range(_ROUNDS)]
    if others.cores is None or others.cores > _QUIET:
        return None
    seconds = {count: median(each[count] for each in rounds) for count in tried}
    return next(count for count in tried if seconds[count] <= _GAIN * min(seconds.values()))
