"""Guesses: where the text repeats itself, and what broken logits are worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.runtime.drafting import Ahead, LookupIndex, draft_with_decoder, draft_with_patcher
from blt_edge.runtime.sampling import Sampler
from blt_edge.runtime.sequence import Draft
from blt_edge.runtime.vocabulary import encode
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(4, 7), max_size=80), st.integers(1, 40))
def test_a_match_is_the_last_place_with_the_same_end(ids: list[int], count: int) -> None:
    index = LookupIndex()
    for number in ids:
        index.extend([number])
    size = LookupIndex.SHORTEST
    places = [at for at in range(size, len(ids)) if ids[at - size : at] == ids[-size:]]
    match = index.find()
    if len(ids) <= size or not places:
        assert match is None
        return
    assert match is not None
    assert match.next == places[-1]
    longest = size
    while (
        longest < LookupIndex.LONGEST
        and longest < match.next
        and (ids[match.next - longest - 1] == ids[len(ids) - longest - 1])
    ):
        longest += 1
    assert match.length == longest
    guesses = index.guesses(match, count)
    assert len(guesses) == count
    endless = list(ids)
    for guess in guesses:
        assert guess == endless[match.next + len(endless) - len(ids)]
        endless.append(guess)
    assert 0 < match.confidence(0) <= match.confidence(3) < 1


@given(st.lists(st.lists(st.integers(4, 6), max_size=9), max_size=12))
def test_how_a_text_was_cut_does_not_matter(parts: list[list[int]]) -> None:
    whole, pieces = LookupIndex(), LookupIndex()
    whole.extend([number for part in parts for number in part])
    for part in parts:
        if part:
            pieces.extend(part)
    assert whole.find() == pieces.find()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("draft", [draft_with_decoder, draft_with_patcher])
def test_a_guess_from_broken_logits_is_none(
    model: BltModel, monkeypatch: pytest.MonkeyPatch, draft: Callable[..., Draft], value: float
) -> None:
    sequence = model.sequence()
    sequence.append(encode(b"Alice was beginning"))
    decode = sequence.decode

    def broken(*arguments: Any) -> Any:
        logits = decode(*arguments).copy()
        logits[0, 77] = value
        return logits

    monkeypatch.setattr(sequence, "decode", broken)
    patcher = sequence.patcher
    assert patcher is not None
    extend = patcher.extend

    def broken_extend(ids: Any) -> Any:
        entropies = extend(ids)
        assert patcher.last_logits is not None
        patcher.last_logits = patcher.last_logits.copy()
        patcher.last_logits[0, 77] = value
        return entropies

    monkeypatch.setattr(patcher, "extend", broken_extend)
    found = draft(sequence, Ahead(70, 8), 8, Sampler(GenerationOptions()), lambda confidence: True)
    assert found.ids.tolist() == [70]
