"""Rotary position embedding's constants: inverse frequencies and the factor on cos and sin, without torch.

The types whose frequencies do not depend on the text's length: default, linear, llama3 and yarn. Arithmetic
is float32 in the reference's order (transformers' `modeling_rope_utils`): values agree to float32 rounding.
BLT rotates interleaved pairs (0,1), (2,3)...; that is the graphs' business, the frequencies are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ROPE_TYPES", "RopeConfig", "inverse_frequencies"]

ROPE_TYPES = ("default", "linear", "llama3", "yarn")

Frequencies = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one part of the model; what a type does not use is None."""

    rope_type: str
    """One of `ROPE_TYPES`."""
    theta: float
    """Base of the wavelengths."""
    factor: float | None = None
    """linear, llama3, yarn: stretch of the positions. None (yarn only): maximum over original positions."""
    original_max_positions: int | None = None
    """llama3, yarn: positions before the stretch. None: the part's own maximum."""
    low_freq_factor: float | None = None
    """llama3: wavelengths over original positions / this are stretched fully."""
    high_freq_factor: float | None = None
    """llama3: wavelengths under original positions / this are not stretched."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin. None: derived from `factor`, `mscale` and `mscale_all_dim`."""
    beta_fast: float | None = None
    """yarn: rotations from which nothing is stretched. None: 32."""
    beta_slow: float | None = None
    """yarn: rotations up to which all is stretched. None: 1."""
    mscale: float | None = None
    """yarn: see `attention_factor`; used only together with `mscale_all_dim`."""
    mscale_all_dim: float | None = None
    """yarn: see `attention_factor`."""
    truncate: bool = True
    """yarn: round the ramp's ends outwards to whole dimensions."""


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Frequencies, float]:
    """Inverse frequencies float32 [head_dim / 2] in radians a position, and the factor on both cos and sin.

    `max_positions` stands in where yarn or llama3 names no original length. Raises ValueError for a type that
    is not in `ROPE_TYPES`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    plain = np.float32(1.0) / wavelengths
    if rope.rope_type == "default":
        return plain, 1.0
    if rope.rope_type == "linear":
        return plain / np.float32(_given(rope.factor)), 1.0
    original = rope.original_max_positions or max_positions
    if rope.rope_type == "llama3":
        return _llama3(rope, plain, original), 1.0
    if rope.rope_type == "yarn":
        factor = max_positions / original if rope.factor is None else rope.factor
        ramp = _yarn_ramp(rope, head_dim, original)
        stretched = np.float32(1.0) / (np.float32(factor) * wavelengths)
        blended = (stretched * ramp + plain * (np.float32(1.0) - ramp)).astype(np.float32)
        return blended, _yarn_scale(rope, factor)
    raise ValueError(f"rope type {rope.rope_type!r}: allowed are {', '.join(ROPE_TYPES)}")


def _llama3(rope: RopeConfig, plain: Frequencies, original: int) -> Frequencies:
    factor = np.float32(_given(rope.factor))
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    wavelengths = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1.0) - smooth) * plain / factor + smooth * plain
    result = np.where(wavelengths > original / low, plain / factor, blended)
    return np.where(wavelengths < original / high, plain, result).astype(np.float32)


def _yarn_ramp(rope: RopeConfig, head_dim: int, original: int) -> Frequencies:
    """Share of the stretched frequency in each pair: 0 for fast pairs, 1 for slow ones."""

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the reference's way round a division by zero
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)


def _yarn_scale(rope: RopeConfig, factor: float) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _given(value: float | None) -> float:
    if value is None:
        raise ValueError("this rope type needs a parameter that is None")
    return value
