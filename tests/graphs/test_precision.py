"""What users may write for --precision, and what it means."""

from __future__ import annotations

import pytest
from blt_edge.graphs.precision import (
    BLOCK_SIZES,
    LARGE_MATRIX,
    MIXES,
    block_size_for,
    check_block_size,
    format_precision,
    needs_ranges,
    parse_precision,
)
from blt_edge.runtime.errors import OptionError
from blt_edge.runtime.names import PRECISIONS
from hypothesis import given
from hypothesis import strategies as st

STAGES = ("patcher", "encoder", "latent", "decoder")


@pytest.mark.parametrize("word", MIXES)
def test_a_word_covers_every_stage(word: str) -> None:
    assert parse_precision(word, STAGES) == MIXES[word]
    assert list(parse_precision(word, STAGES)) == list(STAGES)
    assert set(MIXES[word].values()) <= set(PRECISIONS)


def test_patcher_keeps_more_than_the_rest() -> None:
    assert MIXES["int8"]["patcher"] == MIXES["int4"]["patcher"] == "int8w"


def test_list_names_stages_and_leaves_the_others_alone() -> None:
    text = "patcher=fp32, encoder=int8,latent=int4 ,decoder=int8"
    assert parse_precision(text, STAGES) == dict(zip(STAGES, ("fp32", "int8", "int4", "int8"), strict=True))
    assert parse_precision("latent=int4", STAGES)["decoder"] == "fp32"


def test_list_changes_a_mix() -> None:
    assert parse_precision("int4,decoder=int8w", STAGES) == {**MIXES["int4"], "decoder": "int8w"}


def test_model_without_patcher() -> None:
    assert "patcher" not in parse_precision("int4", STAGES[1:])
    with pytest.raises(OptionError, match="stage 'patcher', this model has encoder, latent, decoder"):
        parse_precision("patcher=int8", STAGES[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3", "got 'int3', allowed are fp32, fp16"),
        ("", "got ''"),
        ("int4,", "got 'int4,'"),
        ("decoder=int4,int8", "got 'decoder=int4,int8'"),
        ("decodr=int4", "got stage 'decodr', this model has patcher, encoder, latent, decoder"),
        ("decoder=int2", "got 'int2' for decoder, allowed are fp32, fp16, int8, int8w, int4"),
        ("decoder=", "got '' for decoder"),
        ("decoder=int4,decoder=int8", "decoder is named twice"),
    ],
)
def test_bad_words_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        parse_precision(text, STAGES)
    assert "\n" not in str(caught.value)


@given(st.tuples(*[st.sampled_from(PRECISIONS)] * 4))
def test_formatting_is_read_back(words: tuple[str, ...]) -> None:
    precisions = dict(zip(STAGES, words, strict=True))
    assert parse_precision(format_precision(precisions), STAGES) == precisions
    assert needs_ranges(precisions) == ("int8" in words)


@pytest.mark.parametrize("word", MIXES)
def test_mixes_are_formatted_as_words(word: str) -> None:
    assert format_precision(MIXES[word]) == word
    assert format_precision({**MIXES["int4"], "patcher": "fp16"}) == "int4,patcher=fp16"
    assert format_precision({**MIXES["fp32"], "decoder": "fp16"}) == "decoder=fp16"


@pytest.mark.parametrize("size", [0, 16, 33, -32, True, 256])
def test_block_sizes(size: int) -> None:
    with pytest.raises(OptionError, match=r"block size: got .*, allowed are 32, 64, 128"):
        check_block_size(size)
    for allowed in (None, *BLOCK_SIZES):
        check_block_size(allowed)


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_block_sizes_are_the_largest_of_a_large_matrix_and_the_smallest_of_others(
    inputs: int, outputs: int
) -> None:
    found = block_size_for(inputs, outputs)
    allowed = [size for size in BLOCK_SIZES if inputs // size * size == inputs]
    if not allowed:
        assert found is None
        assert inputs % 32
    else:
        assert found == (max(allowed) if inputs * outputs >= LARGE_MATRIX else 32)


@pytest.mark.parametrize(
    ("inputs", "outputs", "size"),
    [
        (2048, 6144, 128),
        (768, 768, 128),
        (2816, 1024, 128),
        (1984, 1024, 64),
        (2080, 1024, 32),
        (1024, 512, 128),
        (1024, 511, 32),
        (512, 512, 32),
        (2050, 1024, None),
    ],
)
def test_block_sizes_of_some_matrices(inputs: int, outputs: int, size: int | None) -> None:
    assert block_size_for(inputs, outputs) == size
