"""Patches and reasons of a view, against the rules written out in plain loops; its figures and tables."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.patching import PatchingRule
from blt_edge.tools.patch_view.view import (
    COLUMNS,
    byte_rows,
    csv_text,
    cut,
    fixed_starts,
    histogram_rows,
    look,
    patch_document,
    rule_words,
    summarize,
)
from hypothesis import given
from hypothesis import strategies as st

LATEST = {"max_patch_length": 4}
RULES: dict[str, dict] = {
    "where entropy is over 2.5 nats": {"threshold": 2.5},
    "where entropy rises by more than 0.7 nats": {"threshold": 0.7, "monotonic": True},
    "where entropy is over 1.5 nats and rises by more than 0.5": {"threshold": 1.5, "threshold_add": 0.5},
    "behind the first of some spaces or signs": {"mode": "space"},
    "every 5 bytes": {"mode": "static", "patch_size": 5},
    "with every byte": {"mode": "byte"},
    "where entropy is over 3.5 nats, and after 4 bytes at the latest": {"threshold": 3.5} | LATEST,
    "every 9 bytes, and after 4 bytes at the latest": {"mode": "static", "patch_size": 9} | LATEST,
}
"""By their own words."""


def expected(data: bytes, rule: PatchingRule, entropies: np.ndarray) -> list[tuple[int, str]]:
    """(position, reason) of each start, by the module's own words for positions in the text."""
    found = [(0, "first")]
    for at in range(1, len(data) + 1):  # position at + 1 with BOS, so H[i] is entropies[at]
        if rule.mode == "entropy":
            rise = entropies[at] - entropies[at - 1]
            if rule.monotonic:
                starts = at == 1 or rise > np.float32(rule.threshold)
            elif rule.threshold_add is not None:
                over = entropies[at] > np.float32(rule.threshold) and rise > np.float32(rule.threshold_add)
                starts = at == 1 or (at > 2 and over)
            else:
                starts = entropies[at] > np.float32(rule.threshold)
        elif rule.mode == "space":

            def space(byte: int) -> bool:
                return byte >= 0xC0 or (byte < 0x80 and not chr(byte).isalnum())

            # Before the first byte stands BOS, which is space-like.
            starts = at > 1 and space(data[at - 1]) and not space(data[at - 2])
        else:
            starts = rule.mode == "byte" or at % (rule.patch_size or 1) == 0
        if starts:
            found.append((at, "first" if at < fixed_starts(rule) else rule.mode))
        elif rule.max_patch_length and at - found[-1][0] == rule.max_patch_length:
            found.append((at, "max_patch_length"))
    return found


@pytest.mark.parametrize("words", RULES)
def test_words_starts_and_reasons(make_view, odd_text: bytes, words: str) -> None:
    view = make_view(odd_text, **RULES[words])
    assert rule_words(view.rule) == words
    wanted = expected(odd_text, view.rule, view.entropies)
    assert view.next_starts == (wanted[-1][0] == len(odd_text))
    wanted = [pair for pair in wanted if pair[0] < len(odd_text)]
    assert list(zip(view.starts, view.reasons, strict=True)) == wanted


@given(st.binary(min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 5))
def test_numbers_fit_together(data: bytes, share: float, seed: int) -> None:
    values = np.random.default_rng(seed).uniform(0, 4, len(data) + 1).astype(np.float32)
    view = cut(data, PatchingRule("entropy", threshold=4 * share), values)
    assert sum(view.lengths) == len(view.patches) == len(data)
    for at, number in enumerate(view.patches):
        assert (at in view.starts) == (at == 0 or number != view.patches[at - 1])
    assert view.patches[-1] == len(view.lengths)
    shown = sum(view.starts_with(cluster) + view.inner_starts(cluster) for cluster in view.clusters)
    assert shown == len(view.starts)
    numbers = [view.patches[cluster.start] for cluster in view.clusters]
    assert np.array_equal(np.diff(view.visible_patches), np.diff(numbers) != 0)
    assert view.top >= max(1.0, float(values.max()))


def test_colours_alternate_over_patches_that_lie_inside_a_character() -> None:
    view = cut("a你b".encode(), PatchingRule("byte"), None)
    assert (view.patches, view.visible_patches) == ([1, 2, 3, 4, 5], [0, 1, 2])
    assert [view.inner_starts(cluster) for cluster in view.clusters] == [0, 2, 0]


def test_over_threshold_and_rises(make_view) -> None:
    plain = make_view(b"some text")
    assert plain.rises is None
    over = plain.entropies[1:-1] > np.float32(plain.rule.threshold)
    assert plain.over_threshold.tolist() == over.tolist()
    rising = make_view(b"some text", threshold=0.5, monotonic=True)
    rises = np.diff(rising.entropies[:-1])
    np.testing.assert_array_equal(rising.rises[1:], rises)
    assert rising.over_threshold.tolist() == (rises[1:] > 0.5).tolist()
    assert rising.level is make_view(b"some text", mode="space").over_threshold is None


