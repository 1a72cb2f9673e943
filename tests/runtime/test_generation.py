"""Streams: what is emitted, when, and why they end."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions, generation
from blt_edge.runtime.generation import GenerationStats
from blt_edge.runtime.speculation import DraftFigures, Speculator
from blt_edge.runtime.vocabulary import BYTE_OFFSET, EOS

PROMPT = b"Alice was beginning to get very tired"


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> BltModel:
    return BltModel.load(tiny_bundle, threads=1)


def greedy_by_full_runs(model: BltModel, prompt: bytes, count: int) -> bytes:
    """The same bytes without any cache: the whole text again for every byte."""
    data = b""
    for _ in range(count):
        row = model.logits(prompt + data)[-1].copy()
        row[[0, 1, 3]] = -np.inf
        chosen = int(row.argmax())
        if chosen == 2:
            break
        data += bytes([chosen - BYTE_OFFSET])
    return data


def test_greedy_equals_runs_without_state(model: BltModel) -> None:
    result = model.generate(PROMPT, GenerationOptions(max_new_bytes=60))
    assert result.data == greedy_by_full_runs(model, PROMPT, 60)


def test_stream_joins_to_the_result(model: BltModel) -> None:
    options = GenerationOptions(max_new_bytes=80, temperature=1.0, seed=3)
    chunks = list(model.stream(PROMPT, options))
    result = model.generate(PROMPT, options)
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert b"".join(chunk.data for chunk in chunks) == result.data
    assert result.text == result.data.decode("utf-8", "replace")
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == result.finish_reason


def test_same_seed_same_text_other_seed_other_text(model: BltModel) -> None:
    def run(seed: int) -> bytes:
        return model.generate(PROMPT, GenerationOptions(max_new_bytes=50, temperature=1.0, seed=seed)).data

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_no_prompt_and_str_prompts(model: BltModel) -> None:
    assert model.generate("", GenerationOptions(max_new_bytes=5)).stats.prompt_bytes == 0
    options = GenerationOptions(max_new_bytes=20)
    assert model.generate("é中", options).data == model.generate("é中".encode(), options).data
    # Bytes that are no UTF-8 come from a command line so.
    assert model.generate("a\udcff", options).data == model.generate(b"a\xff", options).data


def test_length_and_figures(model: BltModel) -> None:
    result = model.generate(PROMPT, GenerationOptions(max_new_bytes=9, draft="none"))
    stats = result.stats
    if result.finish_reason == "length":
        assert stats.new_bytes == len(result.data) == 9
    assert stats.prompt_bytes == len(PROMPT)
    assert 0 < stats.prefill_seconds <= stats.first_byte_seconds
    assert set(stats.stage_seconds) == {"patcher", "encoder", "latent", "decoder"}
    # The last byte is never read back.
    assert stats.stage_calls["decoder"] == stats.new_bytes
    assert stats.state_bytes > 0


def test_stop_string_ends_the_text_and_is_not_part_of_it(model: BltModel) -> None:
    free = model.generate(PROMPT, GenerationOptions(max_new_bytes=60)).data
    stop = free[20:23]
    result = model.generate(PROMPT, GenerationOptions(max_new_bytes=60, stop=(stop,)))
    assert result.finish_reason == "stop"
    assert result.data == free[: free.index(stop)]


def test_a_full_model_ends_with_context(model: BltModel) -> None:
    result = model.generate(b"x" * 396, GenerationOptions(max_new_bytes=50, temperature=1.0, seed=0))
    assert result.finish_reason in ("context", "eos")
    if result.finish_reason == "context":
        # 396 bytes and BOS leave three positions; the byte after the last one needs none.
        assert result.stats.new_bytes == 4


def test_cancel_before_and_during(model: BltModel) -> None:
    cancel = threading.Event()
    chunks = []
    for chunk in model.stream(PROMPT, GenerationOptions(max_new_bytes=300), cancel=cancel):
        chunks.append(chunk)
        cancel.set()
    assert chunks[-1].finish_reason == "cancelled"
    assert chunks[-1].stats is not None
    assert chunks[-1].stats.new_bytes < 10
    assert model.generate(PROMPT, GenerationOptions(), cancel=cancel).finish_reason == "cancelled"


def test_figures_are_of_one_turn_only(model: BltModel) -> None:
    sequence = model.sequence()
    model.generate(PROMPT, GenerationOptions(max_new_bytes=7), sequence=sequence)
    before = {name: (spent.calls, spent.seconds) for name, spent in sequence.times.items()}
    patches = len(sequence.boundaries.patch_lengths())
    began = time.perf_counter()
    options = GenerationOptions(max_new_bytes=12, draft="none")
    stats = model.generate(b"more", options, sequence=sequence).stats
    passed = time.perf_counter() - began
    after = sequence.times
    assert stats.stage_calls == {name: after[name].calls - calls for name, (calls, _) in before.items()}
    assert stats.stage_seconds == {
        name: after[name].seconds - seconds for name, (_, seconds) in before.items()
    }
    assert stats.stage_calls["encoder"] == stats.stage_calls["decoder"] == 1 + 12
    assert stats.patches == len(sequence.boundaries.patch_lengths()) - patches > 0
    assert (stats.prompt_bytes, stats.new_bytes) == (4, 12)
    assert stats.state_bytes == sequence.state_bytes
    assert 0 < stats.prefill_seconds < stats.first_byte_seconds
    assert stats.first_byte_seconds < stats.prefill_seconds + stats.decode_seconds < passed
    assert stats.bytes_per_second == 12 / stats.decode_seconds


def test_a_new_text_counts_the_patch_of_bos(model: BltModel) -> None:
    stats = model.generate(PROMPT, GenerationOptions(max_new_bytes=5, draft="none")).stats
    text = PROMPT + model.generate(PROMPT, GenerationOptions(max_new_bytes=4)).data
    assert stats.patches == len(model.patch_lengths(text))  # the fifth byte is not read


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
    assert stats.bytes_per_second == 4.0
    assert GenerationStats(1, 2, 3, 4.0, 5.0, 2.0).bytes_per_second == 1.0
    assert GenerationStats(1, 2, 3, 4.0, 5.0, 0.0).bytes_per_second == 0.0


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
    options = GenerationOptions(max_new_bytes=most, stop=stop)
    chunks = list(model.stream(PROMPT, options, sequence=sequence))
    data = text.encode("latin-1")
    assert b"".join(chunk.data for chunk in chunks) == data
    assert "".join(chunk.text for chunk in chunks) == data.decode("utf-8", "replace")
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [reason]
    assert [chunk.stats is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    for chunk in chunks:
        assert str(chunk) == chunk.text == chunk.data.decode("utf-8", "replace")
    stats = chunks[-1].stats
    assert stats is not None
    assert stats.new_bytes == len(data) + (len(stop[0]) if reason == "stop" else 0)
    if sequence is not None:
        assert sequence.ids.tolist() == [1, *(BYTE_OFFSET + byte for byte in PROMPT + data)]
    elif reason == "stop":
        # As byte by byte: what a round has read behind the stop string is in no figure, nor is its last byte.
        read = "".join(rounds)[: stats.new_bytes - 1].encode("latin-1")
        assert stats.patches == len(model.patch_lengths(PROMPT + read))


@pytest.mark.parametrize(("prompt", "text"), [(399, b"a"), (398, b"ab"), (397, b"abc")])
def test_a_byte_needs_a_position_only_once_it_is_read(
    model: BltModel, monkeypatch: pytest.MonkeyPatch, prompt: int, text: bytes
) -> None:
    script = [[BYTE_OFFSET + byte] for byte in b"abcdef"]
    monkeypatch.setattr(Scripted, "script", script, raising=False)
    monkeypatch.setattr(generation, "Speculator", Scripted)
    result = model.generate(b"x" * prompt, GenerationOptions(max_new_bytes=9))
    assert (result.data, result.finish_reason) == (text, "context")


def test_what_was_read_of_a_cancelled_prompt_stays(model: BltModel) -> None:
    chunk = model.limits.prefill_chunk
    sequence, cancel = model.sequence(), threading.Event()
    cancel.set()
    prompt = b"x" * (chunk + 40)
    result = model.generate(prompt, GenerationOptions(), sequence=sequence, cancel=cancel)
    assert (result.data, result.finish_reason) == (b"", "cancelled")
    assert sequence.ids.tolist() == [1, *[BYTE_OFFSET + ord("x")] * (chunk - 1)]
    alone = model.generate(prompt, GenerationOptions(), cancel=cancel)
    assert (alone.data, alone.finish_reason, alone.stats.new_bytes) == (b"", "cancelled", 0)
