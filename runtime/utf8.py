"""Text from a stream of bytes: a character comes out when its last byte is in, never in halves."""

from __future__ import annotations

import codecs

__all__ = ["Utf8Stream"]


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
