"""Drafts change how fast a text comes, never the text: rounds against decoding byte by byte."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions, OptionError
from blt_edge.runtime.drafting import Ahead
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.sampling import Sampler
from blt_edge.runtime.sequence import Draft
from blt_edge.runtime.speculation import Speculator
from blt_edge.runtime.vocabulary import EOS, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_store import altered

PROMPTS = [
    b"Alice was beginning to get very tired of sitting by her sister on the bank",
    b"def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef ",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。".encode(),
    bytes(range(256)),
    b"",
]
GUESSING = [("lookup", None), ("lookup", 7), ("decoder", None), ("decoder", 1), ("decoder", 8)]
GUESSING += [("patcher", None), ("patcher", 4), ("auto", None), ("auto", 32)]
by_guessing = pytest.mark.parametrize(("draft", "length"), GUESSING)


def both(model: BltModel, prompt: bytes, options: GenerationOptions) -> None:
    plain = model.generate(prompt, replace(options, draft="none", draft_length=None))
    drafted = model.generate(prompt, options)
    assert drafted.data == plain.data
    assert drafted.finish_reason == plain.finish_reason
    assert drafted.stats.new_bytes == plain.stats.new_bytes
    assert drafted.stats.patches == plain.stats.patches
    assert drafted.stats.accepted <= drafted.stats.drafted


@by_guessing
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_no_drafts(
    model: BltModel, prompt: bytes, draft: str, length: int | None
) -> None:
    both(model, prompt, GenerationOptions(max_new_bytes=100, draft=draft, draft_length=length))


@by_guessing
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.5, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.5},
    ],
    ids=["warm", "filtered", "penalised", "greedy-penalised"],
)
def test_a_seed_gives_the_text_of_no_drafts(
    model: BltModel, how: dict[str, Any], draft: str, length: int | None
) -> None:
    for seed in range(3):
        options = GenerationOptions(60, seed=seed, draft=draft, draft_length=length, **how)
        both(model, PROMPTS[0], options)


@by_guessing
def test_lengths_stop_strings_and_the_last_position_end_it_exactly(
    model: BltModel, draft: str, length: int | None
) -> None:
    options = GenerationOptions(60, draft=draft, draft_length=length)
    for count in (1, 2, 3, 9):
        both(model, PROMPTS[1], replace(options, max_new_bytes=count))
    free = model.generate(PROMPTS[0], GenerationOptions(60, draft="none")).data
    for start in (0, 5, 11):
        both(model, PROMPTS[0], replace(options, stop=(free[start : start + 2],)))
    for used in (380, 396, 398):
        both(model, (b"abc " * 100)[:used], options)


@pytest.mark.parametrize(("rollback", "chunk"), [(0, 16), (1, 16), (3, 16), (64, 1), (64, 2), (64, 4)])
@pytest.mark.parametrize("draft", ["decoder", "patcher", "lookup", "auto"])
def test_drafts_fit_whatever_limits_a_model_was_loaded_with(
    tiny_bundle: Path, rollback: int, chunk: int, draft: str
) -> None:
    model = BltModel.load(tiny_bundle, threads=1, rollback=rollback, prefill_chunk=chunk)
    both(model, PROMPTS[0], GenerationOptions(max_new_bytes=50, draft=draft, draft_length=8))


@settings(deadline=None, max_examples=25)
@given(
    prompt=st.binary(max_size=60),
    draft=st.sampled_from(["decoder", "patcher", "lookup", "auto"]),
    length=st.one_of(st.none(), st.integers(1, 32)),
    temperature=st.sampled_from([0.0, 0.4, 1.5]),
    seed=st.integers(0, 5),
)
def test_any_draft_on_any_prompt(
    model: BltModel, prompt: bytes, draft: str, length: int | None, temperature: float, seed: int
) -> None:
    options = GenerationOptions(max_new_bytes=40, temperature=temperature, seed=seed)
    both(model, prompt, replace(options, draft=draft, draft_length=length))


def test_guesses_save_passes_over_the_stages(model: BltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights seldom repeat themselves: let one id in common be enough.
    monkeypatch.setattr("blt_edge.runtime.drafting.LookupIndex.SHORTEST", 1)
    options = GenerationOptions(max_new_bytes=200, draft="lookup", draft_length=8)
    stats = model.generate(PROMPTS[0], options).stats
    assert stats.rounds > 0
    assert stats.accepted > 0
    assert stats.stage_calls["decoder"] == stats.stage_calls["encoder"]
    assert stats.stage_calls["decoder"] == stats.new_bytes - stats.accepted


def test_the_patcher_guesses_only_where_there_is_one(model: BltModel) -> None:
    other = altered(model, PatchingRule("space"))
    with pytest.raises(OptionError, match=r"draft: got 'patcher'.*auto, decoder or lookup"):
        other.generate(b"abc", GenerationOptions(max_new_bytes=5, draft="patcher"))
    for draft in ("auto", "decoder", "lookup"):
        both(other, PROMPTS[0], GenerationOptions(max_new_bytes=60, draft=draft))


def test_a_finished_text_leaves_no_cache_behind(model: BltModel) -> None:
    gc.collect()
    gc.disable()
    try:
        sequence = model.sequence()
        sequence.append(encode(PROMPTS[0]))
        buffers = [weakref.ref(stage.cache.buffer) for stage in (sequence._decoder, sequence._latent)]
        del sequence
        assert [buffer() for buffer in buffers] == [None, None]
    finally:
        gc.enable()


class ScriptedSampler:
    """Makes the choices that it is told to, and keeps what it was asked with."""

    def __init__(self, choices: list[int]) -> None:
        self.reads_ids = True
        self._choices = iter(choices)
        self.asked: list[tuple[np.ndarray, list[int]]] = []

    def __call__(self, logits: np.ndarray, ids: np.ndarray) -> int:
        self.asked.append((logits.copy(), ids.tolist()))
        return next(self._choices)


BYTES = st.integers(4, 6)


@settings(deadline=None, max_examples=60)
@given(pending=BYTES, pairs=st.lists(st.tuples(BYTES | st.just(EOS), BYTES | st.just(EOS)), max_size=9))
def test_a_draft_is_kept_up_to_the_first_other_choice_or_the_end_of_the_text(
    model: BltModel, pending: int, pairs: list[tuple[int, int]]
) -> None:
    guesses, choices = [guess for guess, _ in pairs], [choice for _, choice in pairs] + [5]
    sequence = model.sequence()
    sequence.append(encode(b"once"))
    before = sequence.ids.tolist()
    sampler: Any = ScriptedSampler(choices)
    speculator = Speculator(sequence, sampler, GenerationOptions(draft="none"), model.costs)
    chosen = speculator._check(Draft(np.array([pending, *guesses], np.int64)))
    # By definition: choices go on while they are what was guessed, and nothing follows an end.
    expected = [choices[0]]
    while len(expected) <= len(guesses) and expected[-1] == guesses[len(expected) - 1] != EOS:
        expected.append(choices[len(expected)])
    assert chosen == expected
    # The last choice is not read yet; what was read are the ones before it.
    assert sequence.ids.tolist() == [*before, pending, *chosen[:-1]]
    assert [ids for _, ids in sampler.asked] == [
        [*before, pending, *chosen[:count]] for count in range(len(chosen))
    ]
    plain = model.sequence()
    rows = plain.append(np.array([*before, pending, *chosen[:-1]], np.int64))[0].logits[len(before) :]
    for (logits, _), row in zip(sampler.asked, rows, strict=True):
        np.testing.assert_allclose(logits, row, rtol=0, atol=2e-5)
    np.testing.assert_allclose(speculator.rows[: len(chosen)], rows, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("guesses", "choices", "figures"),
    [
        ([], [5], (0, 0, 0, 0)),
        ([4], [4, 5], (1, 1, 1, 0)),
        ([4], [5], (1, 1, 0, 1)),
        ([4, 5, 6], [4, 5, 6, 4], (1, 3, 3, 0)),
        ([4, 5, 6], [4, 5, 4], (1, 3, 2, 1)),
    ],
)
def test_a_round_counts_its_guesses_and_tells_the_planner(
    model: BltModel,
    monkeypatch: pytest.MonkeyPatch,
    guesses: list[int],
    choices: list[int],
    figures: tuple[int, int, int, int],
) -> None:
    sequence = model.sequence()
    sequence.append(encode(b"once"))
    sampler: Any = ScriptedSampler(choices + choices)
    speculator = Speculator(sequence, sampler, GenerationOptions(draft="lookup"), model.costs)
    learned: list[Any] = []

    def drafted(plan: Any, ahead: Ahead) -> Draft:
        for guess in guesses:
            ahead.add(guess)
        return Draft(np.array(ahead.ids, np.int64))

    monkeypatch.setattr(speculator, "_draft", drafted)
    monkeypatch.setattr(speculator._planner, "learn", lambda *told: learned.append(told))
    for times in (1, 2):
        staged, began = sequence.stage_seconds, time.perf_counter()
        assert speculator.round(70, 9) == choices
        passed = time.perf_counter() - began
        found = speculator.figures
        assert (found.rounds, found.drafted, found.accepted, found.missed) == tuple(
            times * count for count in figures
        )
        _, drafted, accepted, seconds, host_seconds = learned.pop()
        assert (drafted, accepted) == (len(guesses), len(choices) - 1)
        assert 0 < host_seconds < seconds < passed
        assert host_seconds == pytest.approx(seconds - (sequence.stage_seconds - staged), abs=1e-9)


@pytest.mark.parametrize(
    ("most", "length", "chunk", "rollback", "room"),
    [
        (5, 10, 100, 50, 4),
        (100, 390, 100, 50, 9),
        (100, 399, 100, 50, 0),
        (100, 10, 16, 50, 15),
        (100, 10, 100, 7, 7),
    ],
)
def test_a_plan_has_room_for_what_fits(
    model: BltModel, most: int, length: int, chunk: int, rollback: int, room: int
) -> None:
    assert model.limits.max_positions == 400
    sequence = altered(model, prefill_chunk=chunk, rollback=rollback).sequence()
    sequence.append(np.arange(length) % 200 + 4)
    speculator = Speculator(sequence, Sampler(GenerationOptions()), GenerationOptions(), model.costs)
    asked: list[Any] = []
    speculator._planner.plan = lambda *told: asked.append(told)  # type: ignore[method-assign, assignment]
    speculator._plan(speculator._room(most), [])
    ((match, found, patches),) = asked
    assert found == room
    assert match is None
    assert patches == sequence.patches_closed / length


@pytest.mark.parametrize("draft", ["none", "decoder", "patcher", "lookup", "auto"])
def test_what_was_chosen_is_looked_up_where_drafts_may_be(model: BltModel, draft: str) -> None:
    sequence = model.sequence()
    sequence.append(encode(b"abcdefgh abcde"))
    sampler: Any = ScriptedSampler([4 + ord("f"), 4 + ord("g")])
    speculator = Speculator(sequence, sampler, GenerationOptions(draft=draft), model.costs)
    assert speculator.begin() == 4 + ord("f")
    np.testing.assert_array_equal(speculator.rows, sequence.logits[None])
    assert [ids for _, ids in sampler.asked] == [sequence.ids.tolist()]
    index = speculator._index
    assert (index is not None) == (draft in ("lookup", "auto"))
    if index is not None:
        match = index.find()
        assert match is not None
        assert index.guesses(match, 2) == [4 + ord("g"), 4 + ord("h")]
        speculator.round(4 + ord("f"), 1)
        match = index.find()
        assert match is not None
        assert index.guesses(match, 1) == [4 + ord("h")]


def test_a_lookup_stops_at_the_text_s_end_and_at_the_gate(model: BltModel) -> None:
    sequence = model.sequence()
    sequence.append(np.array([1, 10, 11, 12, 13, 14, EOS, 15, 10, 11, 12]))
    speculator = Speculator(
        sequence, Sampler(GenerationOptions()), GenerationOptions(draft="lookup"), model.costs
    )
    assert speculator._index is not None
    speculator._index.extend([*sequence.ids.tolist(), 13])
    match = speculator._index.find()
    assert match is not None
    open_ = SimpleNamespace(admits=lambda confidence: True)
    plan = SimpleNamespace(source="lookup", length=8, match=match, gate=open_)
    assert speculator._draft(plan, Ahead(13, 8)).ids.tolist() == [13, 14]  # type: ignore[arg-type]
    seen: list[float] = []
    plan.gate = SimpleNamespace(admits=lambda confidence: bool(seen.append(confidence)))
    assert speculator._draft(plan, Ahead(13, 8)).ids.tolist() == [13]  # type: ignore[arg-type]
    assert seen == [match.confidence(0)]
    plan.source = "none"
    assert speculator._draft(plan, Ahead(13, 8)).ids.tolist() == [13]  # type: ignore[arg-type]
