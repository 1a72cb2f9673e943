"""A blt-edge bundle in a comparison: `BltModel.load`, then `generate`, as a user would.

Random weights write text with odd patches that nobody could guess: they can read on in the prompt's text
instead, with guesses that are simulated (`forced`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime import BltModel, GenerationOptions
from ...runtime.errors import BltError
from ...runtime.manifest import load_manifest
from ...runtime.vocabulary import encode
from .engine import BenchError, Card, Reading, Round
from .forced import Simulated, read_on

__all__ = ["BltEngine", "BltSpec"]


@dataclass(frozen=True)
class BltSpec:
    """A bundle and how to run it."""

    bundle: Path
    threads: int
    draft: str | None = None
    """Where guesses come from, as in `GenerationOptions.draft`; None leaves the runtime's default."""
    reads_on: Simulated | None = None
    """Read on in the text with these guesses; None writes."""

    @property
    def name(self) -> str:
        """The bundle's folder, and how it reads on."""
        folder = self.bundle.resolve().name
        return folder if self.reads_on is None else f"{folder} reads, {self.reads_on.spec}"

    @property
    def memory_bytes(self) -> int:
        """Twice the graphs' weights (an engine may hold a rearranged copy); tables stay on disk."""
        return 2 * _graph_bytes(self.bundle)

    def open(self) -> BltEngine:
        """Load the bundle."""
        try:
            return BltEngine(self)
        except BltError as error:
            raise BenchError(str(error)) from None


class BltEngine:
    """A loaded bundle."""

    def __init__(self, spec: BltSpec) -> None:
        self._spec = spec
        self._model = BltModel.load(spec.bundle, threads=spec.threads)
        manifest = self._model.manifest
        counts = dict(manifest.model.parameters)
        tables = counts.pop("tables", 0)
        precisions = " ".join(f"{name} {stage.precision}" for name, stage in manifest.stages.items())
        self.card = Card(
            name=spec.name,
            parameters=sum(counts.values()),
            disk_bytes=_graph_bytes(spec.bundle),
            build=f"{precisions}; {self._model.engine}; drafts {spec.reads_on or spec.draft or 'by default'}",
            table_parameters=tables,
            table_bytes=manifest.files[manifest.embedding.file].bytes,
        )

    def read(self, task: Round) -> Reading:
        """Greedy. Raises BenchError when the text ends at once."""
        if self._spec.reads_on is not None:
            return self._read_on(task, self._spec.reads_on)
        options: dict[str, Any] = {"max_new_bytes": task.new_bytes}
        if self._spec.draft is not None:
            options["draft"] = self._spec.draft
        try:
            before = len(self._model.patch_lengths(task.prompt))
            result = self._model.generate(task.prompt, GenerationOptions(**options))
        except BltError as error:
            raise BenchError(str(error)) from None
        stats = result.stats
        if stats.new_bytes < 2:
            raise BenchError(f"{self.card.name}: the text ended at its first byte; give another --text")
        return Reading(
            prefill=stats.prompt_bytes / stats.prefill_seconds,
            decode=(stats.new_bytes - 1) / stats.decode_seconds,
            bytes_per_patch=stats.new_bytes / max(1, stats.patches - before),
        )

    def _read_on(self, task: Round, case: Simulated) -> Reading:
        ids = encode(task.prompt + task.following)
        run = read_on(self._model, ids, 1 + len(task.prompt), task.new_bytes, case, seed=len(ids))
        return Reading(run.prefill, run.decode, run.bytes_per_patch)


def _graph_bytes(bundle: Path) -> int:
    try:
        manifest = load_manifest(bundle)
    except BltError as error:
        raise BenchError(str(error)) from None
    table = manifest.embedding.file
    return sum(record.bytes for name, record in manifest.files.items() if name != table)
