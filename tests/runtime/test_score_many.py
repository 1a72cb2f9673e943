"""Many texts against each alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.errors import BackendError, OptionError
from blt_edge.runtime.scoring import EmptyTextError


def test_each_text_is_scored_as_alone(model: BltModel) -> None:
    texts = ["Alice", b"was beginning " * 9, "été", bytes(range(256))]
    found = dict(model.score_many(texts, context=40))
    assert sorted(found) == [0, 1, 2, 3]
    for index, text in enumerate(texts):
        alone = model.score(text, context=40)
        assert replace(found[index], seconds=0.0) == replace(alone, seconds=0.0)
        assert found[index].bits == pytest.approx(alone.bits_per_byte * alone.bytes)


def test_a_bad_text_costs_none_of_the_others(model: BltModel) -> None:
    found = dict(model.score_many(["a", "", b"", "\ud800", "b"]))
    assert [type(found[at]).__name__ for at in (0, 4)] == ["Score", "Score"]
    assert all(isinstance(found[at], EmptyTextError) for at in (1, 2))
    assert isinstance(found[3], OptionError)
    assert "text 3" in str(found[3])


def test_texts_are_taken_when_they_are_needed(model: BltModel) -> None:
    taken = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield b"text"

    scores = model.score_many(endless())
    assert not taken
    next(scores)
    next(scores)
    assert len(taken) <= 3


@pytest.mark.parametrize(
    ("options", "line"),
    [({"context": 1}, "context is 1"), ({"rows": 0}, "rows is 0"), ({"rows": True}, "rows is True")],
)
def test_options_are_refused_before_anything_is_read(model: BltModel, options, line: str) -> None:
    with pytest.raises(OptionError, match=line):
        model.score_many(iter(()), **options)


@pytest.mark.parametrize("one", ["a text", b"a text", 5, None])
def test_one_text_is_not_gone_through_by_character(model: BltModel, one) -> None:
    for name, many in (("texts", model.score_many), ("prompts", model.generate_many)):
        with pytest.raises(OptionError, match=f"{name} is .*; allowed are many texts: put a single one into"):
            many(one)


def test_what_is_no_text_and_what_is_no_texts_fault_end_it(
    model: BltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="text 0 is 5"):
        next(model.score_many([5]))  # type: ignore[list-item]

    def broken(*given: object) -> None:
        raise BackendError("it broke")

    monkeypatch.setattr("blt_edge.runtime.model.score", broken)
    with pytest.raises(BackendError):
        next(model.score_many(["a"]))
