"""Rows for programs: the text can be put together from them, and every number is the view's."""

from __future__ import annotations

import csv
import json

import numpy as np
from blt_edge.tools.patch_view.tables import COLUMNS, byte_rows, csv_text, patch_document


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
    assert bytes(int(row["byte"]) for row in rows) == odd_text
    assert {row["starts_patch"] for row in rows} == {"0", "1"}
    assert rows[odd_text.index(b"\n")]["character"] == "\\n"
    assert rows[-1]["character"] == ""
    assert {row["character"] for row in rows} >= {" ", "|", '"', ",", "\\", "你", "\\u202e"}


def test_document(make_view, odd_text: bytes) -> None:
    view = make_view(odd_text, max_patch_length=3)
    document = json.loads(json.dumps(patch_document(view)))
    assert document["text"] == odd_text.decode("utf-8", "replace")
    assert document["rule"]["max_patch_length"] == 3
    assert document["summary"]["patches"] == len(view.starts)
    assert document["next"] == {
        "entropy": document["next"]["entropy"],
        "starts_patch": view.next_starts,
    }
    assert np.float32(document["next"]["entropy"]) == view.entropies[-1]
    assert len(document["bytes"]) == len(odd_text)
    assert "BOS" in document["conventions"]


def test_no_entropies(make_view) -> None:
    view = make_view(b"abc", patcher=False, mode="byte")
    assert [row["entropy"] for row in byte_rows(view)] == [None] * 3
    assert csv_text(view).splitlines()[1] == "0,97,a,0,,1,1,first"
