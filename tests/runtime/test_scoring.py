"""Details of bytes against whole runs over the same text, and bits per byte against the definition."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, ByteDetail, GenerationOptions
from blt_edge.runtime.errors import OptionError
from blt_edge.runtime.names import DRAFTS
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.scoring import Score, byte_details, likelihood, score
from blt_edge.runtime.vocabulary import BOS, BYTE_OFFSET, EOS, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_store import altered

PROMPT = "Alice était fatiguée".encode()
WAYS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 4}, {"repetition_penalty": 1.4}]

# 1. One byte after the other.


def checked(model: BltModel, prompt: bytes, options: GenerationOptions) -> tuple[ByteDetail, ...]:
    """Generate, and compare every field with runs that know nothing of generation."""
    plain = model.generate(prompt, replace(options, details=False, logprobs=None))
    result = model.generate(prompt, replace(options, prompt_details=True))
    assert result.data == plain.data
    assert plain.details == plain.prompt_details == ()
    assert (len(result.prompt_details), len(result.details)) == (len(prompt), len(result.data))
    text = prompt + result.data
    # Patches over BOS and the text: position p of the text is 1 + p there.
    starts = set(np.cumsum([0, *model.patch_lengths(text)])[:-1].tolist())
    entropies = model.entropies(text)
    wide = model.logits(text).astype(np.float64)
    logs = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
    for place, (byte, detail) in enumerate(zip(text, result.prompt_details + result.details, strict=True)):
        assert (detail.byte, detail.position) == (byte, place)
        assert detail.starts_patch == (1 + place in starts)
        assert detail.entropy == pytest.approx(entropies[place], abs=1e-5)
        if options.logprobs is None:
            assert (detail.logprob, detail.top) == (None, ())
            continue
        assert detail.logprob == pytest.approx(logs[place, BYTE_OFFSET + byte], abs=1e-4)
        assert len(detail.top) == options.logprobs
        expected = np.sort(logs[place])[::-1][: options.logprobs]
        assert [one for _, one in detail.top] == pytest.approx(expected.tolist(), abs=1e-4)
        for number, one in detail.top:
            assert one == pytest.approx(logs[place, number], abs=1e-4)
    return result.details


@pytest.mark.parametrize("how", WAYS, ids=["greedy", "warm", "penalised"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_details_are_those_of_whole_runs(model: BltModel, draft: str, how: dict[str, Any]) -> None:
    details = checked(model, PROMPT, GenerationOptions(max_new_bytes=60, draft=draft, logprobs=5, **how))
    assert {detail.starts_patch for detail in details} == {True, False}


@pytest.mark.parametrize("logprobs", [None, 0, 1, 20])
@pytest.mark.parametrize("prompt", [b"", b"x", bytes(range(256))])
def test_first_bytes_with_as_many_alternatives_as_asked_for(
    model: BltModel, prompt: bytes, logprobs: int | None
) -> None:
    details = checked(model, prompt, GenerationOptions(max_new_bytes=9, details=True, logprobs=logprobs))
    assert details[0].position == len(prompt)
    if not prompt:
        assert details[0].starts_patch


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_prompt_that_is_only_read_and_one_that_goes_on(model: BltModel, cut: int) -> None:
    only = GenerationOptions(0, logprobs=2, prompt_details=True)
    whole = model.generate(PROMPT, only)
    assert (whole.data, whole.finish_reason, whole.stats.prompt_bytes) == (b"", "length", len(PROMPT))
    sequence = model.sequence()
    parts = [model.generate(part, only, sequence=sequence) for part in (PROMPT[:cut], PROMPT[cut:])]
    assert sequence.length == 1 + len(PROMPT)
    details = parts[0].prompt_details + parts[1].prompt_details
    assert len(details) == len(whole.prompt_details)
    for one, other in zip(details, whole.prompt_details, strict=True):
        assert replace(one, entropy=0.0, logprob=0.0, top=()) == replace(
            other, entropy=0.0, logprob=0.0, top=()
        )
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("draft", DRAFTS)
def test_accepted_guesses_are_marked(model: BltModel, monkeypatch: pytest.MonkeyPatch, draft: str) -> None:
    # Random weights seldom repeat themselves: let one id in common be enough.
    monkeypatch.setattr("blt_edge.runtime.drafting.LookupIndex.SHORTEST", 1)
    options = GenerationOptions(max_new_bytes=120, details=True, draft=draft, draft_length=6)
    result = model.generate(PROMPT, options)
    marked = sum(detail.guessed for detail in result.details)
    assert marked == result.stats.accepted
    assert not result.details[0].guessed
    if draft == "lookup":
        assert marked > 0


@pytest.mark.parametrize("draft", DRAFTS)
def test_bytes_behind_a_stop_string_have_none(model: BltModel, draft: str) -> None:
    free = model.generate(PROMPT, GenerationOptions(max_new_bytes=60)).data
    options = GenerationOptions(max_new_bytes=60, draft=draft, stop=(free[20:23],), logprobs=1)
    assert len(checked(model, PROMPT, options)) == free.index(free[20:23])


def test_each_chunk_has_its_own(model: BltModel) -> None:
    options = GenerationOptions(max_new_bytes=80, temperature=1.0, seed=3, details=True)
    place = len(PROMPT)
    for chunk in model.stream(PROMPT, options):
        assert bytes(detail.byte for detail in chunk.details) == chunk.data
        assert [detail.position for detail in chunk.details] == list(range(place, place + len(chunk.data)))
        place += len(chunk.data)


def test_other_patching_has_no_entropies(model: BltModel) -> None:
    other = altered(model, PatchingRule("static", patch_size=3))
    details = other.generate(b"abc", GenerationOptions(max_new_bytes=12, details=True)).details
    assert {detail.entropy for detail in details} == {None}
    # BOS is alone, then every three bytes.
    assert [detail.starts_patch for detail in details] == [
        not place % 3 for place in range(3, 3 + len(details))
    ]


def test_the_end_of_the_text_is_no_byte(model: BltModel) -> None:
    sequence = model.sequence()
    (result,) = sequence.append(encode(b"ab"))
    ids = [BYTE_OFFSET + ord("a"), BYTE_OFFSET + ord("b"), EOS]
    details = byte_details(sequence, 1, ids, result.logits, None, guesses=1)
    assert [(one.byte, one.position, one.guessed) for one in details] == [(97, 0, True), (98, 1, False)]


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_logits_have_finite_logs(value: float) -> None:
    logits = np.zeros(260, np.float32)
    logits[7] = value
    chosen, top = likelihood(logits, 7, 260)
    logs = np.array([log for _, log in top])
    assert np.isfinite(logs).all()
    assert np.exp(logs).sum() == pytest.approx(1)
    assert (chosen == pytest.approx(0)) == (value > 0)


def test_logs_of_equal_logits_name_the_lowest_ids_first() -> None:
    chosen, top = likelihood(np.zeros(260, np.float32), 200, 3)
    assert chosen == pytest.approx(-np.log(260))
    assert top == tuple((number, pytest.approx(-np.log(260))) for number in range(3))


# 2. A whole text, with a model whose logits follow from the ids alone.

TABLE = np.random.default_rng(0).normal(size=(260, 260)).astype(np.float32) * 4
# So large that their exponentials are infinite, and so small that they are 0.
TABLE[4 + ord("x")] += 5000
TABLE[4 + ord("y")] -= 5000
TABLE[4 + ord("z"), 4 + ord("z")] += 5000


class ScriptedSequence:
    """Logits after an id are that id's row of the table, scaled by how many ids came before."""

    def __init__(self, chunk: int, opened: list[int]) -> None:
        self._chunk, self._opened = chunk, opened

    def extend(self, ids: np.ndarray) -> Iterator[Any]:
        assert ids[0] == BOS
        self._opened.append(len(ids))
        self.boundaries = SimpleNamespace(count=1 + len(ids) // 3)
        room = np.empty((self._chunk, 260), np.float32)
        for start in range(0, len(ids), self._chunk):
            part = ids[start : start + self._chunk]
            rows = room[: len(part)]  # written over by the next chunk, as a real one is
            rows[:] = TABLE[part] * (1 + np.arange(start, start + len(part))[:, None] % 3)
            yield SimpleNamespace(logits=rows)


def by_definition(data: bytes, context: int) -> float:
    bits = 0.0
    for start in range(0, len(data), context - 1):
        before = BOS
        for place, byte in enumerate(data[start : start + context - 1]):
            row = [float(value) * (1 + place % 3) for value in TABLE[before]]
            top = max(row)
            whole = math.fsum(math.exp(value - top) for value in row)
            bits -= (row[4 + byte] - top - math.log(whole)) / math.log(2)
            before = 4 + byte
    return bits / len(data)


@settings(max_examples=60)
@given(
    data=st.binary(min_size=1, max_size=60) | st.text("xyz", min_size=1, max_size=30).map(str.encode),
    context=st.integers(2, 64),
    chunk=st.integers(1, 70),
)
def test_bits_are_those_of_the_definition(data: bytes, context: int, chunk: int) -> None:
    opened: list[int] = []
    told: list[tuple[int, int]] = []
    new: Any = lambda: ScriptedSequence(chunk, opened)  # noqa: E731
    began = time.perf_counter()
    result = score(new, data, context, lambda done, all_: told.append((done, all_)))
    assert 0 < result.seconds <= time.perf_counter() - began
    assert result.bits_per_byte == pytest.approx(by_definition(data, context), rel=1e-5)
    windows = [len(data[start : start + context - 1]) for start in range(0, len(data), context - 1)]
    assert opened == [1 + length for length in windows]
    assert (result.bytes, result.windows, result.context) == (len(data), len(windows), context)
    assert result.patches == sum(1 + (1 + length) // 3 for length in windows)
    assert told == [(sum(windows[: index + 1]), len(data)) for index in range(len(windows))]


def test_an_empty_text_is_refused(model: BltModel) -> None:
    with pytest.raises(OptionError, match="empty"):
        score(model.sequence, b"", 50)


@pytest.mark.parametrize(("seconds", "speed"), [(1.5, 20.0), (0.5, 60.0), (0.0, 0.0)])
def test_bytes_per_second(seconds: float, speed: float) -> None:
    assert Score(1.0, 30, 1, 1, 9, seconds).bytes_per_second == speed


def test_a_pipe_gives_the_score_of_its_text(model: BltModel) -> None:
    class Dribble(io.RawIOBase):
        """Seven bytes at a time, whatever is asked for."""

        def __init__(self, data: bytes) -> None:
            self._data = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            part = self._data.read(min(7, len(buffer)))
            buffer[: len(part)] = part
            return len(part)

    data = PROMPT * 5
    whole, piped = model.score(data, context=32), model.score(Dribble(data), context=32)  # type: ignore[arg-type]
    assert (piped.bits_per_byte, piped.windows) == (whole.bits_per_byte, whole.windows)
