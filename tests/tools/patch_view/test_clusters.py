"""Clusters cover every byte once, hold together what belongs together, and show nothing a terminal obeys."""

from __future__ import annotations

import unicodedata

import pytest
from blt_edge.tools.patch_view.clusters import MOST_BYTES, break_rows, characters, clusters, escape
from hypothesis import given
from hypothesis import strategies as st

texts = st.one_of(
    st.binary(max_size=80), st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace"))
)


@given(texts)
def test_clusters_and_characters_cover_every_byte_once(data: bytes) -> None:
    for found in (list(characters(data)), clusters(data)):
        assert [part.start for part in found] == [0, *(part.end for part in found)][: len(found)]
        assert (found[-1].end if found else 0) == len(data)
        for part in found:
            cluster = data[part.start : part.end]
            if part.text is None:
                assert len(cluster) == 1
            else:
                assert cluster == part.text.encode()
    kept = b"".join(character.text.encode() for character in characters(data) if character.text is not None)
    assert kept == data.decode("utf-8", "ignore").encode()  # the others are those that Python refuses


@given(texts)
def test_what_is_shown_is_on_one_line_and_harmless(data: bytes) -> None:
    for cluster in clusters(data):
        assert cluster.shown
        for letter in cluster.shown:
            harmless = unicodedata.category(letter)[0] not in "CZ" or letter in " \u200c\u200d"
            assert harmless or "\U000e0020" <= letter <= "\U000e007f"


def test_all_controls_and_direction_marks_are_escaped() -> None:
    for code in [*range(32), 127, *range(0x80, 0xA1), 0x2028, 0x202E, 0x2066, 0xFEFF, 0xE0001, 0xE000]:
        (cluster,) = clusters(chr(code).encode())
        assert cluster.escaped
        assert cluster.shown.isprintable()


TOGETHER = "e\u0301 👩‍👩‍👧 🇩🇪 👍🏽 🏴\U000e0067\U000e0062\U000e007f स् ते ᄒ\u1161\u11ab ❤\ufe0f"


@pytest.mark.parametrize("whole", TOGETHER.split())
def test_what_belongs_together_is_one_cluster(whole: str) -> None:
    found = clusters(f"a{whole}b".encode())
    assert [cluster.text for cluster in found] == ["a", whole, "b"]
    assert not found[1].escaped


@pytest.mark.parametrize("parts", [["🇩🇪", "🇫🇷", "🇮"], ["\n", "\u0301"], ["a", "🏽"], ["한", "국"]], ids=ascii)
def test_what_does_not_belong_together_is_apart(parts: list[str]) -> None:
    """A mark does not sit on a line's end, nor a colour on a letter."""
    assert [cluster.text for cluster in clusters("".join(parts).encode())] == parts


def test_a_tower_of_marks_ends() -> None:
    found = clusters(("a" + 100 * "\u0301").encode())
    assert all(cluster.end - cluster.start <= MOST_BYTES for cluster in found)
    assert len(found) == 5


def test_signs() -> None:
    shown = [cluster.shown for cluster in clusters(b"\n\t\0\x1b\x7f\xff\xc2\x85 \\\xcc\x81")]
    assert shown == ["⏎", "⇥", "␀", "␛", "␡", "\\xff", "\\u0085", " ", "\\\u0301"]
    assert clusters("\u0301".encode())[0].shown == "\u25cc\u0301"
    assert " ".join(map(escape, "\n\0\x7f\u00a0\U000e0001")) == r"\n \x00 \x7f \u00a0 \U000e0001"


items = st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.integers(0, 9)), max_size=60)


@given(items, st.integers(8, 30))
def test_rows(items: list[tuple[int, bool, int]], width: int) -> None:
    widths, starts, tenths = (list(column) for column in zip(*items, strict=True)) if items else ([], [], [])
    ends = [not tenth for tenth in tenths]
    found = break_rows(widths, starts, ends, width)
    assert [index for row in found for index in row] == list(range(len(items)))
    for row in found:
        assert len(row) == 1 or sum(widths[index] for index in row) <= width
        assert not any(ends[index] for index in row[:-1])


def test_rows_break_where_a_patch_starts() -> None:
    starts = [False] * 8 + [True] + [False] * 6
    assert break_rows([1] * 15, starts, [False] * 15, 10) == [range(8), range(8, 15)]
    early = [False, True] + [False] * 13
    assert break_rows([1] * 15, early, [False] * 15, 10) == [range(10), range(10, 15)]
