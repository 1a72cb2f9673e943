"""How a row of the embedding tables lies in the file, and how it becomes float32 again. All little endian.

float32, float16: the row's values. int8: a float32 scale, then one signed byte a value. int4: a float16 scale
for each block of 32 values, then 16 bytes a block, the earlier value in the low half of a byte, two's
complement, the last block filled up with zeros. A value is its whole number times its scale. Scales lie
beside their values, so that a row is one read of the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .specs import TABLE_BLOCK, EmbeddingSpec

__all__ = ["INT8_SCALE_BYTES", "as_rows", "row_decoder"]

INT8_SCALE_BYTES = 4

Rows = NDArray[Any]
Floats = NDArray[np.float32]

# Both values of a byte, float32 [256, 2]: one lookup instead of shifts, masks and a cast.
_NIBBLES = ((np.arange(256)[:, None] >> np.array([0, 4]) & 15) ^ 8).astype(np.float32) - 8

_FLOAT16_BITS = np.int32(0x8FFFE000 - (1 << 32))
_FLOAT16_BIAS = np.float32(2.0**112)


def as_rows(memory: Any, spec: EmbeddingSpec) -> Rows:
    """The file's rows over a buffer, not copied: float [n, width], or uint8 [n, row_bytes] where rows hold
    scales.
    """
    if spec.dtype in ("float16", "float32"):
        return np.frombuffer(memory, np.dtype(spec.dtype).newbyteorder("<")).reshape(-1, spec.width)
    return np.frombuffer(memory, np.uint8).reshape(-1, spec.row_bytes)


def row_decoder(spec: EmbeddingSpec) -> Callable[[Rows], Floats]:
    """A function from contiguous rows as `as_rows` gives them, [..., row], to float32 [..., width]."""
    if spec.dtype == "int8":
        return _decode_int8
    if spec.dtype == "int4":
        return lambda rows: _decode_int4(rows, spec.blocks, spec.width)
    return _decode_float16 if spec.dtype == "float16" else lambda rows: rows.astype(np.float32, copy=False)


def _decode_float16(rows: Rows) -> Floats:
    # numpy's own cast takes one value at a time. Moved to float32's place, sign and fraction are right and
    # the exponent lacks the difference of the biases, also for subnormals; tables hold no infinity or nan.
    bits = rows.view("<i2").astype(np.int32)
    bits <<= 13
    bits &= _FLOAT16_BITS
    values: Floats = bits.view(np.float32)
    values *= _FLOAT16_BIAS
    return values


def _decode_int8(rows: Rows) -> Floats:
    scales = rows[..., :INT8_SCALE_BYTES].view("<f4")
    result: Floats = np.multiply(rows[..., INT8_SCALE_BYTES:].view(np.int8), scales, dtype=np.float32)
    return result


def _decode_int4(rows: Rows, blocks: int, width: int) -> Floats:
    scales = rows[..., : 2 * blocks].view("<f2").astype(np.float32)
    values = _NIBBLES.take(rows[..., 2 * blocks :], axis=0).reshape(*rows.shape[:-1], blocks, TABLE_BLOCK)
    values *= scales[..., None]
    result: Floats = values.reshape(*rows.shape[:-1], blocks * TABLE_BLOCK)[..., :width]
    return result
