"""Words against `bytes.split`, however a text is cut."""

from __future__ import annotations

from blt_edge.runtime.words import WordCounter, count_words
from hypothesis import given
from hypothesis import strategies as st

TEXTS = st.binary(max_size=60) | st.text(" \t\n\r\x0b\x0c\x1c\x85ab\u00e9\u3000", max_size=40).map(str.encode)


@given(TEXTS)
def test_words_are_what_split_gives(data: bytes) -> None:
    assert count_words(data) == len(data.split())


@given(st.lists(TEXTS, max_size=6))
def test_pieces_are_counted_as_one(parts: list[bytes]) -> None:
    counter = WordCounter()
    for part in parts:
        counter.add(part)
    assert counter.count == len(b"".join(parts).split())
