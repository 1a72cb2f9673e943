"""Results as one JSON document, as CSV and as Parquet: each written whole or not at all, row by row.

What it does not know: where results come from. pyarrow is imported when a Parquet file is written.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from ...runtime.errors import BltError, requirement
from ...runtime.files import write_whole
from .results import Result

__all__ = ["COLUMNS", "check_parquet", "write_csv", "write_document", "write_parquet"]

COLUMNS = {
    "file": str,
    "line": int,
    "bytes": int,
    "words": int,
    "patches": int,
    "bytes_per_patch": float,
    "bits": float,
    "bits_per_byte": float,
    "windows": int,
    "sha256": str,
    "note": str,
}
"""Of a table, with their types. Cells are empty (null) where a text has no line, no note, or no figures."""

_GROUP = 10_000
"""Rows that a group of a Parquet file has."""


def check_parquet() -> None:
    """Refuse a Parquet file that can't be written, before hours of scoring. Raises BltError."""
    if importlib.util.find_spec("pyarrow") is None:
        raise BltError(
            "--parquet needs the package pyarrow, which is not installed: "
            f"pip install {requirement('corpus')}"
        )


def write_csv(target: Path | None, results: Iterable[Result], stdout: TextIO | None) -> None:
    """Write a table in UTF-8 (names as they are, whatever bytes they have); to stdout without a target.

    Raises OSError.
    """

    def write(file: TextIO) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_row(result).values() for result in results)

    def write_file(path: Path) -> None:
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            write(file)

    if target is not None:
        write_whole(target, write_file)
    elif stdout is not None:
        write(stdout)


def write_parquet(target: Path, results: Iterable[Result]) -> None:
    """Write a table in groups of rows. In names, bytes that are no UTF-8 become escapes. Raises OSError."""
    import pyarrow
    from pyarrow import parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])

    def write(path: Path) -> None:
        rows = map(_row, results)
        with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
            while group := list(islice(rows, _GROUP)):
                for row in group:
                    row["file"] = row["file"].encode("utf-8", "backslashreplace").decode()
                writer.write_table(pyarrow.Table.from_pylist(group, schema))

    write_whole(target, write)


def write_document(
    target: Path | None, head: Mapping[str, Any], results: Iterable[Result], stdout: TextIO | None
) -> None:
    """Write a document with what `head` has and, under "files", the results; to stdout without a target.

    What is infinite or no number becomes null. Raises OSError.
    """

    def write(file: TextIO) -> None:
        file.writelines(_document(head, results))

    def write_file(path: Path) -> None:
        with path.open("w", encoding="ascii") as file:
            write(file)

    if target is not None:
        write_whole(target, write_file)
    elif stdout is not None:
        write(stdout)


def _document(head: Mapping[str, Any], results: Iterable[Result]) -> Iterator[str]:
    yield json.dumps(head, indent=2)[:-2] + ',\n  "files": ['
    first = True
    for result in results:
        text = json.dumps(result.to_dict(), indent=2).replace("\n", "\n    ")
        yield ("\n    " if first else ",\n    ") + text
        first = False
    yield "]\n}\n" if first else "\n  ]\n}\n"


def _row(result: Result) -> dict[str, Any]:
    told = result.to_dict()
    return {name: told.get(name) for name in COLUMNS}
