"""Windows that come back in any order, against each text by itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.errors import BackendError
from blt_edge.tools.corpus.engines import local_engine
from blt_edge.tools.corpus.joining import score_texts
from blt_edge.tools.corpus.readers import Reader
from blt_edge.tools.corpus.sources import find_sources
from blt_edge.tools.corpus.texts import Engine, Facts, ScoredText, Text, Unscored
from hypothesis import given
from hypothesis import strategies as st

SHA = "0" * 64


def scored(text: Text) -> ScoredText:
    return ScoredText(text.number, 0.1 * len(text.data) + 1e9 * (text.number % 2), 2, 1, 0.5)


def one_by_one(texts: Iterator[Text]) -> Iterator[ScoredText]:
    yield from map(scored, texts)


def shuffling(held: int, seed: int) -> Engine:
    """Takes as many texts at once, and gives them back in any order."""

    def engine(texts: Iterator[Text]) -> Iterator[ScoredText]:
        order, pool = random.Random(seed), list(islice(texts, held))
        while pool:
            yield scored(pool.pop(order.randrange(len(pool))))
            pool += islice(texts, order.randrange(0, held + 1 - len(pool)) if pool else held)

    return engine


def events(sizes: list[int], window: int = 4) -> Iterator[Text | Unscored]:
    """Texts of these sizes; an empty one for 0, and one that breaks off for a size below it."""
    number = 0
    for name, size in enumerate(sizes):
        for start in range(0, abs(size), window):
            part = b"x" * min(window, abs(size) - start)
            last = size > 0 and start + window >= size
            yield Text(number, str(name), None, part, Facts(size, 1, SHA) if last else None, number)
            number += 1
        if size <= 0:
            yield Unscored(str(name), None, "unreadable: it broke" if size else "empty", number)


@given(sizes=st.lists(st.integers(-9, 20), max_size=12), held=st.integers(1, 9), seed=st.integers(0, 999))
def test_any_order_gives_the_same_results(sizes: list[int], held: int, seed: int) -> None:
    plain = list(score_texts(events(sizes), one_by_one))
    done: list[int] = []
    assert list(score_texts(events(sizes), shuffling(held, seed), done.append)) == plain
    assert done == sorted(done)
    assert [int(result.name) for result in plain] == list(range(len(sizes)))
    for result, size in zip(plain, sizes, strict=True):
        windows = -(-size // 4) if size > 0 else 0
        assert (result.bytes, result.windows, result.patches) == (max(0, size), windows, windows)
        assert result.note == (None if size > 0 else "unreadable: it broke" if size else "empty")
        assert result.seconds == (None if size <= 0 else 0.5 * windows)


def test_a_result_comes_as_soon_as_it_is_known() -> None:
    taken = []

    def watched() -> Iterator[Text | Unscored]:
        for event in events([3] * 50):
            taken.append(event)
            yield event

    results = score_texts(watched(), one_by_one)
    next(results)
    assert len(taken) == 1


def test_a_text_timed_with_others_has_no_time_of_its_own() -> None:
    def untimed(texts: Iterator[Text]) -> Iterator[ScoredText]:
        yield from (replace(scored(text), seconds=None if text.number else 1.0) for text in texts)

    assert [result.seconds for result in score_texts(events([4, 8]), untimed)] == [1.0, None]


def test_a_text_that_the_engine_lost_is_an_error() -> None:
    def losing(texts: Iterator[Text]) -> Iterator[ScoredText]:
        yield from (scored(text) for text in texts if text.number != 1)

    results = score_texts(events([4, 4, 4]), losing)
    assert next(results).name == "0"
    with pytest.raises(BackendError, match="nothing of 1"):
        list(results)


def test_the_model_in_this_process(model: BltModel, tmp_path) -> None:
    texts = {"a": b"Alice was beginning " * 9, "b": b"x", "c": bytes(range(256))}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    read = Reader(find_sources([tmp_path / name for name in texts]), 39).texts()
    for result, data in zip(score_texts(read, local_engine(model, 40)), texts.values(), strict=True):
        score = model.score(data, context=40)
        assert (result.bytes, result.windows) == (score.bytes, score.windows)
        assert result.patches == score.patches - score.windows
        assert result.bits_per_byte == pytest.approx(score.bits_per_byte, rel=1e-12)
        assert result.seconds > 0
