"""Tables and documents, read back by others' readers."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blt_edge.runtime.errors import BltError
from blt_edge.tools.corpus import exports
from blt_edge.tools.corpus.exports import COLUMNS, check_parquet, write_csv, write_document, write_parquet
from blt_edge.tools.corpus.results import Result

SHA = "0" * 64
RESULTS = [
    Result('a, b\n"c"', None, 3, 1, 2, 1, 0.1 + 0.2, SHA),
    Result("gr\u00fc\u00df.jsonl", 12, 2**40, 2**33, 5, 7, 1e300, SHA),
    Result("empty", 1, 0, 0, 0, 0, 0.0, SHA, "empty"),
    Result("gone", None, 0, 0, 0, 0, 0.0, None, "unreadable: no"),
]
ROWS = [{name: result.to_dict().get(name) for name in COLUMNS} for result in RESULTS]


def test_csv(tmp_path: Path) -> None:
    out = io.StringIO()
    write_csv(None, RESULTS, out)
    write_csv(tmp_path / "out", RESULTS, None)
    with (tmp_path / "out").open(encoding="utf-8", newline="") as file:
        text = file.read()
    assert text == out.getvalue()
    assert "\r" not in text
    read = list(csv.DictReader(io.StringIO(text)))
    assert list(read[0]) == list(COLUMNS)
    for row, wanted in zip(read, ROWS, strict=True):
        assert {name: COLUMNS[name](cell) if cell else None for name, cell in row.items()} == wanted


@pytest.mark.parametrize("group", [1, 3, 10_000])
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'blt-edge[corpus]'")
    monkeypatch.setattr(exports, "_GROUP", group)
    write_parquet(tmp_path / "out", RESULTS)
    read = parquet.ParquetFile(tmp_path / "out")
    assert read.num_row_groups == -(-len(RESULTS) // group)
    assert read.read().to_pylist() == ROWS
    write_parquet(tmp_path / "out", [])
    assert parquet.read_table(tmp_path / "out").schema.names == list(COLUMNS)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    result = Result(name, None, 3, 1, 2, 1, 6.0, SHA)
    write_csv(tmp_path / "out", [result], None)
    assert b"caf\xe9,," in (tmp_path / "out").read_bytes()
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(tmp_path / "table", [result])
    assert parquet.read_table(tmp_path / "table").to_pylist()[0]["file"].startswith("caf\\")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_document(tmp_path: Path, count: int) -> None:
    head = {"model": "m", "total": {"bits": 1.0, "word_perplexity": None}}
    write_document(tmp_path / "out", head, RESULTS[:count], None)
    text = (tmp_path / "out").read_text("ascii")
    document = {**head, "files": [result.to_dict() for result in RESULTS[:count]]}
    assert text == json.dumps(document, indent=2) + "\n"


def test_nothing_is_left_of_what_broke_off(tmp_path: Path) -> None:
    def breaking() -> Iterator[Result]:
        yield RESULTS[0]
        raise KeyboardInterrupt

    pytest.importorskip("pyarrow")
    (tmp_path / "out").write_text("as it was")
    for write in (
        lambda: write_csv(tmp_path / "out", breaking(), None),
        lambda: write_parquet(tmp_path / "out", breaking()),
        lambda: write_document(tmp_path / "out", {"a": 1}, breaking(), None),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
        assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]


def test_parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BltError, match=r"--parquet needs the package pyarrow.*\[corpus\]"):
        check_parquet()
