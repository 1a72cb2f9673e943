"""Bits per byte: how well the model predicts a text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import OptionError
from .vocabulary import BYTE_OFFSET, encode

if TYPE_CHECKING:
    from .model import BltModel

__all__ = ["Score", "score"]


@dataclass(frozen=True)
class Score:
    """What scoring a text gave."""

    bits_per_byte: float
    """Mean negative log2 probability of each byte, over all 260 classes."""
    bytes: int
    """Bytes scored; BOS is not one."""
    patches: int
    """Patches over all windows, each window's BOS patch included."""
    windows: int
    """Windows scored, each from BOS."""
    context: int
    """Ids in a full window, BOS included."""
    seconds: float
    """Wall clock."""

    @property
    def bytes_per_second(self) -> float:
        """Bytes scored per second of wall clock."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0


def score(
    model: BltModel,
    data: bytes,
    *,
    context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score `data` in windows of `context` ids: BOS and the next context - 1 bytes, without overlap.

    Raises OptionError for an empty text, or a context that the model has no positions for.
    """
    size = model.manifest.model.trained_context if context is None else context
    most = model.limits.max_positions
    if not isinstance(size, int) or not 2 <= size <= most:
        raise OptionError(f"context: got {size!r}, a whole number from 2 to {most} is needed")
    if not data:
        raise OptionError("there is nothing to score: the text is empty")
    started = time.perf_counter()
    bits, patches, windows = 0.0, 0, 0
    for start in range(0, len(data), size - 1):
        window = data[start : start + size - 1]
        window_bits, window_patches = _score_window(model, window)
        bits, patches, windows = bits + window_bits, patches + window_patches, windows + 1
        if progress is not None:
            progress(start + len(window), len(data))
    seconds = time.perf_counter() - started
    return Score(bits / len(data), len(data), patches, windows, size, seconds)


def _score_window(model: BltModel, window: bytes) -> tuple[float, int]:
    sequence = model.sequence()
    ids = encode(window)
    bits, row = 0.0, 0
    for result in sequence.extend(ids):
        # The row after the window's last byte predicts a byte of the next window: not scored.
        targets = np.frombuffer(window, np.uint8)[row : row + len(result.logits)].astype(np.int64)
        bits += _bits(result.logits[: len(targets)], targets + BYTE_OFFSET)
        row += len(result.logits)
    return bits, len(sequence.boundaries.patch_lengths())


def _bits(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> float:
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
    picked = wide[np.arange(len(targets)), targets]
    return float((log_sum - picked).sum() / np.log(2.0))
