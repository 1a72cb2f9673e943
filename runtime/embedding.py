"""The byte and hash embedding tables: a memory-mapped file of which a byte reads one row per table.

At the released sizes the file has gigabytes and a byte touches kilobytes, so only rows that are read are ever
loaded, those of a chunk of text together (`EmbeddingTable.read_ahead`), and quantized rows become float32
only then.

A row in the file, all little endian. float32, float16: its values. int8: a float32 scale, then one signed
byte a value. int4: a float16 scale for each block of 32 values, then 16 bytes a block, the earlier value in
the low half of a byte, two's complement, the last block filled up with zeros. A value is its whole number
times its scale. Scales lie beside their values, so that a row is one read of the disk.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .embedding_spec import TABLE_BLOCK, EmbeddingSpec
from .errors import BundleError
from .files import open_plain
from .hashing import hash_rows

__all__ = ["EmbeddingTable", "as_rows", "row_decoder"]

Rows = NDArray[Any]
Floats = NDArray[np.float32]

# Both values of a byte, float32 [256, 2]: one lookup instead of shifts, masks and a cast.
_NIBBLES = ((np.arange(256)[:, None] >> np.array([0, 4]) & 15) ^ 8).astype(np.float32) - 8

# Tables up to this size, in bytes, are in memory soon; and few rows are there as soon as they are told of.
_NEVER_RESIDENT = 256 << 20
_FEW = 32

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
    result: Floats = np.multiply(rows[..., 4:].view(np.int8), rows[..., :4].view("<f4"), dtype=np.float32)
    return result


def _decode_int4(rows: Rows, blocks: int, width: int) -> Floats:
    scales = rows[..., : 2 * blocks].view("<f2").astype(np.float32)
    values = _NIBBLES.take(rows[..., 2 * blocks :], axis=0).reshape(*rows.shape[:-1], blocks, TABLE_BLOCK)
    values *= scales[..., None]
    result: Floats = values.reshape(*rows.shape[:-1], blocks * TABLE_BLOCK)[..., :width]
    return result


class EmbeddingTable:
    """Rows of the byte embedding, then rows of the fused hash table; `embed` adds them up."""

    def __init__(
        self, rows: NDArray[np.generic], spec: EmbeddingSpec, memory: mmap.mmap | None = None
    ) -> None:
        """`rows` is what `as_rows` makes of the file: [spec.rows, ...]; it is read in place.

        memory: the mapped file, where `read_ahead` is to tell the system of it.
        """
        self._rows = rows
        self._row_bytes = spec.row_bytes
        large = memory is not None and len(memory) > _NEVER_RESIDENT
        self._memory = memory if large and hasattr(mmap, "MADV_WILLNEED") else None
        self._decode = row_decoder(spec)
        self._hash = spec.hash
        self._byte_rows = spec.byte_rows

    @classmethod
    def open(cls, directory: str | os.PathLike[str], spec: EmbeddingSpec) -> EmbeddingTable:
        """Map the file that `spec` names, read-only.

        Raises BundleError when it is missing, no regular file, or has another size than `spec` implies.
        """
        path = Path(directory) / spec.file
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != spec.bytes:
                raise BundleError(
                    f"{path} has {size} bytes, its tables need {spec.bytes}; "
                    "copy the bundle again or export the checkpoint again"
                )
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows lie far apart: reading ahead would fetch megabytes that nobody asks for.
        if hasattr(mmap, "MADV_RANDOM"):
            memory.madvise(mmap.MADV_RANDOM)
        return cls(as_rows(memory, spec), spec, memory)

    def read_ahead(self, ids: NDArray[np.int64], count: int) -> None:
        """Let the system fetch the rows that `embed` of the same will read, all at once and meanwhile.

        One after the other, from a disk and not from memory, a chunk of 256 bytes waits 150 ms for its 1536
        rows; told of before, 20 ms and less. Where they are in memory, telling costs some 5 ms; so it is done
        for chunks of large tables only.
        """
        if self._memory is None or count < _FEW:
            return
        starts = (hash_rows(self._hash, ids, count) + self._byte_rows).ravel() * self._row_bytes
        ends = starts + (self._row_bytes - 1)
        size = mmap.PAGESIZE
        for page in np.unique(np.concatenate([starts // size, ends // size])).tolist():
            self._memory.madvise(mmap.MADV_WILLNEED, page * size, size)

    def embed(self, ids: NDArray[np.int64], count: int) -> NDArray[np.float32]:
        """Embeddings of the last `count` of `ids`, float32 [count, width].

        `ids` is int64 [h + count], each in 0 .. byte_rows - 1: the new ids after `hash.history` previous ones
        (fewer only at the text's start). A position's embedding is its byte row plus its hash rows, functions
        outer and group sizes inner, added one after the other in float32 as the reference does.
        """
        index = np.empty((self._hash.tables + 1, count), np.int64)
        index[0] = ids[len(ids) - count :]
        np.add(hash_rows(self._hash, ids, count).T, self._byte_rows, out=index[1:])
        parts = self._decode(self._rows.take(index, axis=0))
        total: NDArray[np.float32] = parts[0]
        for part in parts[1:]:
            total += part
        return total