@pytest.mark.parametrize(
    ("data", "rule", "reason"), [(b"", {"mode": "byte"}, "empty"), (b"x", {"threshold": 1.0}, "no entropies")]
)
def test_what_cannot_be_cut(make_view, data: bytes, rule: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_view(data, patcher=False, **rule)


def test_look_runs_the_patcher_only(tiny_model, odd_text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BltModel.load(tiny_model.bundle, threads=1)
    data = odd_text[:400]
    lengths, entropies = model.patch_lengths(data), model.entropies(data)
    for stage in ("encoder", "latent", "decoder"):
        monkeypatch.delitem(model._backends, stage)
    view = look(model, data, model.manifest.patching)
    assert [1, *view.lengths] == lengths
    np.testing.assert_array_equal(view.entropies, entropies)


@pytest.mark.parametrize("size", [499, 500, 998, 1300])
def test_a_text_beyond_the_models_positions_is_read_in_windows(model: BltModel, size: int) -> None:
    """Each as a text of its own: entropies, starts and reasons; characters of UTF-8 are not cut."""
    data = (b"ab \xe2\x82\xac cd" * 200)[:size]
    view = look(model, data, model.manifest.patching)
    assert view.data == data
    assert view.windows[0] == 0
    edges = [*view.windows, size]
    assert all(end - start >= 496 for start, end in pairwise(edges[:-1]))
    starts, entropies = [], []
    for start, end in pairwise(edges):
        window = data[start:end]
        assert window[0] & 0xC0 != 0x80
        assert len(window) <= 499
        lengths = model.patch_lengths(window)[1:]
        starts += [start + int(at) for at in np.cumsum([0, *lengths[:-1]])]
        entropies += model.entropies(window)[:-1].tolist()
    assert view.starts == tuple(starts)
    assert view.entropies is not None
    assert view.entropies[:-1].tolist() == entropies
    assert [view.reasons[view.starts.index(start)] for start in view.windows] == ["first"] * len(view.windows)
    assert view.over_threshold is not None
    assert len(view.over_threshold) == size - len(view.windows)
    rises = replace(view, rule=replace(view.rule, monotonic=True)).rises
    assert rises is not None
    assert np.flatnonzero(np.isnan(rises)).tolist() == list(view.windows)
    assert patch_document(view)["windows"] == list(view.windows)


# Figures.


def test_summary(make_view, odd_text: bytes) -> None:
    view = make_view(odd_text)
    summary = summarize(view)
    kept = odd_text.decode("utf-8", "ignore")
    assert (summary.bytes, summary.characters, summary.patches) == (
        len(odd_text),
        len(kept),
        len(view.starts),
    )
    assert summary.invalid_bytes == len(odd_text) - len(kept.encode())
    assert summary.median_length == np.median(view.lengths)
    assert summary.lengths == Counter(view.lengths)
    assert summary.mean_entropy == pytest.approx(float(np.mean(view.entropies[:-1])))
    assert summary.over_threshold == pytest.approx((len(view.starts) - 1) / (len(odd_text) - 1))


def test_what_there_is_none_of(make_view) -> None:
    assert summarize(make_view(b"x")).over_threshold is None
    bare = summarize(make_view(b"xyz", patcher=False, mode="byte"))
    assert bare.mean_entropy is bare.over_threshold is None
    assert str(bare) == "3 bytes, 3 characters, 3 patches"
    assert str(summarize(make_view(b"\xff"))) == "1 byte, 0 characters, 1 invalid byte, 1 patch"


def test_histogram(make_view) -> None:
    rows = histogram_rows(summarize(make_view(b"x" * 700, mode="static", patch_size=33)))
    assert [name for name, _ in rows] == [*map(str, range(1, 9)), "9-16", "17-32", "33-64"]
    assert [count for _, count in rows] == [0] * 6 + [1] + [0] * 3 + [21]  # 700 = 21 * 33 + 7


# Tables: the text can be put together from them, and every number is the view's.


def test_rows(make_view, odd_text: bytes) -> None:
    view = make_view(odd_text)
    rows = list(byte_rows(view))
    assert bytes(row["byte"] for row in rows) == odd_text
    assert [row["position"] for row in rows] == list(range(len(odd_text)))
    assert [np.float32(row["entropy"]) for row in rows] == view.entropies[:-1].tolist()
    assert [row["patch"] for row in rows] == view.patches
    assert [row["position"] for row in rows if row["starts_patch"]] == list(view.starts)
    assert tuple(row["reason"] for row in rows if row["reason"]) == view.reasons
    for row in rows:
        character = row["character"]
        if character is not None:
            encoded = character.encode()
            assert encoded[row["position"] - row["character_position"]] == row["byte"]
            assert odd_text[row["character_position"] :].startswith(encoded)


def test_csv(make_view, odd_text: bytes) -> None:
    view = make_view(odd_text)
    text = csv_text(view)
    assert text.count("\n") == len(odd_text) + 1 == len(text.splitlines())
    assert "\0" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert {row["starts_patch"] for row in rows} == {"0", "1"}
    assert rows[odd_text.index(b"\n")]["character"] == "\\n"
    assert rows[-1]["character"] == ""
    assert {row["character"] for row in rows} >= {" ", "|", '"', ",", "\\", "你", "\\u202e"}
    bare = make_view(b"abc", patcher=False, mode="byte")
    assert csv_text(bare).splitlines()[1] == "0,97,a,0,,1,1,first"


def test_document(make_view, odd_text: bytes) -> None:
    view = make_view(odd_text, max_patch_length=3)
    document = json.loads(json.dumps(patch_document(view)))
    assert document["text"] == odd_text.decode("utf-8", "replace")
    assert document["rule"]["max_patch_length"] == 3
    assert document["summary"]["patches"] == len(view.starts)
    assert document["next"]["starts_patch"] == view.next_starts
    assert np.float32(document["next"]["entropy"]) == view.entropies[-1]
    assert len(document["bytes"]) == len(odd_text)
    assert "BOS" in document["conventions"]
