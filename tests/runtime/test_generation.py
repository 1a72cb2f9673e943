"""Streams: what is handed out, when, why they end, and the state they leave to go on in."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions, PromptTooLongError, Sequence, generation
from blt_edge.runtime.generation import GenerationStats, StopMatcher, _borders
from blt_edge.runtime.names import DRAFTS
from blt_edge.runtime.speculation import DraftFigures, Speculator
from blt_edge.runtime.vocabulary import BYTE_OFFSET, EOS, decode, encode
from hypothesis import example, given, settings
from hypothesis import strategies as st

PROMPT = b"Alice was beginning to get very tired"
by_draft = pytest.mark.parametrize("draft", DRAFTS)

# 1. Stop strings.

AB = st.lists(st.sampled_from(b"ab"), max_size=30).map(bytes)
STOPS = st.lists(st.lists(st.sampled_from(b"ab"), min_size=1, max_size=5).map(bytes), max_size=4)


def by_definition(data: bytes, stops: list[bytes]) -> tuple[bytes, bytes | None]:
    """What is emitted in all, and the stop string found: earliest end, then longest."""
    for end in range(1, len(data) + 1):
        here = [stop for stop in stops if data[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return data[: end - len(longest)], longest
    return data, None


EVERY = bytes(range(256))


@settings(max_examples=1000)
@given(AB, STOPS)
@example(b"\xff" + EVERY[:-1] + EVERY + b"tail", [EVERY])
def test_stop_strings_are_found_and_exactly_what_may_begin_one_is_held_back(
    data: bytes, stops: list[bytes]
) -> None:
    matcher, emitted = StopMatcher(stops), b""
    for count, byte in enumerate(data, 1):
        emitted += matcher.push(byte)
        if matcher.found is not None:
            break
        begun = [size for stop in stops for size in range(1, len(stop)) if data[:count].endswith(stop[:size])]
        assert emitted == data[: count - max(begun, default=0)]
    assert (emitted + matcher.held, matcher.found) == by_definition(data, stops)


@given(AB)
def test_borders_are_those_of_the_definition(stop: bytes) -> None:
    prefixes = [stop[:end] for end in range(1, len(stop) + 1)]
    longest = [max(n for n in range(len(prefix)) if prefix.endswith(prefix[:n])) for prefix in prefixes]
    assert _borders(stop) == longest


# 2. One text.


def greedy_by_full_runs(model: BltModel, prompt: bytes, count: int) -> bytes:
    """The same bytes without any cache: the whole text again for every byte."""
    data = b""
    for _ in range(count):
        row = model.logits(prompt + data)[-1].copy()
        row[[0, 1, 3]] = -np.inf
        if row.argmax() == EOS:
            break
        data += bytes([int(row.argmax()) - BYTE_OFFSET])
    return data


def test_greedy_equals_runs_without_state(model: BltModel) -> None:
    result = model.generate(PROMPT, GenerationOptions(max_new_bytes=60))
    assert result.data == greedy_by_full_runs(model, PROMPT, 60)


def test_a_stream_joins_to_the_result_of_its_seed(model: BltModel) -> None:
    options = GenerationOptions(max_new_bytes=80, temperature=1.0, seed=3)
    chunks = list(model.stream(PROMPT, options))
    result = model.generate(PROMPT, options)
    assert "".join(chunk.text for chunk in chunks) == result.text == result.data.decode("utf-8", "replace")
    assert b"".join(chunk.data for chunk in chunks) == result.data
    assert chunks[-1].finish_reason == result.finish_reason
    other = model.generate(PROMPT, GenerationOptions(max_new_bytes=80, temperature=1.0, seed=4))
    assert other.data != result.data


def test_no_prompt_and_str_prompts(model: BltModel) -> None:
    assert model.generate("", GenerationOptions(max_new_bytes=5)).stats.prompt_bytes == 0
    options = GenerationOptions(max_new_bytes=20)
    assert model.generate("é中", options).data == model.generate("é中".encode(), options).data
    # Bytes that are no UTF-8 come from a command line so.
    assert model.generate("a\udcff", options).data == model.generate(b"a\xff", options).data


class Scripted(Speculator):
    """Chooses what it is told to, in rounds of the sizes that it is told."""

    script: list[list[int]]

    def begin(self) -> int:
        self._rest = [list(ids) for ids in self.script]
        super().begin()
        return self._rest.pop(0)[0]

    def round(self, pending: int, most: int) -> list[int]:
        chosen = self._rest.pop(0)[:most]
        self._sequence.append(np.array([pending, *chosen[:-1]], np.int64))
        return chosen


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("rounds", "most", "stop", "text", "reason"),
    [
        (["a", "bc", "d$"], 9, (), "abcd", "eos"),
        (["a", "bc", "d", "$"], 9, (), "abcd", "eos"),
        (["a", "bc", "d"], 4, (), "abcd", "length"),
        (["a", "bcd"], 2, (), "ab", "length"),
        (["a", "bcde"], 9, ("cd",), "ab", "stop"),
        (["a", "bcd, e, f, g, h"], 20, ("cd",), "ab", "stop"),
        (["a", "bcde$"], 9, ("ex",), "abcde", "eos"),
        (["a"], 1, ("a",), "", "stop"),
        (["$"], 5, (), "", "eos"),
        (["\xc3", "\xa9!$"], 9, (), "\xc3\xa9!", "eos"),
        (["a", "\xc3"], 2, (), "a\xc3", "length"),
        # Held back for the stop string, let go in the middle of a character.
        (["a", "\xf0", "\x9f", "\x90", "\x87$"], 9, (b"a\xf0\x9fq",), "a\xf0\x9f\x90\x87", "eos"),
    ],
)
def test_rounds_of_any_size_end_where_they_should(
    model: BltModel,
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
    rounds: list[str],
    most: int,
    stop: tuple[str | bytes, ...],
    text: str,
    reason: str,
) -> None:
    script = [[EOS if one == "$" else BYTE_OFFSET + ord(one) for one in letters] for letters in rounds]
    monkeypatch.setattr(Scripted, "script", script, raising=False)
    monkeypatch.setattr(generation, "Speculator", Scripted)
    sequence = model.sequence() if kept else None
    chunks = list(model.stream(PROMPT, GenerationOptions(max_new_bytes=most, stop=stop), sequence=sequence))
    data = text.encode("latin-1")
    assert b"".join(chunk.data for chunk in chunks) == data
    assert "".join(chunk.text for chunk in chunks) == data.decode("utf-8", "replace")
    *before, last = chunks
    assert {(chunk.finish_reason, chunk.stats) for chunk in before} <= {(None, None)}
    assert last.finish_reason == reason
    for chunk in chunks:
        assert str(chunk) == chunk.text == chunk.data.decode("utf-8", "replace")
    assert last.stats is not None
    assert last.stats.new_bytes == len(data) + (len(stop[0]) if reason == "stop" else 0)
    if sequence is not None:
        assert sequence.ids.tolist() == encode(PROMPT + data).tolist()
    elif reason == "stop":
        # As byte by byte: what a round has read behind the stop string is in no figure, nor is its last byte.
        read = "".join(rounds)[: last.stats.new_bytes - 1].encode("latin-1")
        assert last.stats.patches == len(model.patch_lengths(PROMPT + read))


@pytest.mark.parametrize(("prompt", "text"), [(399, b"a"), (398, b"ab"), (397, b"abc")])
def test_a_byte_needs_a_position_only_once_it_is_read(
    model: BltModel, monkeypatch: pytest.MonkeyPatch, prompt: int, text: bytes
) -> None:
    monkeypatch.setattr(Scripted, "script", [[BYTE_OFFSET + byte] for byte in b"abcdef"], raising=False)
    monkeypatch.setattr(generation, "Speculator", Scripted)
    result = model.generate(b"x" * prompt, GenerationOptions(max_new_bytes=9))
    assert (result.data, result.finish_reason) == (text, "context")


# 3. Figures.


def test_figures_are_of_one_turn_only(model: BltModel) -> None:
    sequence = model.sequence()
    model.generate(PROMPT, GenerationOptions(max_new_bytes=7), sequence=sequence)
    before = {name: (spent.calls, spent.seconds) for name, spent in sequence.times.items()}
    patches = sequence.boundaries.count
    began = time.perf_counter()
    options = GenerationOptions(max_new_bytes=12, draft="none")
    stats = model.generate(b"more", options, sequence=sequence).stats
    passed = time.perf_counter() - began
    spent = sequence.times
    assert stats.stage_calls == {name: spent[name].calls - calls for name, (calls, _) in before.items()}
    assert stats.stage_seconds == {name: spent[name].seconds - past for name, (_, past) in before.items()}
    # One chunk of the prompt, eleven bytes as they are chosen, and the last one: nothing is read twice.
    assert stats.stage_calls["encoder"] == stats.stage_calls["decoder"] == 1 + 12
    assert stats.patches == sequence.boundaries.count - patches > 0
    assert (stats.prompt_bytes, stats.new_bytes) == (4, 12)
    assert stats.state_bytes == sequence.state_bytes > 0
    assert 0 < stats.prefill_seconds < stats.first_byte_seconds
    assert stats.first_byte_seconds < stats.prefill_seconds + stats.decode_seconds < passed
    assert stats.bytes_per_second == 12 / stats.decode_seconds


def test_a_new_text_counts_the_patch_of_bos_and_reads_its_last_byte_never(model: BltModel) -> None:
    stats = model.generate(PROMPT, GenerationOptions(max_new_bytes=5, draft="none")).stats
    text = PROMPT + model.generate(PROMPT, GenerationOptions(max_new_bytes=4)).data
    assert stats.patches == len(model.patch_lengths(text))
    assert stats.stage_calls["decoder"] == stats.new_bytes == 5


def test_what_drafting_has_done_is_in_the_figures(model: BltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(Speculator):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.figures = DraftFigures(1000, 2000, 3000, 4000)

    monkeypatch.setattr(generation, "Speculator", Counted)
    stats = model.generate(PROMPT, GenerationOptions(max_new_bytes=3, draft="none")).stats
    assert (stats.rounds, stats.drafted, stats.accepted, stats.missed) == (1000, 2000, 3000, 4000)


def test_figures_begin_at_nothing() -> None:
    stats = GenerationStats(1, 2, 3, 4.0, 5.0, 0.5)
    names = ("stage_seconds", "stage_calls", "state_bytes", "rounds", "drafted", "accepted", "missed")
    assert [asdict(stats)[name] for name in names] == [{}, {}, 0, 0, 0, 0, 0]
    assert (stats.acceptance, stats.calls_per_byte) == (None, {})


def test_what_follows_from_figures() -> None:
    stats = GenerationStats(10, 20, 6, 1.0, 1.0, 0.5, stage_calls={"encoder": 30}, drafted=8, accepted=6)
    assert (stats.bytes_per_second, stats.milliseconds_per_byte) == (40.0, 25.0)
    assert (stats.text_patches, stats.bytes_per_patch) == (5, 6.0)
    assert (stats.acceptance, stats.calls_per_byte) == (0.75, {"encoder": 1.5})
    none = GenerationStats(0, 0, 0, 1.0, 1.0, 0.0, stage_calls={"encoder": 1})
    assert (none.bytes_per_second, none.milliseconds_per_byte, none.text_patches) == (0.0, 0.0, 0)
    assert (none.bytes_per_patch, none.calls_per_byte) == (0.0, {"encoder": 0.0})


# 4. Going on in the same sequence.


def assert_holds(model: BltModel, sequence: Sequence, text: bytes) -> None:
    assert decode(sequence.ids) == text
    assert sequence.length == 1 + len(text)
    np.testing.assert_allclose(sequence.logits, model.logits(text)[-1], rtol=0, atol=2e-5)


def one_run(model: BltModel, text: bytes, count: int) -> bytes:
    return model.generate(text, GenerationOptions(max_new_bytes=count, draft="none")).data


@by_draft
def test_turns_are_one_run_over_all_of_their_text(tight: BltModel, draft: str) -> None:
    sequence, text = tight.sequence(), b""
    for turn in (PROMPT, "", "é中 ", b"\xff\x00", b""):
        prompt = turn.encode() if isinstance(turn, str) else turn
        result = tight.generate(turn, GenerationOptions(max_new_bytes=20, draft=draft), sequence=sequence)
        assert result.data == one_run(tight, text + prompt, 20)
        assert result.stats.prompt_bytes == len(prompt)
        text += prompt + result.data
        assert_holds(tight, sequence, text)


@by_draft
def test_a_stop_string_is_taken_back(tight: BltModel, draft: str) -> None:
    free = one_run(tight, PROMPT, 60)
    for start, size in ((0, 2), (7, 1), (20, 5), (3, 40)):  # the last is longer than can be rolled back
        sequence = tight.sequence()
        stop = free[start : start + size]
        options = GenerationOptions(max_new_bytes=60, draft=draft, draft_length=8, stop=(stop,))
        result = tight.generate(PROMPT, options, sequence=sequence)
        assert result.finish_reason == "stop"
        assert_holds(tight, sequence, PROMPT + free[: free.index(stop)])
        again = tight.generate(b"", GenerationOptions(max_new_bytes=30, draft=draft), sequence=sequence)
        assert result.data + again.data == free[: len(result.data) + 30]


@by_draft
@pytest.mark.parametrize("taken", [0, 1, 7, 20])
def test_closing_the_stream_keeps_what_was_yielded(tight: BltModel, draft: str, taken: int) -> None:
    free = one_run(tight, PROMPT, 60)
    # A stop string of which the beginning is held back.
    stop = free[taken : taken + 6] + b"\x00never"
    options = GenerationOptions(max_new_bytes=60, draft=draft, draft_length=8, stop=(stop,))
    sequence, text = tight.sequence(), b""
    chunks: Any = tight.stream(PROMPT, options, sequence=sequence)
    for chunk in chunks:
        text += chunk.data
        if len(text) > taken or chunk.finish_reason:
            break
    chunks.close()
    assert free.startswith(text)
    assert_holds(tight, sequence, PROMPT + text)
    more = tight.generate(b"", GenerationOptions(max_new_bytes=20, draft=draft), sequence=sequence).data
    assert more == free[len(text) : len(text) + 20] or len(text) > 40


def test_a_stream_that_never_began_reads_nothing(tight: BltModel) -> None:
    sequence = tight.sequence()
    chunks: Any = tight.stream(PROMPT, sequence=sequence)
    chunks.close()
    assert sequence.length == 0


@by_draft
def test_cancelling_loses_nothing(tight: BltModel, draft: str) -> None:
    sequence, cancel, text = tight.sequence(), threading.Event(), b""
    options = GenerationOptions(max_new_bytes=60, draft=draft)
    for chunk in tight.stream(PROMPT, options, sequence=sequence, cancel=cancel):
        text += chunk.data
        if len(text) >= 9:
            cancel.set()
    assert chunk.finish_reason == "cancelled"
    assert_holds(tight, sequence, PROMPT + text)
    more = tight.generate(b"", GenerationOptions(max_new_bytes=20, draft=draft), sequence=sequence).data
    assert text + more == one_run(tight, PROMPT, len(text) + 20)


def test_cancelled_inside_the_prompt_the_rest_can_follow(tight: BltModel) -> None:
    sequence, cancel = tight.sequence(), threading.Event()
    cancel.set()
    prompt = PROMPT * 3
    for kept in (sequence, None):
        result = tight.generate(prompt, GenerationOptions(), sequence=kept, cancel=cancel)
        assert (result.finish_reason, result.data, result.stats.new_bytes) == ("cancelled", b"", 0)
    assert sequence.ids.tolist() == encode(prompt)[:16].tolist()
    rest = prompt[sequence.length - 1 :]
    more = tight.generate(rest, GenerationOptions(max_new_bytes=20), sequence=sequence).data
    assert more == one_run(tight, prompt, 20)
    assert_holds(tight, sequence, prompt + more)


def test_at_the_last_position_only_the_last_byte_is_missing(tight: BltModel) -> None:
    sequence = tight.sequence()
    prompt = (b"abc " * 100)[:390]
    options = GenerationOptions(max_new_bytes=50, temperature=1.0, seed=1)
    result = tight.generate(prompt, options, sequence=sequence)
    assert result.finish_reason == "context"
    assert len(result.data) == 10  # 391 read; nine more positions, and a byte that needs none
    assert sequence.length == 400
    text = prompt + result.data
    assert decode(sequence.ids) == text[:-1]
    with pytest.raises(PromptTooLongError):
        tight.generate(text[sequence.length - 1 :], options, sequence=sequence)
    sequence.roll_back(30)
    assert_holds(tight, sequence, text[:369])


def test_details_and_the_repetition_penalty_see_the_earlier_text(tight: BltModel) -> None:
    options = GenerationOptions(max_new_bytes=12, logprobs=3, repetition_penalty=1.7)
    sequence = tight.sequence()
    parts = [tight.generate(turn, options, sequence=sequence) for turn in (PROMPT, b"", b"and")]
    whole = tight.generate(PROMPT, GenerationOptions(24, repetition_penalty=1.7)).data
    assert parts[0].data + parts[1].data == whole
    text = PROMPT + whole + b"and" + parts[2].data
    entropies, starts = tight.entropies(text), np.cumsum([0, *tight.patch_lengths(text)])
    for detail in [detail for part in parts for detail in part.details]:
        assert text[detail.position] == detail.byte
        assert detail.entropy == pytest.approx(entropies[detail.position], abs=1e-5)
        assert detail.starts_patch == (1 + detail.position in starts)
    assert [d.position for d in parts[1].details] == list(range(len(PROMPT) + 12, len(PROMPT) + 24))


def test_an_own_sequence_with_text_in_it(tight: BltModel) -> None:
    sequence = tight.sequence()
    sequence.append(encode(PROMPT))
    sequence.roll_back(9)
    result = tight.generate(b"", GenerationOptions(max_new_bytes=20), sequence=sequence)
    assert result.data == one_run(tight, PROMPT[:-9], 20)


TURN = st.fixed_dictionaries(
    {
        "prompt": st.one_of(st.binary(max_size=20), st.sampled_from([b"", b"the ", "中é".encode()])),
        "options": st.builds(
            GenerationOptions,
            st.integers(1, 30),
            draft=st.sampled_from(DRAFTS),
            draft_length=st.one_of(st.none(), st.integers(1, 32)),
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.just(2),
            stop=st.sampled_from([(), (b"e",), (b"\x80", b"a"), (b"th",)]),
        ),
        "end": st.sampled_from(["itself", "close", "cancel"]),
        "after": st.integers(0, 20),
    }
)


@settings(deadline=None, max_examples=40)
@given(turns=st.lists(TURN, min_size=1, max_size=4))
def test_any_turns_leave_the_state_of_their_text(tight: BltModel, turns: list[dict[str, Any]]) -> None:
    sequence, text = tight.sequence(), b""
    for turn in turns:
        text += turn["prompt"]
        cancel, made = threading.Event(), b""
        chunks: Any = tight.stream(turn["prompt"], turn["options"], sequence=sequence, cancel=cancel)
        for chunk in chunks:
            made += chunk.data
            if len(made) >= turn["after"] and turn["end"] == "cancel":
                cancel.set()
            if len(made) >= turn["after"] and turn["end"] == "close":
                chunks.close()
        whole = tight.generate(text, turn["options"])
        assert whole.data.startswith(made)
        if turn["end"] == "itself":
            assert made == whole.data
        text += made
        assert decode(sequence.ids) == text
    assert_holds(tight, sequence, text)
