"""Windows of texts that are too long, against what the harness says of its own."""

from __future__ import annotations

import pytest
from blt_edge.tools.harness.spans import Span, common_length, spans
from hypothesis import given
from hypothesis import strategies as st


@given(text=st.binary(max_size=80), first=st.integers(0, 90), length=st.integers(2, 30))
def test_every_byte_is_predicted_once_after_what_is_before_it(text: bytes, first: int, length: int) -> None:
    at = min(first, len(text))
    found = list(spans(text, at, length))
    assert b"".join(span.scored for span in found) == text[at:]
    for span in found:
        assert 1 + len(span.before) + len(span.scored) - 1 <= length
        assert text[:at].endswith(span.before)
        at += len(span.scored)
    if found and len(text) >= length:  # the last has as much before it as fits
        assert len(found[-1].before) + len(found[-1].scored) == length
    if len(text) <= length and first < len(text):
        assert found == [Span(text[:first], text[first:])]
    if len(text) - first < length and first < len(text):
        assert len(found) == 1


@given(text=st.binary(min_size=1, max_size=80), length=st.integers(2, 30))
def test_a_whole_text_is_cut_as_the_harness_cuts(text: bytes, length: int) -> None:
    """A first id of its windows is of the text where ours is BOS: as many ids are one byte less."""
    utils = pytest.importorskip("lm_eval.utils")
    windows = list(utils.get_rolling_token_windows([*text], -1, length, 1))
    found = list(spans(text, 0, length))
    assert found[0].scored == bytes(windows[0][1])
    assert (found[0].before, windows[0][0][0]) == (b"", -1)
    if len(windows) == 1:
        assert len(found) == 1


@given(one=st.binary(max_size=6), other=st.binary(max_size=6), beginning=st.binary(max_size=40))
def test_common_length(one: bytes, other: bytes, beginning: bytes) -> None:
    a, b = beginning + one, beginning + other
    expected = next((at for at in range(min(len(a), len(b))) if a[at] != b[at]), min(len(a), len(b)))
    assert common_length(a, b) == expected
