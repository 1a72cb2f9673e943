"""Weights to integers: signed, symmetric, one scale for each block of inputs and each output.

A weight is float32 [K, N] (inputs, outputs). A block is `block_size` consecutive inputs of one output; one
block of K inputs is per-channel quantization. A scale is found by `search`:

- "rtn": the largest magnitude of the block lies on the last level, everything else is rounded to nearest.
- "mse": of a range of smaller scales, which cut off the largest weights, the one with the least squared
  error; then the scale that fits the chosen integers best, by least squares.

What it does not know: graphs, files, activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SEARCHES", "Quantized", "WeightFactors", "dequantize", "pack_int4", "quantize_weight", "scaled"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int8]

SEARCHES = ("mse", "rtn")
"""Ways to find a block's scale."""

_LEVELS = {4: (-8, 7), 8: (-127, 127)}
_SHARES = {4: np.linspace(0.5, 1.04, 19, dtype=np.float32), 8: np.linspace(0.8, 1, 9, dtype=np.float32)}
"""Scales that the search tries, as shares of the one that cuts nothing off."""

_SMALLEST = np.finfo(np.float32).tiny

# Weights looked at together: they, their integers and one product stay in the cache.
_TILE = 1 << 15


@dataclass(frozen=True)
class Quantized:
    """A weight as integers; `values[k, n] * scales[k // block_size, n]` comes close to it."""

    values: Integers
    """int8 [K, N]; int4 values in -8..7 take a byte each here."""
    scales: Floats
    """float32 [K / block_size, N], above 0."""


@dataclass(frozen=True)
class WeightFactors:
    """What smoothing multiplies a weight with before it is quantized; None: nothing."""

    rows: Floats | None = None
    """float32 [K]: one for each input."""
    columns: Floats | None = None
    """float32 [N]: one for each output; for a vector, one for each element."""


def scaled(weight: Floats, factors: WeightFactors) -> Floats:
    """`weight` [K, N] or [N] times its factors."""
    if factors.rows is not None:
        weight = weight * factors.rows[:, None]
    if factors.columns is not None:
        weight = weight * factors.columns
    return weight


def quantize_weight(weight: Floats, bits: int, block_size: int, search: str = "mse") -> Quantized:
    """float32 [K, N] to integers of 4 or 8 bits; `block_size` must divide K.

    int8 uses -127..127, int4 -8..7. Takes the integers and a little more memory beside the weight.
    """
    inputs, outputs = weight.shape
    assert inputs % block_size == 0, f"{block_size} does not divide {inputs}"
    assert search in SEARCHES, search
    blocks = np.ascontiguousarray(weight).reshape(-1, block_size, outputs)
    values = np.empty(blocks.shape, np.int8)
    scales = np.empty((len(blocks), outputs), np.float32)
    columns = max(8, _TILE // block_size)
    for index, block in enumerate(blocks):
        for first in range(0, outputs, columns):
            part = slice(first, first + columns)
            values[index, :, part], scales[index, part] = _tile(block[:, part], bits, search)
    return Quantized(values.reshape(weight.shape), scales)


def dequantize(quantized: Quantized) -> Floats:
    """float32 [K, N]: the weight that the integers stand for."""
    blocks = quantized.values.reshape(len(quantized.scales), -1, quantized.scales.shape[1])
    result: Floats = (blocks * quantized.scales[:, None]).reshape(quantized.values.shape)
    return result


def pack_int4(values: Integers) -> npt.NDArray[np.uint8]:
    """Two int4 values a byte in C order, the first in the low half, as ONNX stores them."""
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    nibbles = flat.view(np.uint8)
    return ((nibbles[0::2] & 0x0F) | (nibbles[1::2] << 4)).astype(np.uint8, copy=False)


def _tile(block: Floats, bits: int, search: str) -> tuple[Integers, Floats]:
    """One block of inputs for some outputs: int8 [block, n] and float32 [n]."""
    low, high = _LEVELS[bits]
    largest = np.abs(block).max(axis=0)
    # A block of zeros keeps any scale; one of subnormals must not divide by zero.
    scales = np.maximum(largest / np.float32(high), _SMALLEST)
    scales[largest == 0] = 1.0
    if search == "mse":
        # In units of the plain scale nothing overflows, whatever the weights are.
        scales = np.maximum(scales * _search(block / scales, bits), _SMALLEST)
    return np.clip(np.rint(block / scales), low, high).astype(np.int8), scales


def _search(block: Floats, bits: int) -> Floats:
    """Scales [n] for a block whose plain scale is 1."""
    # With w the block and q its integers, the best scale is w.q / |q|^2, where the squared error is
    # |w|^2 - (w.q)^2 / |q|^2: the last term alone says which q is best.
    best = np.full(block.shape[1], -1, np.float32)
    fit = np.ones_like(best)
    for share in _SHARES[bits]:
        gain, candidate = _gain(block, share, bits)
        fit = np.where(gain > best, candidate, fit)
        best = np.maximum(gain, best)
    # Rounding again at the fitted scale may find still better integers, and their own best scale.
    for _ in range(2):
        gain, candidate = _gain(block, fit, bits)
        fit = np.where(gain >= best, candidate, fit)
        best = np.maximum(gain, best)
    # The weights are rounded at the fitted scale in the end: keep it only where it beats the plain one.
    one = np.float32(1)
    return np.where(_error(block, fit, bits) < _error(block, one, bits), fit, one)


def _gain(block: Floats, scale: Floats | np.float32, bits: int) -> tuple[Floats, Floats]:
    """What integers rounded at `scale` explain of the block at their best scale, and that scale."""
    integers = np.clip(np.rint(block / scale), *_LEVELS[bits])
    product = np.einsum("kn,kn->n", block, integers)
    square = np.einsum("kn,kn->n", integers, integers)
    fit: Floats = product / np.maximum(square, 1)
    return product * fit, np.where(fit > 0, fit, 1)


def _error(block: Floats, scale: Floats | np.float32, bits: int) -> Floats:
    rest = block - np.clip(np.rint(block / scale), *_LEVELS[bits]) * scale
    error: Floats = np.einsum("kn,kn->n", rest, rest)
    return error
