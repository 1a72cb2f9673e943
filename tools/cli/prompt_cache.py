"""States of texts in files, as verbs are given them; and `generate`'s: the state after a prompt, kept for the
next run.

A file that is no state is never written over. What it does not know: what is in a state file, what is shown.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import numpy.typing as npt

from ...runtime.errors import BltError, BltWarning, StateError
from ...runtime.manifest import load_manifest
from ...runtime.state_file import describe
from ...runtime.state_pieces import AGAIN
from ...runtime.vocabulary import encode
from .options import STDIN

if TYPE_CHECKING:
    import threading

    from ...runtime import BltModel, GenerationChunk, GenerationOptions, GenerationStats, Sequence

Ids = npt.NDArray[np.int64]


def is_state(path: Path) -> bool:
    """Whether there is a saved state at `path`, as far as its header tells."""
    try:
        describe(path)
    except StateError:
        return False
    return True


def check_fits(path: Path, bundle: Path) -> None:
    """Raise StateError unless the state in a file is one of a bundle's; no array is read."""
    found, manifest = describe(path), load_manifest(bundle)
    if found.bundle != manifest.fingerprint:
        here = f"{bundle} is of {manifest.source.name} ({manifest.fingerprint[:16]})"
        raise StateError(
            f"{path} is the state of another bundle, of {found.model} ({found.bundle[:16]}); {here}; "
            "give that bundle, or another file"
        )


class PromptCache:
    """A file that holds the state after a prompt, or will."""

    def __init__(self, path: Path, bundle: Path, read_only: bool) -> None:
        """Raises StateError for a file that is no state of this bundle, UsageError for what can't be one."""
        self.path, self._read_only = path, read_only
        self.failed = False
        """Whether the file was to be written, and could not be."""
        if path == STDIN:
            raise _wrong("a state is a file of its own; give its name")
        self._there = os.path.lexists(path)
        if self._there:
            _check_there(path, bundle)
        elif read_only:
            raise _wrong(f"{path} does not exist; without --prompt-cache-ro it is made")
        elif not path.parent.is_dir():
            raise _wrong(f"the directory {path.parent} does not exist; create it first")
        if not read_only and not os.access(path.parent, os.W_OK):
            remedy = ", or give --prompt-cache-ro, too" if self._there else ""
            raise _wrong(f"nothing can be written in {path.parent}; check its permissions{remedy}")

    def stream(
        self, model: BltModel, prompt: bytes, options: GenerationOptions, cancel: threading.Event
    ) -> Iterator[GenerationChunk]:
        """What `BltModel.stream` yields, of a prompt of which only what the file does not hold is read.

        Where all of it is read and the file does not hold it, the file is written before the first byte is
        chosen. A file that can't be written is a warning, and so is one that is damaged.
        """
        from ...runtime.generation import stream
        from ...runtime.speculation import check_draft

        started, ids = time.perf_counter(), encode(prompt)
        check_draft(options, model.sequence())
        sequence, whole = self._begin(model, ids)
        reused = max(0, sequence.length - 1)
        for _ in sequence.extend(ids[sequence.length :]):
            pass
        read = time.perf_counter()
        if not whole and not self._read_only:
            self._write(model, sequence)
        before = _Before(sequence, len(prompt), reused, read - started, time.perf_counter() - started)
        # Not to be kept behind the prompt: nobody goes on from there.
        for chunk in stream(sequence, model.costs, b"", options, keep=False, cancel=cancel):
            yield chunk if chunk.stats is None else replace(chunk, stats=before.added_to(chunk.stats))

    def _begin(self, model: BltModel, ids: Ids) -> tuple[Sequence, bool]:
        """A sequence that has read what can be had of a prompt, and whether the file holds all of it."""
        if not self._there:
            return model.sequence(), False
        if len(ids) == 1:  # of an empty prompt there is nothing to keep
            return model.sequence(), True
        try:
            sequence = model.restore(self.path)
        except StateError as error:
            told = str(error).partition(";")[0]
            warnings.warn(f"--prompt-cache: {told}; the prompt is read", BltWarning, stacklevel=2)
            return model.sequence(), False
        common = _common(sequence.ids, ids)
        if common < sequence.length:
            if common < 2 or not sequence.state.can_roll_back(common):
                return model.sequence(), False
            sequence.roll_back(sequence.length - common)
        return sequence, common == len(ids)

    def _write(self, model: BltModel, sequence: Sequence) -> None:
        try:
            if os.path.lexists(self.path):  # it may have come while the prompt was read
                check_fits(self.path, model.path)
            sequence.save(self.path)
        except BltError as error:
            self.failed = True
            warnings.warn(f"--prompt-cache: {error}", BltWarning, stacklevel=2)


def _check_there(path: Path, bundle: Path) -> None:
    """As `check_fits`; of a file that can't be used any more, what to do here. It is left: whoever knows what
    it was may want it."""
    try:
        check_fits(path, bundle)
    except StateError as error:
        told, _, remedy = str(error).rpartition("; ")
        if remedy != AGAIN:
            raise
        raise StateError(f"{told}; remove it to have the prompt read and the file made again") from None


def _wrong(told: str) -> click.UsageError:
    return click.UsageError(f"--prompt-cache: {told}")


class _Before:
    """Figures of the prompt, which was read before generation began."""

    def __init__(
        self, sequence: Sequence, prompt_bytes: int, reused: int, read: float, elapsed: float
    ) -> None:
        self._prompt_bytes, self._reused, self._read, self._elapsed = prompt_bytes, reused, read, elapsed
        self._patches = sequence.boundaries.count
        self._times = {name: replace(spent) for name, spent in sequence.times.items()}

    def added_to(self, stats: GenerationStats) -> GenerationStats:
        """Those of prompt and text in all."""
        times = self._times
        return replace(
            stats,
            prompt_bytes=self._prompt_bytes,
            reused_bytes=self._reused,
            patches=self._patches + stats.patches,
            prefill_seconds=self._read + stats.prefill_seconds,
            first_byte_seconds=self._elapsed + stats.first_byte_seconds,
            stage_seconds={name: one + times[name].seconds for name, one in stats.stage_seconds.items()},
            stage_calls={name: one + times[name].calls for name, one in stats.stage_calls.items()},
        )


def _common(one: Ids, other: Ids) -> int:
    """Ids that two texts begin with alike."""
    count = min(len(one), len(other))
    differing = np.flatnonzero(one[:count] != other[:count])
    return int(differing[0]) if len(differing) else count
