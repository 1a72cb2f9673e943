"""Rows of the embedding tables from float32 to the form in the file; `runtime.table_rows` is the way back.

A scale is a row's own in int8, where 127 steps to the largest value lose next to nothing, and a block's own
in int4, where it is searched for by squared error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.specs import TABLE_BLOCK, EmbeddingSpec

__all__ = ["encode_rows", "largest_value"]

Floats = NDArray[np.float32]

# What the largest value of a block becomes at first. There is a step -8 but none +8, so the scale may be
# negative. On Gaussian rows plain rounding to 7 misses by 9.7 % of the deviation, one scale a row by 14 %;
# these two with the fit after them by 8.3 %, and five tries more, which cut the largest value off, by 8.1 %.
_STEPS = (-8.0, 7.0)
# Rows at a time so that all passes of the search stay in the processor's cache.
_SEARCH_VALUES = 1 << 16


def largest_value(dtype: str) -> float:
    """The largest magnitude that tables of this dtype hold."""
    half = float(np.finfo(np.float16).max)
    return {
        "float16": half,
        "int4": 7 * half,  # its scales are float16, and the largest value is at least 7 of them
        "int8": 2.0**127,  # a rounded scale times 127 must not pass float32
        "float32": float(np.finfo(np.float32).max),
    }[dtype]


def encode_rows(block: Floats, spec: EmbeddingSpec) -> NDArray[Any]:
    """float32 [n, width], finite and at most `largest_value`, as rows for the file: contiguous, [n, ...]."""
    if spec.dtype == "int8":
        return _encode_int8(block)
    if spec.dtype == "int4":
        step = max(1, _SEARCH_VALUES // spec.width)
        parts = [_encode_int4(block[at : at + step], spec.blocks) for at in range(0, len(block), step)]
        return np.concatenate(parts)
    return np.ascontiguousarray(block, np.dtype(spec.dtype).newbyteorder("<"))


def _encode_int8(block: Floats) -> NDArray[np.uint8]:
    scales = np.maximum(block.max(axis=1), -block.min(axis=1)) / np.float32(127)
    rows = np.empty((len(block), 4 + block.shape[1]), np.uint8)
    rows[:, :4] = scales.astype("<f4")[:, None].view(np.uint8)
    # A scale too small for float32 belongs to values that are nothing.
    quotients = block / np.where(scales > 0, scales, np.float32(np.inf))[:, None]
    np.rint(quotients, out=quotients)
    rows[:, 4:] = np.clip(quotients, -127, 127, out=quotients).astype(np.int8).view(np.uint8)
    return rows


def _encode_int4(block: Floats, blocks: int) -> NDArray[np.uint8]:
    padded = np.zeros((len(block), blocks * TABLE_BLOCK), np.float32)
    padded[:, : block.shape[1]] = block
    values = padded.reshape(-1, TABLE_BLOCK)
    scales, steps = _search(values)
    scales = scales.reshape(len(block), blocks)
    halves = (steps.reshape(len(block), blocks, TABLE_BLOCK // 2, 2).astype(np.int8) & 15).view(np.uint8)
    nibbles = halves[..., 0] | halves[..., 1] << 4
    return np.concatenate(
        [scales.astype("<f2").view(np.uint8), nibbles.reshape(len(block), -1)], axis=1, dtype=np.uint8
    )


def _search(values: Floats) -> tuple[NDArray[np.float16], Floats]:
    """The scale (float16 [n]) and steps (float32 [n, 32], whole, -8 .. 7) of least squared error."""
    peaks = values[np.arange(len(values)), np.abs(values).argmax(axis=1)]
    scales: NDArray[np.float16] = np.zeros(len(values), np.float16)
    steps = np.zeros_like(values)
    errors = np.full(len(values), np.inf, np.float32)
    for count in _STEPS:
        tried = _finite_half(peaks / np.float32(count))
        found, error = _round_to(values, tried)
        # The best scale for these steps, by least squares; its own rounding may be better still.
        refined = _finite_half(_fit(values, found, tried))
        again, error_again = _round_to(values, refined)
        for candidate, rounded, missed in ((tried, found, error), (refined, again, error_again)):
            better = missed < errors
            scales[better], errors[better] = candidate[better], missed[better]
            np.copyto(steps, rounded, where=better[:, None])
    return scales, steps


def _round_to(values: Floats, scales: NDArray[np.float16]) -> tuple[Floats, Floats]:
    wide = scales.astype(np.float32)[:, None]
    divisors: Floats = np.where(wide == 0, np.float32(np.inf), wide)
    steps: Floats = values / divisors
    np.rint(steps, out=steps)
    np.clip(steps, -8, 7, out=steps)
    missed = values - steps * wide
    error: Floats = np.einsum("nk,nk->n", missed, missed)
    return steps, error


def _fit(values: Floats, steps: Floats, scales: NDArray[np.float16]) -> Floats:
    squares = np.einsum("nk,nk->n", steps, steps)
    products = np.einsum("nk,nk->n", values, steps)
    fitted: Floats = np.where(squares > 0, products / np.maximum(squares, np.float32(1)), scales)
    return fitted


def _finite_half(scales: Floats) -> NDArray[np.float16]:
    most = np.float32(np.finfo(np.float16).max)
    return np.clip(scales, -most, most).astype(np.float16)
