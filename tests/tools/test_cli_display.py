"""Tables, progress and numbers as people see them."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pytest
from blt_edge.tools.cli.documents import read_input, write_json
from blt_edge.tools.cli.options import STDIN
from blt_edge.tools.output import (
    Session,
    count,
    is_terminal,
    print_fields,
    print_table,
    progress_bar,
    size,
    status,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (25.1e6, "25.1 MB"), (9.3e9, "9.3 GB")],
)
def test_sizes(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (1234567, "1.2 M"), (4.63e9, "4.6 B")])
def test_counts(number: float, text: str) -> None:
    assert count(number) == text


def test_a_table_in_a_pipe_is_never_cut() -> None:
    out = io.StringIO()
    name = "a/very/long/path/" * 20
    print_table(("file", ">bytes"), [(name, "1"), ("[bold]x[/bold]\x1b[0m", "234")], out)
    header, _, first, second = out.getvalue().splitlines()
    assert header.split() == ["file", "bytes"]
    assert first.split() == [name, "1"]
    assert second.split() == ["[bold]x[/bold]\\x1b[0m", "234"]
    assert len(first) == len(second)
    assert not any(line.endswith(" ") for line in out.getvalue().splitlines())


def test_fields() -> None:
    out = io.StringIO()
    print_fields([("a", "1"), ("long name", "2")], out)
    assert out.getvalue() == "a          1\nlong name  2\n"


def test_a_table_without_stdout_is_nothing(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    print_table(("a",), [("1",)])


def test_progress_in_a_pipe_is_a_line_per_step(capsys) -> None:
    with progress_bar(Session()) as progress:
        for done in range(5):
            progress("first\x1b", done, 10)
        progress("second", 10, 10)
    with status(Session(), "loading") as say:
        say("comparing")
        say("comparing")
    assert capsys.readouterr().err.splitlines() == ["first\\x1b", "second", "loading", "comparing"]


def test_quiet_says_nothing(capsys) -> None:
    with progress_bar(Session(quiet=True)) as progress, status(Session(quiet=True), "x") as say:
        progress("first", 1, 2)
        say("y")
    Session(quiet=True).say("z")
    assert capsys.readouterr() == ("", "")


def test_closed_streams_are_no_terminals() -> None:
    closed = io.StringIO()
    closed.close()
    assert not is_terminal(closed)
    assert not is_terminal(None)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(TypeError):
        write_json(target, {"no": object()})
    assert target.read_text() == "old"
    write_json(target, {"text": "é\n", "nan": math.nan, "list": [1, (math.inf,)]})
    assert json.loads(target.read_text()) == {"text": "é\n", "nan": "nan", "list": [1, ["inf"]]}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["あ" * 83 + ".json", "a" * 250 + ".json"])
def test_a_name_as_long_as_names_may_be(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, {"a": 1})
    assert json.loads((tmp_path / name).read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        write_json(tmp_path / "nowhere" / "file", {})
    assert missing.value.filename == str(tmp_path / "nowhere" / "file")


def test_json_to_a_device_does_not_replace_it(tmp_path: Path) -> None:
    write_json(Path(os.devnull), {"a": 1})
    assert not Path(os.devnull).is_file()


def test_missing_stdin_is_empty(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert read_input(STDIN, Session(), "the prompt") == b""
