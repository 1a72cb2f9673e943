"""Scales for caches in 8 bits: how large keys and values get in each channel, on texts.

A key's channels turn with its position in pairs, so what one of a pair holds at some position the other holds
at another: both get the pair's length as their range, and a text may be longer than those that were read.
A range is what was seen; what another text has beyond it is cut off, which costs less than rounding all
others further. What this does not know: engines, graphs, what is done with scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.backends.base import StageBackend
from ..runtime.embedding import EmbeddingTable
from ..runtime.manifest import Manifest
from ..runtime.sequence import PatcherState, Sequence, SequenceLimits
from ..runtime.state import new_state
from ..runtime.vocabulary import encode
from .data import Window, bundled_texts, choose_windows

__all__ = ["cache_scales", "scales_of"]

Floats = npt.NDArray[np.float32]

# Texts that are read, and ids of each.
_WINDOWS, _WINDOW_IDS = 8, 512
_CHUNK = 256
_MOST = 127
# What a channel that was always 0 may come to, as a share of the largest.
_LEAST = 1e-3
_TINY = 1e-6


def cache_scales(
    directory: Path,
    manifest: Manifest,
    backends: dict[str, StageBackend],
    watch: Callable[[str], None] = lambda what: None,
) -> dict[str, Floats]:
    """Scales [2 * layers, Hkv, head_dim] of each stage's keys and values in 8 bits.

    backends: of the bundle in `directory`, with caches in float32; the package's own texts are read with
    them. watch(what is done). Raises BackendError.
    """
    table = EmbeddingTable.open(directory, manifest.embedding)
    largest = {stage: np.zeros((0,), np.float32) for stage in manifest.stages}
    windows = choose_windows(bundled_texts(), _WINDOWS, _window_ids(manifest) - 1, 0)
    for number, window in enumerate(windows, 1):
        watch(f"reading text {number} of {len(windows)} for the caches' scales")
        for stage, found in _read(manifest, backends, table, window):
            known = largest[stage]
            largest[stage] = np.maximum(known, found) if known.size else found
    return {stage: scales_of(found) for stage, found in largest.items()}


def _read(
    manifest: Manifest, backends: dict[str, StageBackend], table: EmbeddingTable, window: Window
) -> Iterator[tuple[str, Floats]]:
    """Read a window from BOS; (stage, largest absolute values [2 * layers, Hkv, head_dim]) again and again,
    of what its cache holds then."""
    # What can be taken back is held: all of a chunk, however short the window.
    limits = SequenceLimits(_CHUNK, _CHUNK, manifest.model.max_positions)
    state = new_state(manifest, backends, limits.cache)
    sequence = Sequence(manifest, backends, table, limits, state=state)
    # Where patches follow another rule, the patcher only tells entropies.
    patcher = None
    if "patcher" in backends and sequence.patcher is None:
        patcher = PatcherState(backends["patcher"], limits)
    ids = encode(window.read())[: _window_ids(manifest)]
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        for _ in sequence.extend(part):
            yield from ((stage, _largest(cache.planes())) for stage, cache in state.caches.items())
        if patcher is not None:
            patcher.extend(part)
            yield "patcher", _largest(patcher.stage.cache.planes())


def _window_ids(manifest: Manifest) -> int:
    return min(_WINDOW_IDS, manifest.model.trained_context, manifest.axes["bytes"].max)


def _largest(planes: Iterator[Floats]) -> Floats:
    """[2 * layers, Hkv, head_dim] of planes [Hkv, S, head_dim], keys and values in turn."""
    return np.stack([np.abs(plane).max(axis=1, initial=0.0) for plane in planes])


def scales_of(largest: Floats) -> Floats:
    """Scales for largest absolute values [2 * layers, Hkv, head_dim], keys and values in turn."""
    ranges = largest.astype(np.float32)
    first, second = np.split(ranges[::2], 2, axis=-1)
    ranges[::2] = np.tile(np.hypot(first, second), 2)
    most = ranges.max(axis=(1, 2), keepdims=True)
    scales: Floats = np.maximum(ranges, np.maximum(most * _LEAST, _TINY)) / np.float32(_MOST)
    return scales
