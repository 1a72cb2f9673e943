"""Completion objects: tokens, offsets and counts, against the text itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from blt_edge.runtime import ByteDetail, GenerationChunk, GenerationOptions, GenerationStats
from blt_edge.runtime.vocabulary import Utf8Stream
from blt_edge.tools.server.answers import Completion, event, token_text
from blt_edge.tools.server.requests import CompletionRequest
from blt_edge.tools.server.service import ChoiceChunk
from hypothesis import example, given
from hypothesis import strategies as st

STATS = GenerationStats(3, 5, 4, 0.1, 0.2, 0.5, {"decoder": 0.3}, {"decoder": 5}, 100, 2, 4, 3, 1)


def details(data: bytes, first: int = 0) -> tuple[ByteDetail, ...]:
    return tuple(
        ByteDetail(byte, first + place, place % 3 == 0, 0.5, False, -1.5, ((2, -0.25), (byte + 4, -1.5)))
        for place, byte in enumerate(data)
    )


def pieces(data: bytes, cuts: Sequence[int]) -> list[ChoiceChunk]:
    """The chunks of a text as the runtime gives them: whole characters, then what is left."""
    utf8, made, waiting = Utf8Stream(), [], b""
    for start, end in pairwise([0, *sorted(cuts), len(data)]):
        waiting += data[start:end]
        text = utf8.push(data[start:end])
        if done := len(waiting) - utf8.pending:
            made.append((text, waiting[:done]))
            waiting = waiting[done:]
    result, place = [], 0
    for text, part in [*made, (utf8.flush(), waiting)]:
        result.append(ChoiceChunk(0, GenerationChunk(text, part, details=details(part, place))))
        place += len(part)
    result[-1] = ChoiceChunk(0, replace(result[-1].chunk, finish_reason="eos", stats=STATS))
    return result


def answered(logprobs: int, parts: list[ChoiceChunk]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    answer = Completion(CompletionRequest((b"",), GenerationOptions(logprobs=logprobs)), "tiny")
    return [answer.chunks(piece)[0] for piece in parts], answer.document


@given(st.binary(max_size=20) | st.text(max_size=9).map(str.encode), st.lists(st.integers(0, 20), max_size=5))
@example(b"\xed\xa0", [])  # half of a surrogate pair: Python's decoder waits for more
def test_offsets_are_of_the_characters_that_bytes_are_in(data: bytes, cuts: list[int]) -> None:
    chunks, whole = answered(2, pieces(data, [min(cut, len(data)) for cut in cuts]))
    logprobs = whole["choices"][0]["logprobs"]
    prefixes = [data[: end + 1].decode("utf-8", "replace") for end in range(len(data))]
    assert logprobs["text_offset"] == [len(prefix) - 1 for prefix in prefixes]
    assert logprobs["tokens"] == [token_text(byte + 4) for byte in data]
    text = data.decode("utf-8", "replace")
    assert whole["choices"][0]["text"] == "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    streamed = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert [offset for part in streamed for offset in part] == logprobs["text_offset"]


def test_tokens_and_top_logprobs() -> None:
    told = {4: "\x00", 69: "A", 131: "\x7f", 132: r"bytes:\x80", 259: r"bytes:\xff", 2: "<eos>"}
    assert {number: token_text(number) for number in told} == told
    assert len({token_text(number) for number in range(260)}) == 260
    _, whole = answered(1, pieces(b"a", []))
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-1.5]
    assert logprobs["top_logprobs"] == [{"<eos>": -0.25, "a": -1.5}]  # the likely and the chosen


def test_reasons() -> None:
    for reason, told in {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}.items():
        answer = Completion(CompletionRequest((b"",), GenerationOptions()), "tiny")
        (chunk,) = answer.chunks(ChoiceChunk(0, GenerationChunk("", b"", reason, STATS)))
        assert chunk["choices"][0]["finish_reason"] == told


def test_events_are_one_line_of_ascii() -> None:
    data = event({"text": "a\nb\u2028é\ud800"})
    assert (data[:7], data[-3:], data.count(b"\n")) == (b"data: {", b"}\n\n", 2)
    assert json.loads(data[6:])["text"] == "a\nb\u2028é\ud800"
    with pytest.raises(ValueError, match="not JSON compliant"):
        event({"entropy": float("nan")})
