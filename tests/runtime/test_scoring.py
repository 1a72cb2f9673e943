"""Bits per byte against the definition, with a model whose logits follow from the ids alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.runtime.scoring import Score, score
from blt_edge.runtime.vocabulary import BOS
from hypothesis import given, settings
from hypothesis import strategies as st

TABLE = np.random.default_rng(0).normal(size=(260, 260)).astype(np.float32) * 4
# So large that their exponentials are infinite, and so small that they are 0.
TABLE[4 + ord("x")] += 5000
TABLE[4 + ord("y")] -= 5000
TABLE[4 + ord("z"), 4 + ord("z")] += 5000


class ScriptedSequence:
    """Logits after an id are that id's row of the table, scaled by how many ids came before."""

    def __init__(self, chunk: int, opened: list[int]) -> None:
        self._chunk, self._opened = chunk, opened
        self.boundaries = SimpleNamespace(patch_lengths=lambda: [1] * (1 + self._length // 3))
        self._length = 0

    def extend(self, ids: np.ndarray) -> Iterator[Any]:
        assert ids[0] == BOS
        self._opened.append(len(ids))
        room = np.empty((self._chunk, 260), np.float32)
        for start in range(0, len(ids), self._chunk):
            part = ids[start : start + self._chunk]
            rows = room[: len(part)]  # written over by the next chunk, as a real one is
            rows[:] = TABLE[part] * (1 + np.arange(start, start + len(part))[:, None] % 3)
            self._length += len(part)
            yield SimpleNamespace(logits=rows)


def model(chunk: int, opened: list[int], trained: int = 50, positions: int = 400) -> Any:
    return SimpleNamespace(
        manifest=SimpleNamespace(model=SimpleNamespace(trained_context=trained)),
        limits=SimpleNamespace(max_positions=positions),
        sequence=lambda: ScriptedSequence(chunk, opened),
    )


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
    result = score(
        model(chunk, opened), data, context=context, progress=lambda done, all_: told.append((done, all_))
    )
    assert result.bits_per_byte == pytest.approx(by_definition(data, context), rel=1e-5)
    windows = [len(data[start : start + context - 1]) for start in range(0, len(data), context - 1)]
    assert opened == [1 + length for length in windows]
    assert (result.bytes, result.windows, result.context) == (len(data), len(windows), context)
    assert result.patches == sum(1 + (1 + length) // 3 for length in windows)
    assert told == [(sum(windows[: index + 1]), len(data)) for index in range(len(windows))]


def test_the_window_is_the_trained_context_unless_one_is_given() -> None:
    opened: list[int] = []
    assert score(model(7, opened, trained=5), b"twelve bytes").context == 5
    assert opened == [5, 5, 5]
    assert score(model(7, opened), b"ab", context=2).windows == 2
    assert score(model(7, opened), b"ab", context=400).windows == 1


@pytest.mark.parametrize("context", [1, 0, -5, 401, True, 3.0, "9"])
def test_a_context_without_room_is_refused(context: Any) -> None:
    with pytest.raises(OptionError, match=r"context: got .*a whole number from 2 to 400"):
        score(model(7, []), b"ab", context=context)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(OptionError, match="empty"):
        score(model(7, []), b"")


def test_seconds_are_those_that_passed() -> None:
    began = time.perf_counter()
    result = score(model(3, []), b"some bytes " * 20)
    assert 0 < result.seconds <= time.perf_counter() - began
    assert result.bytes_per_second == result.bytes / result.seconds
    assert Score(1.0, 30, 1, 1, 9, 1.5).bytes_per_second == 20.0
    assert Score(1.0, 30, 1, 1, 9, 0.5).bytes_per_second == 60.0
    assert Score(1.0, 30, 1, 1, 9, 0.0).bytes_per_second == 0.0
