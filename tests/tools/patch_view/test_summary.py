"""Counts, against the text and its patches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from blt_edge.tools.patch_view.tables import counted, histogram_rows, summarize


def test_counts(make_view, odd_text: bytes) -> None:
    view = make_view(odd_text)
    summary = summarize(view)
    assert summary.bytes == len(odd_text)
    assert summary.characters == len(odd_text.decode("utf-8", "ignore"))
    assert summary.invalid_bytes == len(odd_text) - len(odd_text.decode("utf-8", "ignore").encode())
    assert summary.patches == len(view.starts)
    assert summary.mean_length == pytest.approx(len(odd_text) / len(view.starts))
    assert summary.median_length == np.median(view.lengths)
    assert summary.longest == max(view.lengths)
    assert summary.lengths == Counter(view.lengths)
    assert summary.mean_entropy == pytest.approx(float(np.mean(view.entropies[:-1])))
    assert summary.over_threshold == pytest.approx((len(view.starts) - 1) / (len(odd_text) - 1))


def test_what_there_is_none_of(make_view) -> None:
    assert summarize(make_view(b"x")).over_threshold is None
    bare = summarize(make_view(b"xyz", patcher=False, mode="byte"))
    assert bare.mean_entropy is None
    assert bare.over_threshold is None
    assert counted(bare) == "3 bytes, 3 characters, 3 patches"
    assert counted(summarize(make_view(b"\xff"))) == "1 byte, 0 characters, 1 invalid byte, 1 patch"


def test_histogram(make_view) -> None:
    rows = histogram_rows(summarize(make_view(b"x" * 700, mode="static", patch_size=33)))
    assert [name for name, _ in rows] == [*map(str, range(1, 9)), "9-16", "17-32", "33-64"]
    assert [count for _, count in rows] == [0] * 6 + [1] + [0] * 3 + [21]  # 700 = 21 * 33 + 7
    assert histogram_rows(summarize(make_view(b"xy", mode="byte"))) == [("1", 2)]
