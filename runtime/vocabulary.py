"""Text, bytes and ids: id = byte + 4, after four special ids. There is no vocabulary file.

A text always begins with `BOS`. Of the special ids only those that end a text may be generated: `EOS`, and
whatever a model names beside it (`generation_spec`). Where text comes from a
stream of bytes (`Utf8Stream`), a character comes out when its last byte is in, never in halves.
"""

from __future__ import annotations

import codecs

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import OptionError
from .fields import checked_bytes, shown
from .names import BOS, BYTE_OFFSET, EOS, VOCAB_SIZE

__all__ = [
    "BOS",
    "BYTE_OFFSET",
    "EOS",
    "SUPPRESSED",
    "VOCAB_SIZE",
    "Utf8Stream",
    "byte_ids",
    "checked_ids",
    "decode",
    "encode",
]

SUPPRESSED = (0, BOS, 3)
"""The special ids but `EOS`: never generated, unless a model ends texts with one."""


def byte_ids(data: str | bytes) -> NDArray[np.int64]:
    """The ids of `data`, int64 [its bytes], without BOS: the continuation of a text. A str is taken as UTF-8.

    Raises OptionError for what is neither.
    """
    return np.frombuffer(checked_bytes("data", data), dtype=np.uint8).astype(np.int64) + BYTE_OFFSET


def encode(data: str | bytes) -> NDArray[np.int64]:
    """The ids of a whole text: BOS, then those of `byte_ids`. int64 [1 + its bytes]."""
    return np.concatenate([np.array([BOS], np.int64), byte_ids(data)])


def decode(ids: ArrayLike) -> bytes:
    """The bytes that `ids` stand for. Special ids stand for none and are left out.

    Raises OptionError as `checked_ids` does.
    """
    values = checked_ids(ids)
    return (values[values >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()


def checked_ids(ids: ArrayLike) -> NDArray[np.int64]:
    """`ids` as int64 [n]. Raises OptionError unless they are a list of whole numbers from 0 to 259."""
    try:
        values = np.asarray(ids)
    except Exception:  # of many kinds: lists of lists that are not alike, what only looks like an array
        values = np.empty(0, object)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu") or values.dtype == object:
        raise OptionError(
            f"ids are {shown(ids)}; allowed is a list of whole numbers from 0 to {VOCAB_SIZE - 1}, which "
            "encode and byte_ids make of text"
        )
    for wrong in values[(values < 0) | (values >= VOCAB_SIZE)] if values.size else ():
        raise OptionError(f"id {wrong} is outside the vocabulary; allowed are 0 to {VOCAB_SIZE - 1}")
    return values.astype(np.int64, copy=False)


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
