"""What the server remembers of texts: a store of states for each key.

A store tells by the time that a prompt takes whether it has read such a text before. So nobody's answer may
depend on what another key's holder has sent: stores share neither states nor memory, and each has the same
part of the budget, whatever the others do.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ...runtime import BltModel, PrefixStore
from ...runtime.engines import PORTABLE
from ...runtime.prefix_folder import Loaded, PrefixFolder, make_folder
from ...runtime.prefix_store import StoreFigures, default_memory

__all__ = ["StoreMetrics", "Stores"]

SAVE_SECONDS = 600.0
"""From one writing of new states to the next: a flash card is worn by each."""

_COUNTERS = {
    "hits": ("hits", "Prompts that went on from a state that was kept."),
    "misses": ("misses", "Prompts of which nothing had been read before."),
    "reused_bytes": ("reused_bytes", "Bytes of prompts that were not read again."),
    "evicted": ("evictions", "States dropped for others."),
}
_GAUGES = {
    "states": ("states", "States that are kept."),
    "bytes": ("memory_bytes", "Memory of them."),
    "memory": ("memory_limit_bytes", "Memory that they may take."),
}


class Stores:
    """The stores of one model, by the number of the key. Safe from any thread."""

    def __init__(self, model: BltModel, memory: int | None, keys: Sequence[str] = ()) -> None:
        """memory: bytes for all of them; 0 remembers nothing, None takes the runtime's default. keys: one
        store for each; without any, all requests have the same.
        """
        self.memory = default_memory(model) if memory is None else memory
        self._keys = tuple(keys) or ("",)
        self._stores = [PrefixStore(model, self.memory // len(self._keys)) for _ in self._keys]
        self._folders: list[PrefixFolder] = []
        # Not meanwhile on a GPU: a copy from its memory in another thread may break what is captured there.
        self._pause = SAVE_SECONDS if model.engine.device == PORTABLE.device else None
        self._closing = threading.Event()
        self._saver: threading.Thread | None = None
        self._saved = StoreFigures()

    def __getitem__(self, key: int) -> PrefixStore:
        return self._stores[key]

    def __iter__(self) -> Iterator[PrefixStore]:
        return iter(self._stores)

    @property
    def figures(self) -> StoreFigures:
        """Of all stores together."""
        return sum((store.figures for store in self._stores), StoreFigures())

    def open(self, path: Path, report: Callable[[Exception], None]) -> Loaded:
        """Have the states in a directory, made where there is none: take in what is there, write what is new
        every ten minutes (on a CPU) and at the end. Each key has a folder of its own there.

        report: told of what can't be written. Raises OutputError where the directory can't be used.
        """
        make_folder(path)
        self._folders = [PrefixFolder(path / _folder_name(key)) for key in self._keys]
        loaded = [folder.load(store) for folder, store in zip(self._folders, self._stores, strict=True)]
        self._saved = self.figures
        self._saver = threading.Thread(target=self._save_often, args=(report,), name="saving", daemon=True)
        self._saver.start()
        return Loaded(
            sum(one.states for one in loaded), tuple(line for one in loaded for line in one.dropped)
        )

    def close(self) -> None:
        """Write what is new, where there is a directory, and leave it to others."""
        self._closing.set()
        if self._saver is not None:
            self._saver.join()
        for folder in self._folders:
            folder.close()

    def _save_often(self, report: Callable[[Exception], None]) -> None:
        ended = False
        while not ended:
            ended = self._closing.wait(self._pause)
            if (now := self.figures) == self._saved:
                continue
            errors = [*filter(None, map(_save, self._folders, self._stores))]
            for error in errors:  # the server goes on without
                report(error)
            if not errors:
                self._saved = now


def _save(folder: PrefixFolder, store: PrefixStore) -> Exception | None:
    """What went wrong: with one key's folder, which is nothing to the others."""
    try:
        folder.save(store)
    except Exception as error:
        return error
    return None


def _folder_name(key: str) -> str:
    """A name that tells nothing of the key, the same each time."""
    return hashlib.pbkdf2_hmac("sha256", key.encode(), b"blt-edge states", 100_000).hex()[:32]


class StoreMetrics:
    """The figures as Prometheus reads them."""

    def __init__(self, figures: Callable[[], StoreFigures]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        figures = self._figures()
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"blt_edge_prefix_{name}", text, value=getattr(figures, field))
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"blt_edge_prefix_{name}", text, value=getattr(figures, field))
