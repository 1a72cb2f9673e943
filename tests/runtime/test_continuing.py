"""Generating again in the same sequence: the text and state of one run, however turns end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions, PromptTooLongError, Sequence
from blt_edge.runtime.vocabulary import decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st

PROMPT = b"Alice was beginning to get very tired"
DRAFTS = ["none", "lookup", "decoder", "patcher", "auto"]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> BltModel:
    return BltModel.load(tiny_bundle, threads=1, prefill_chunk=16, rollback=12)


def assert_holds(model: BltModel, sequence: Sequence, text: bytes) -> None:
    assert decode(sequence.ids) == text
    assert sequence.length == 1 + len(text)
    np.testing.assert_allclose(sequence.logits, model.logits(text)[-1], rtol=0, atol=2e-5)


def one_run(model: BltModel, text: bytes, count: int) -> bytes:
    return model.generate(text, GenerationOptions(max_new_bytes=count, draft="none")).data


@pytest.mark.parametrize("draft", DRAFTS)
def test_two_turns_are_one_run(model: BltModel, draft: str) -> None:
    sequence = model.sequence()
    first = model.generate(PROMPT, GenerationOptions(max_new_bytes=30, draft=draft), sequence=sequence)
    assert_holds(model, sequence, PROMPT + first.data)
    second = model.generate("", GenerationOptions(max_new_bytes=40, draft=draft), sequence=sequence)
    assert first.data + second.data == one_run(model, PROMPT, 70)
    assert_holds(model, sequence, PROMPT + first.data + second.data)


def test_a_prompt_between_is_read_after_what_was_there(model: BltModel) -> None:
    sequence = model.sequence()
    text = b""
    for turn in (PROMPT, "é中 ", b"\xff\x00", b""):
        prompt = turn.encode() if isinstance(turn, str) else turn
        result = model.generate(turn, GenerationOptions(max_new_bytes=15), sequence=sequence)
        assert result.data == one_run(model, text + prompt, 15)
        assert result.stats.prompt_bytes == len(prompt)
        text += prompt + result.data
        assert_holds(model, sequence, text)


def test_nothing_is_read_twice(model: BltModel) -> None:
    sequence = model.sequence()
    model.generate(PROMPT, GenerationOptions(max_new_bytes=10, draft="none"), sequence=sequence)
    result = model.generate(b"more", GenerationOptions(max_new_bytes=10, draft="none"), sequence=sequence)
    # One chunk of the prompt, nine bytes as they are chosen, and the last one.
    assert result.stats.stage_calls["decoder"] == result.stats.stage_calls["encoder"] == 11
    assert result.stats.patches <= 4 + 10
    assert sum(spent.calls for spent in sequence.times.values()) > sum(result.stats.stage_calls.values())


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_stop_string_is_taken_back(model: BltModel, draft: str) -> None:
    free = one_run(model, PROMPT, 60)
    for start, size in ((0, 2), (7, 1), (20, 5), (3, 40)):  # the last is longer than can be rolled back
        sequence = model.sequence()
        stop = free[start : start + size]
        options = GenerationOptions(max_new_bytes=60, draft=draft, draft_length=8, stop=(stop,))
        result = model.generate(PROMPT, options, sequence=sequence)
        assert result.finish_reason == "stop"
        assert_holds(model, sequence, PROMPT + free[: free.index(stop)])
        again = model.generate(b"", GenerationOptions(max_new_bytes=30, draft=draft), sequence=sequence)
        assert result.data + again.data == free[: len(result.data) + 30]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("taken", [0, 1, 7, 20])
def test_closing_the_stream_keeps_what_was_yielded(model: BltModel, draft: str, taken: int) -> None:
    free = one_run(model, PROMPT, 60)
    # A stop string of which the beginning is held back.
    options = GenerationOptions(
        max_new_bytes=60, draft=draft, draft_length=8, stop=(free[taken : taken + 6] + b"\x00never",)
    )
    sequence = model.sequence()
    text = b""
    chunks = model.stream(PROMPT, options, sequence=sequence)
    for chunk in chunks:
        text += chunk.data
        if len(text) > taken or chunk.finish_reason:
            break
    chunks.close()  # type: ignore[attr-defined]
    assert free.startswith(text)
    assert_holds(model, sequence, PROMPT + text)
    more = model.generate(b"", GenerationOptions(max_new_bytes=20, draft=draft), sequence=sequence).data
    assert more == free[len(text) : len(text) + 20] or len(text) > 40


def test_a_stream_that_never_began_reads_nothing(model: BltModel) -> None:
    sequence = model.sequence()
    model.stream(PROMPT, sequence=sequence).close()  # type: ignore[attr-defined]
    assert sequence.length == 0


@pytest.mark.parametrize("draft", DRAFTS)
def test_cancelling_loses_nothing(model: BltModel, draft: str) -> None:
    sequence, cancel = model.sequence(), threading.Event()
    text = b""
    options = GenerationOptions(max_new_bytes=60, draft=draft)
    for chunk in model.stream(PROMPT, options, sequence=sequence, cancel=cancel):
        text += chunk.data
        if len(text) >= 9:
            cancel.set()
    assert chunk.finish_reason == "cancelled"
    assert_holds(model, sequence, PROMPT + text)
    more = model.generate(b"", GenerationOptions(max_new_bytes=20, draft=draft), sequence=sequence).data
    assert text + more == one_run(model, PROMPT, len(text) + 20)


def test_cancelled_inside_the_prompt_the_rest_can_follow(model: BltModel) -> None:
    sequence, cancel = model.sequence(), threading.Event()
    cancel.set()
    prompt = PROMPT * 3
    result = model.generate(prompt, GenerationOptions(), sequence=sequence, cancel=cancel)
    assert (result.finish_reason, result.data) == ("cancelled", b"")
    assert 0 < sequence.length < len(prompt)
    rest = prompt[sequence.length - 1 :]
    more = model.generate(rest, GenerationOptions(max_new_bytes=20), sequence=sequence).data
    assert more == one_run(model, prompt, 20)
    assert_holds(model, sequence, prompt + more)


def test_at_the_last_position_only_the_last_byte_is_missing(model: BltModel) -> None:
    sequence = model.sequence()
    prompt = (b"abc " * 100)[:390]
    options = GenerationOptions(max_new_bytes=50, temperature=1.0, seed=1)
    result = model.generate(prompt, options, sequence=sequence)
    assert result.finish_reason == "context"
    assert len(result.data) == 10  # 391 read; nine more positions, and a byte that needs none
    assert sequence.length == 400
    text = prompt + result.data
    assert decode(sequence.ids) == text[:-1]
    with pytest.raises(PromptTooLongError):
        model.generate(text[sequence.length - 1 :], options, sequence=sequence)
    sequence.roll_back(30)
    assert_holds(model, sequence, text[:369])


def test_a_character_cut_at_the_limit_stays_whole_in_the_state(model: BltModel) -> None:
    for count in range(1, 40):
        options = GenerationOptions(max_new_bytes=count, temperature=1.0, seed=9)
        sequence = model.sequence()
        result = model.generate("é中".encode(), options, sequence=sequence)
        assert decode(sequence.ids) == "é中".encode() + result.data
        if not result.text.isascii() and result.text.endswith("\ufffd"):
            assert_holds(model, sequence, "é中".encode() + result.data)


def test_details_go_on_counting(model: BltModel) -> None:
    options = GenerationOptions(max_new_bytes=12, logprobs=3)
    sequence = model.sequence()
    parts = [model.generate(turn, options, sequence=sequence) for turn in (PROMPT, b"", b"and")]
    text = PROMPT + parts[0].data + parts[1].data + b"and" + parts[2].data
    entropies, starts = model.entropies(text), np.cumsum([0, *model.patch_lengths(text)])
    for detail in [detail for part in parts for detail in part.details]:
        assert text[detail.position] == detail.byte
        assert detail.entropy == pytest.approx(entropies[detail.position], abs=1e-5)
        assert detail.starts_patch == (1 + detail.position in starts)
    assert [d.position for d in parts[1].details] == list(range(len(PROMPT) + 12, len(PROMPT) + 24))


def test_the_repetition_penalty_sees_the_earlier_text(model: BltModel) -> None:
    options = GenerationOptions(max_new_bytes=20, repetition_penalty=1.7)
    sequence = model.sequence()
    first = model.generate(PROMPT, options, sequence=sequence).data
    second = model.generate(b"", options, sequence=sequence).data
    assert first + second == model.generate(PROMPT, GenerationOptions(40, repetition_penalty=1.7)).data


def test_an_own_sequence_with_text_in_it(model: BltModel) -> None:
    sequence = model.sequence()
    sequence.append(encode(PROMPT))
    sequence.roll_back(9)
    result = model.generate(b"", GenerationOptions(max_new_bytes=20), sequence=sequence)
    assert result.data == one_run(model, PROMPT[:-9], 20)


turns = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.one_of(st.binary(max_size=20), st.sampled_from([b"", b"the ", "中é".encode()])),
            "draft": st.sampled_from(DRAFTS),
            "length": st.one_of(st.none(), st.integers(1, 32)),
            "count": st.integers(1, 30),
            "temperature": st.sampled_from([0.0, 1.0]),
            "stop": st.sampled_from([(), (b"e",), (b"\x80", b"a"), (b"th",)]),
            "end": st.sampled_from(["itself", "close", "cancel"]),
            "after": st.integers(0, 20),
        }
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=40)
@given(turns=turns)
def test_any_turns_leave_the_state_of_their_text(model: BltModel, turns: list[dict[str, Any]]) -> None:
    sequence, text = model.sequence(), b""
    for turn in turns:
        options = GenerationOptions(
            max_new_bytes=turn["count"],
            draft=turn["draft"],
            draft_length=turn["length"],
            temperature=turn["temperature"],
            seed=2,
            stop=turn["stop"],
        )
        prompt = turn["prompt"]
        text += prompt
        cancel, made = threading.Event(), b""
        chunks = model.stream(prompt, options, sequence=sequence, cancel=cancel)
        for chunk in chunks:
            made += chunk.data
            if len(made) >= turn["after"] and turn["end"] == "cancel":
                cancel.set()
            if len(made) >= turn["after"] and turn["end"] == "close":
                chunks.close()  # type: ignore[attr-defined]
        whole = model.generate(text, options)
        assert whole.data.startswith(made)
        if turn["end"] == "itself":
            assert made == whole.data
        text += made
        assert decode(sequence.ids) == text
    assert_holds(model, sequence, text)
