"""Ids are bytes + 4, after BOS; special ids stand for no byte."""

from __future__ import annotations

import numpy as np
import pytest
from blt_edge.runtime.vocabulary import (
    BOS,
    BYTE_OFFSET,
    EOS,
    SUPPRESSED,
    VOCAB_SIZE,
    byte_ids,
    decode,
    encode,
)
from hypothesis import given
from hypothesis import strategies as st


def test_the_numbers_of_the_released_models() -> None:
    assert (BOS, EOS, BYTE_OFFSET, VOCAB_SIZE, SUPPRESSED) == (1, 2, 4, 260, (0, 1, 3))


def test_encode_is_bos_and_bytes_plus_four() -> None:
    every = bytes(range(256))
    assert encode(every).tolist() == [1, *range(4, 260)]
    assert byte_ids(every).tolist() == list(range(4, 260))
    assert encode(b"").tolist() == [1]
    assert byte_ids(b"").tolist() == []


def test_ids_are_int64_and_the_callers_own() -> None:
    for ids in (encode(b"ab"), byte_ids(b"ab")):
        assert ids.dtype == np.int64
        ids[0] = 9  # writable: not a view of the bytes


@given(st.binary(max_size=64))
def test_decode_undoes_encode(data: bytes) -> None:
    assert decode(encode(data)) == data
    assert decode(byte_ids(data)) == data
    assert decode(byte_ids(data).tolist()) == data


def test_decode_leaves_out_special_ids() -> None:
    assert decode([1, 0, 4 + 65, 2, 3, 4 + 66]) == b"AB"
    assert decode([]) == b""
    assert decode(np.array([69], dtype=np.uint16)) == b"A"


@pytest.mark.parametrize(("ids", "named"), [([4, 260], "260"), ([-1, 5], "-1")])
def test_decode_names_an_id_outside_the_vocabulary(ids: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=f"id {named} is outside the vocabulary; allowed are 0 to 259"):
        decode(ids)


@pytest.mark.parametrize("ids", [[1.5], [[4, 5]], ["a"]])
def test_decode_refuses_what_is_not_a_list_of_ids(ids: list[object]) -> None:
    with pytest.raises(ValueError, match="allowed is a list of whole numbers"):
        decode(ids)  # type: ignore[arg-type]
