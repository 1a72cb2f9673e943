"""Ids are bytes + 4, after BOS; special ids stand for no byte; a stream's text is that of the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from blt_edge.runtime.vocabulary import (
    BOS,
    BYTE_OFFSET,
    EOS,
    SUPPRESSED,
    VOCAB_SIZE,
    Utf8Stream,
    byte_ids,
    decode,
    encode,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# Bytes around which UTF-8's rules change, so that almost-valid sequences are frequent.
EDGES = st.sampled_from([0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xDF])
LEADS = st.sampled_from([0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF])
NASTY = st.lists(st.one_of(EDGES, LEADS), max_size=24).map(bytes)
TEXTS = st.text(max_size=12).map(lambda text: text.encode("utf-8"))
MIXED = st.lists(st.one_of(NASTY, TEXTS, st.binary(max_size=8)), max_size=4).map(b"".join)


def test_the_numbers_of_the_released_models() -> None:
    assert (BOS, EOS, BYTE_OFFSET, VOCAB_SIZE, SUPPRESSED) == (1, 2, 4, 260, (0, 1, 3))


@pytest.mark.parametrize("data", [b"", b"ab", bytes(range(256))])
def test_a_text_is_bos_and_bytes_plus_four(data: bytes) -> None:
    for ids, wanted in (
        (encode(data), [1, *(byte + 4 for byte in data)]),
        (byte_ids(data), [b + 4 for b in data]),
    ):
        assert ids.tolist() == wanted
        assert ids.dtype == np.int64
        ids[:1] = 9  # writable: not a view of the bytes
    assert decode(encode(data)) == decode(byte_ids(data).tolist()) == data


def test_decode_leaves_out_special_ids() -> None:
    assert decode([1, 0, 4 + 65, 2, 3, 4 + 66]) == b"AB"
    assert decode(np.array([69], dtype=np.uint16)) == b"A"


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([4, 260], "id 260 is outside the vocabulary; allowed are 0 to 259"),
        ([-1, 5], "id -1 is outside"),
        ([1.5], "allowed is a list of whole numbers"),
        ([[4, 5]], "allowed is a list of whole numbers"),
        (["a"], "allowed is a list of whole numbers"),
    ],
)
def test_decode_refuses_what_is_no_id(ids: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode(ids)


def streamed(data: bytes, cuts: list[int]) -> str:
    stream = Utf8Stream()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [stream.push(data[start:end]) for start, end in pairwise(edges)]
    return "".join(pieces) + stream.flush()


@settings(max_examples=500)
@given(MIXED, st.lists(st.integers(0, 60), max_size=10))
def test_any_cut_gives_the_text_of_the_whole(data: bytes, cuts: list[int]) -> None:
    assert streamed(data, cuts) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("lead", range(0xC0, 0x100))
def test_every_lead_with_every_second_byte(lead: int) -> None:
    for second in range(256):
        data = bytes([lead, second, 0x80, 0x41])
        assert streamed(data, [1, 2, 3]) == data.decode("utf-8", "replace")


def test_a_character_comes_when_its_last_byte_is_in() -> None:
    stream = Utf8Stream()
    came = [stream.push(bytes([byte])) for byte in "é€😀a".encode()]
    assert came == ["", "é", "", "", "€", "", "", "", "😀", "a"]
    assert stream.flush() == ""


@settings(max_examples=500)
@given(MIXED)
def test_what_came_out_never_changes_and_little_is_held_back(data: bytes) -> None:
    stream, text = Utf8Stream(), ""
    for count, byte in enumerate(data, start=1):
        text += stream.push(bytes([byte]))
        assert data[:count].decode("utf-8", "replace").startswith(text)
        assert 0 <= stream.pending <= 3
        assert text == data[: count - stream.pending].decode("utf-8", "replace")
    assert text + stream.flush() == data.decode("utf-8", "replace")


def test_an_incomplete_tail_is_replaced_and_the_stream_begins_anew() -> None:
    stream = Utf8Stream()
    assert stream.push("a😀".encode()[:-1]) == "a"
    assert stream.pending == 3
    assert stream.flush() == "\ufffd"
    assert stream.pending == 0
    assert stream.flush() == ""
    assert stream.push(b"\x80b") == "\ufffdb"
