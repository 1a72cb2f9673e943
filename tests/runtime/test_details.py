"""What is told of each byte, against whole runs over the same text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, ByteDetail, GenerationOptions
from blt_edge.runtime.scoring import likelihood
from blt_edge.runtime.vocabulary import BYTE_OFFSET

PROMPT = "Alice était fatiguée".encode()
DRAFTS = ["none", "lookup", "decoder", "patcher", "auto"]
WAYS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 4}, {"repetition_penalty": 1.4}]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> BltModel:
    return BltModel.load(tiny_bundle, threads=1)


def checked(model: BltModel, prompt: bytes, options: GenerationOptions) -> tuple[ByteDetail, ...]:
    """Generate, and compare every field with runs that know nothing of generation."""
    plain = model.generate(prompt, replace(options, details=False, logprobs=None))
    result = model.generate(prompt, options)
    assert result.data == plain.data
    assert plain.details == ()
    assert len(result.details) == len(result.data)
    text = prompt + result.data
    # Patches over BOS and the text: position p of the text is 1 + p there.
    starts = set(np.cumsum([0, *model.patch_lengths(text)])[:-1].tolist())
    entropies = model.entropies(text)
    logs = log_softmax(model.logits(text))
    for place, (byte, detail) in enumerate(zip(result.data, result.details, strict=True), len(prompt)):
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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)


@pytest.mark.parametrize("how", WAYS, ids=["greedy", "warm", "penalised"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_details_are_those_of_whole_runs(model: BltModel, draft: str, how: dict[str, Any]) -> None:
    options = GenerationOptions(max_new_bytes=60, draft=draft, logprobs=5, **how)
    details = checked(model, PROMPT, options)
    assert any(detail.starts_patch for detail in details)
    assert not all(detail.starts_patch for detail in details)


@pytest.mark.parametrize("logprobs", [None, 0, 1, 20])
def test_as_many_alternatives_as_asked_for(model: BltModel, logprobs: int | None) -> None:
    checked(model, PROMPT, GenerationOptions(max_new_bytes=9, details=True, logprobs=logprobs))


@pytest.mark.parametrize("prompt", [b"", b"x", bytes(range(256))])
def test_first_bytes_and_every_byte(model: BltModel, prompt: bytes) -> None:
    details = checked(model, prompt, GenerationOptions(max_new_bytes=12, logprobs=2))
    assert details[0].position == len(prompt)
    if not prompt:
        assert details[0].starts_patch


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
    rule = replace(model.manifest.patching, mode="static", patch_size=3)
    other = BltModel(
        replace(model.manifest, patching=rule), model._backends, model._table, model.limits, model.path
    )
    result = other.generate(b"abc", GenerationOptions(max_new_bytes=12, details=True))
    assert {detail.entropy for detail in result.details} == {None}
    # BOS is alone, then every three bytes.
    assert [detail.starts_patch for detail in result.details] == [
        place % 3 == 0 for place in range(3, 3 + len(result.data))
    ]


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
