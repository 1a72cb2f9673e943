"""The tables of byte rows and hash rows that a bundle brings: their file and its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .fields import Fields, by
from .hashing import HashSpec
from .names import TABLE_PRECISIONS
from .vocabulary import VOCAB_SIZE

__all__ = ["TABLE_BLOCK", "EmbeddingSpec"]

TABLE_BLOCK = 32
"""Neighbouring values of a row that share a scale in int4 tables."""


@dataclass(frozen=True)
class EmbeddingSpec:
    """The file of byte rows and hash rows, in this order, C order, little endian."""

    file: Annotated[str, Fields.file_name]
    dtype: Annotated[str, by(Fields.choice, tuple(TABLE_PRECISIONS))]
    """One of `TABLE_PRECISIONS`; `embedding` has the layout of a row in each."""
    width: Annotated[int, by(Fields.whole, 1, 1_000_000)]
    byte_rows: Annotated[int, by(Fields.whole, VOCAB_SIZE, VOCAB_SIZE)]
    """Rows of the byte embedding, 260."""
    group_sizes: Annotated[tuple[int, ...], by(Fields.wholes, 1, 1000, 100)]
    """Bytes per hash, one table each and per function."""
    functions: Annotated[int, by(Fields.whole, 0, 1000)]
    hash_vocab: Annotated[int, by(Fields.whole, 1, 2**31 - 1)]
    """Rows of each hash table."""

    @property
    def hash(self) -> HashSpec:
        return HashSpec(group_sizes=self.group_sizes, functions=self.functions, vocab=self.hash_vocab)

    @property
    def rows(self) -> int:
        return self.byte_rows + len(self.group_sizes) * self.functions * self.hash_vocab

    @property
    def precision(self) -> str:
        """The dtype as a user calls it: "fp16", "fp32", "int8" or "int4"."""
        return TABLE_PRECISIONS[self.dtype]

    @property
    def blocks(self) -> int:
        """Blocks of `TABLE_BLOCK` values in a row, the last one maybe not full."""
        return -(-self.width // TABLE_BLOCK)

    @property
    def row_bytes(self) -> int:
        sizes = {
            "float32": 4 * self.width,
            "float16": 2 * self.width,
            "int8": 4 + self.width,
            "int4": self.blocks * (2 + TABLE_BLOCK // 2),
        }
        return sizes[self.dtype]

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes
