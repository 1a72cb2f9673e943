"""The byte and hash embedding tables: a memory-mapped file of which a byte reads one row per table.

At the released sizes the file has gigabytes and a byte touches kilobytes, so nothing is ever loaded ahead,
and quantized rows become float32 only when they are read.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError
from .files import open_plain
from .hashing import hash_rows
from .manifest import EmbeddingSpec
from .table_rows import as_rows, row_decoder

__all__ = ["EmbeddingTable"]


class EmbeddingTable:
    """Rows of the byte embedding, then rows of the fused hash table; `embed` adds them up."""

    def __init__(self, rows: NDArray[np.generic], spec: EmbeddingSpec) -> None:
        """`rows` is what `table_rows.as_rows` makes of the file: [spec.rows, ...]; it is read in place."""
        self._rows = rows
        self._decode = row_decoder(spec)
        self._hash = spec.hash
        self._byte_rows = spec.byte_rows
        self.spec = spec

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
        return cls(as_rows(memory, spec), spec)

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
