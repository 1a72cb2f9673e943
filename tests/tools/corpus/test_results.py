"""Totals against arithmetic without rounding, and lines that say the same when they are read again."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.tools.corpus.results import Result, Totals
from hypothesis import given
from hypothesis import strategies as st

SHA = "0123456789abcdef" * 4
COUNTS = st.integers(0, 2**40)
SCORED = st.builds(
    Result,
    name=st.text(max_size=5),
    line=st.none() | COUNTS,
    bytes=st.integers(1, 2**40),
    words=COUNTS,
    patches=COUNTS,
    windows=COUNTS,
    bits=st.floats(0, 1e12),
    sha256=st.just(SHA),
)
NOTED = st.builds(
    lambda name, line, note: Result(name, line, 0, 0, 0, 0, 0.0, SHA if note == "empty" else None, note),
    st.text(max_size=5),
    st.none() | COUNTS,
    st.sampled_from(["empty", "unreadable: no"]),
)


@given(SCORED | NOTED)
def test_a_line_says_all(result: Result) -> None:
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@given(st.lists(SCORED | NOTED, max_size=8), st.randoms(use_true_random=False))
def test_totals_do_not_depend_on_order(results: list[Result], random: Any) -> None:
    one, other = Totals(), Totals()
    mixed = list(results)
    random.shuffle(mixed)
    for result in results:
        one.add(result)
    for result in (*mixed, *mixed[:2]):
        other.add(result)
    for result in mixed[:2]:
        other.remove(result)
    assert one.to_dict() == other.to_dict()
    scored = [result for result in results if result.note is None]
    assert (one.texts, one.texts + one.empty + one.unread) == (len(scored), len(results))
    if scored:
        bits = sum((Fraction(result.bits) for result in scored), Fraction())
        assert one.bits_per_byte == float(bits / sum(result.bytes for result in scored))


def test_perplexities() -> None:
    totals = Totals()
    assert totals.to_dict() is None
    totals.add(Result("a", None, 4, 2, 3, 1, 8.0, SHA))
    assert (totals.byte_perplexity, totals.word_perplexity) == (4.0, 16.0)
    totals.add(Result("b", None, 10_000, 0, 3, 1, 20_000.0, SHA))  # as many bits as no double has
    assert totals.word_perplexity is None
    assert json.loads(json.dumps(totals.to_dict(), allow_nan=False))["word_perplexity"] is None
    only = Totals()
    only.add(Result("b", None, 1, 0, 1, 1, 2.0, SHA))
    assert (only.byte_perplexity, only.word_perplexity) == (4.0, None)


GOOD = Result("a", 1, 4, 2, 3, 1, 8.0, SHA).to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"file": 5},
        {"file": None},
        {"line": -1},
        {"line": True},
        {"bytes": 0},
        {"bytes": 1.5},
        {"words": "2"},
        {"bits": math.inf},
        {"bits": None},
        {"bits": True},
        {"sha256": "A" * 64},
        {"sha256": None},
        {"note": 5},
        {"note": "empty", "sha256": None},
    ],
)
def test_other_lines_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Result.from_dict({**GOOD, **change})


@pytest.mark.parametrize("data", [None, [], "a", 5, {}])
def test_what_is_no_line_is_refused(data: object) -> None:
    with pytest.raises(OptionError):
        Result.from_dict(data)
