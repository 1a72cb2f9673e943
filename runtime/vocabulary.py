"""Bytes and ids: id = byte + 4, after four special ids. There is no vocabulary file.

A text always begins with `BOS`. Of the special ids only `EOS` may be generated.

Text from a stream of bytes: a character comes out when its last byte is in, never in halves.
"""

from __future__ import annotations

import codecs

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BOS",
    "BYTE_OFFSET",
    "EOS",
    "SUPPRESSED",
    "VOCAB_SIZE",
    "Utf8Stream",
    "byte_ids",
    "decode",
    "encode",
]

BOS = 1
"""The id that every text begins with."""

EOS = 2
"""The id that ends a text."""

BYTE_OFFSET = 4
"""The id of byte 0; the ids below it are special."""

VOCAB_SIZE = BYTE_OFFSET + 256
"""Number of ids: 260."""

SUPPRESSED = (0, BOS, 3)
"""The ids that are never generated: all special ids but `EOS`."""


def byte_ids(data: bytes) -> NDArray[np.int64]:
    """The ids of `data`, int64 [len(data)], without BOS: the continuation of a text."""
    ids = np.frombuffer(data, dtype=np.uint8).astype(np.int64)
    ids += BYTE_OFFSET
    return ids


def encode(data: bytes) -> NDArray[np.int64]:
    """The ids of a whole text: BOS, then `data`. int64 [1 + len(data)]."""
    ids = np.empty(1 + len(data), dtype=np.int64)
    ids[0] = BOS
    ids[1:] = np.frombuffer(data, dtype=np.uint8)
    ids[1:] += BYTE_OFFSET
    return ids


def decode(ids: ArrayLike) -> bytes:
    """The bytes that `ids` stand for. Special ids stand for none and are left out.

    Raises ValueError for an id outside 0..259.
    """
    values = np.asarray(ids)
    if values.size == 0:
        return b""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"ids are {values.dtype} of shape {list(values.shape)}; allowed is a list of whole numbers"
        )
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= VOCAB_SIZE:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"id {wrong} is outside the vocabulary; allowed are 0 to {VOCAB_SIZE - 1}")
    values = values.astype(np.int64)
    return (values[values >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()


class Utf8Stream:
    """Decodes UTF-8 that arrives in pieces.

    All that `push` returned, then what `flush` returns, is equal to `data.decode("utf-8", "replace")`
    of all the bytes, however they were cut: each maximal invalid piece becomes one U+FFFD. At most
    three bytes are held back.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """The characters that are certain now. An incomplete last character waits for its next byte."""
        return self._decoder.decode(data)

    @property
    def pending(self) -> int:
        """Bytes held back, 0 to 3."""
        return len(self._decoder.getstate()[0])

    def flush(self) -> str:
        """Ends the text: U+FFFD for an incomplete tail, else nothing. The next push begins a new text."""
        return self._decoder.decode(b"", final=True)
