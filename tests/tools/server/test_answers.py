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


def pieces(data: bytes, cuts: Sequence[int], prompt: bytes | None = None) -> list[ChoiceChunk]:
    """The chunks of a text as the runtime gives them: whole characters, then what is left."""
    utf8, made, waiting = Utf8Stream(), [], b""
    edges = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(edges):
        waiting += data[start:end]
        text = utf8.push(data[start:end])
        done = len(waiting) - utf8.pending
        if done:
            made.append((text, waiting[:done]))
            waiting = waiting[done:]
    first = len(prompt or b"")
    result, place = [], first
    for text, part in [*made, (utf8.flush(), waiting)]:
        known = details(prompt or b"") if not result else ()
        chunk = GenerationChunk(text, part, details=details(part, place), prompt_details=known)
        result.append(ChoiceChunk(0, chunk))
        place += len(part)
    result[-1] = ChoiceChunk(0, replace(result[-1].chunk, finish_reason="eos", stats=STATS))
    return result


def answered(
    request: CompletionRequest, parts: list[ChoiceChunk]
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    answer = Completion(request, "tiny")
    chunks = [answer.add(piece) for piece in parts]
    return chunks, answer.document, answer.usage_chunk


@given(st.binary(max_size=20) | st.text(max_size=9).map(str.encode), st.lists(st.integers(0, 20), max_size=5))
@example(b"\xed\xa0", [])  # half of a surrogate pair: Python's decoder waits for more
def test_offsets_are_of_the_characters_that_bytes_are_in(data: bytes, cuts: list[int]) -> None:
    request = CompletionRequest((b"",), GenerationOptions(logprobs=2))
    chunks, whole, _ = answered(request, pieces(data, [min(cut, len(data)) for cut in cuts]))
    logprobs = whole["choices"][0]["logprobs"]
    prefixes = [data[: end + 1].decode("utf-8", "replace") for end in range(len(data))]
    assert logprobs["text_offset"] == [len(prefix) - 1 for prefix in prefixes]
    assert logprobs["tokens"] == [token_text(byte + 4) for byte in data]
    text = data.decode("utf-8", "replace")
    assert whole["choices"][0]["text"] == "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    streamed = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert [offset for part in streamed for offset in part] == logprobs["text_offset"]


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_with_the_prompt_in_front(prompt: bytes, data: bytes) -> None:
    request = CompletionRequest((prompt,), GenerationOptions(logprobs=0), echo=True)
    _, whole, _ = answered(request, pieces(data, [1], prompt))
    choice = whole["choices"][0]
    shown = prompt.decode("utf-8", "replace")
    assert choice["text"] == shown + data.decode("utf-8", "replace")
    assert len(choice["logprobs"]["tokens"]) == len(prompt + data)
    if data:
        assert choice["logprobs"]["text_offset"][len(prompt)] == len(shown)


def test_tokens() -> None:
    told = {4: "\x00", 69: "A", 131: "\x7f", 132: r"bytes:\x80", 259: r"bytes:\xff", 2: "<eos>"}
    assert {number: token_text(number) for number in told} == told
    assert len({token_text(number) for number in range(260)}) == 260


def test_top_logprobs_name_the_likely_and_the_chosen() -> None:
    request = CompletionRequest((b"",), GenerationOptions(logprobs=1))
    _, whole, _ = answered(request, pieces(b"a", []))
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-1.5]
    assert logprobs["top_logprobs"] == [{"<eos>": -0.25, "a": -1.5}]


def test_details_and_counts() -> None:
    request = CompletionRequest((b"abc",), GenerationOptions(), include_usage=True, blt_details=True)
    chunks, whole, last = answered(request, pieces(b"de", [1], b"abc"))
    assert [byte["byte"] for byte in chunks[0]["blt"]["prompt"]] == list(b"abc")
    assert chunks[0]["blt"]["bytes"] == [
        {"byte": 100, "position": 3, "starts_patch": True, "entropy": 0.5, "guessed": False}
    ]
    assert all("prompt" not in chunk["blt"] for chunk in chunks[1:])
    stats = chunks[-1]["blt"]["stats"]
    assert (stats["new_bytes"], stats["patches"], stats["bytes_per_second"]) == (5, 3, 10.0)
    assert chunks[-1]["blt"]["finish_reason"] == "eos"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"] == whole["usage"]
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert last["choices"] == []
    told = whole["choices"][0]["blt"]
    assert [byte["position"] for byte in told["bytes"]] == [3, 4]
    assert len(told["prompt"]) == 3
    assert told["stats"] == stats


@pytest.mark.parametrize(
    ("reason", "told"), [("eos", "stop"), ("stop", "stop"), ("length", "length"), ("context", "length")]
)
def test_reasons(reason: Any, told: str) -> None:
    request = CompletionRequest((b"",), GenerationOptions())
    chunk = Completion(request, "tiny").add(ChoiceChunk(0, GenerationChunk("", b"", reason, STATS)))
    assert chunk["choices"][0]["finish_reason"] == told


def test_events_are_one_line_of_ascii() -> None:
    data = event({"text": "a\nb\u2028é\ud800"})
    assert data.startswith(b"data: {")
    assert data.endswith(b"}\n\n")
    assert data.count(b"\n") == 2
    assert json.loads(data[6:])["text"] == "a\nb\u2028é\ud800"
    with pytest.raises(ValueError, match="not JSON compliant"):
        event({"entropy": float("nan")})
