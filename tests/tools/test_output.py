"""Tables, progress, numbers and text as people see them; documents, written whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
from blt_edge.tools import output, tables
from blt_edge.tools.cli.documents import read_input, write_json
from blt_edge.tools.cli.options import STDIN
from hypothesis import given
from hypothesis import strategies as st


def test_sizes_and_counts() -> None:
    sizes = {0: "0 bytes", 999: "999 bytes", 1500: "1.5 KB", 25.1e6: "25.1 MB", 9.3e9: "9.3 GB"}
    assert [output.size(number) for number in sizes] == list(sizes.values())
    counts = {0: "0", 999: "999", 1234567: "1.2 M", 4.63e9: "4.6 B"}
    assert [output.count(number) for number in counts] == list(counts.values())


def test_a_table_in_a_pipe_is_never_cut(monkeypatch) -> None:
    out = io.StringIO()
    name = "a/very/long/path/" * 20
    tables.print_table(("file", ">bytes"), [(name, "1"), ("[bold]x[/bold]\x1b[0m", "234")], out)
    header, _, first, second = out.getvalue().splitlines()
    words = [line.split() for line in (header, first, second)]
    assert words == [["file", "bytes"], [name, "1"], ["[bold]x[/bold]\\x1b[0m", "234"]]
    assert len(first) == len(second)
    assert not any(line.endswith(" ") for line in out.getvalue().splitlines())
    fields = io.StringIO()
    tables.print_fields([("a", "1"), ("long name", "2")], fields)
    assert fields.getvalue() == "a          1\nlong name  2\n"
    monkeypatch.setattr("sys.stdout", None)
    tables.print_table(("a",), [("1",)])


@pytest.mark.parametrize("width", range(20, 90))
def test_no_figure_is_cut_where_a_terminal_is_narrow(monkeypatch, width: int) -> None:
    """Names fold; where that is not enough, lines are whole, and longer than the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    columns = ("file", "kind", ">bytes", ">memory to build")
    figures = [("fp32", "100,000,000", "3.66x"), ("int8w", "1", "1,234.5 MB")]
    rows = [(name, *row) for name, row in zip(("a/long/name " * 4, "b"), figures, strict=True)]
    whole = io.StringIO()
    tables.print_table(columns, rows, whole)
    for grows in (False, True):
        shown = Terminal("utf-8")
        monkeypatch.setattr("sys.stdout", shown)
        if grows:
            table = tables.GrowingTable(columns, (rows[0][0], "int8w", "1,000", "10 MB"))
            for row in rows:
                table.row(row)
        else:
            tables.print_table(columns, rows)
        text = re.sub(r"\x1b\[[0-9;]*m", "", shown.shown)
        lines = text.splitlines()
        for row in figures:
            assert any(all(cell in line for cell in row) for line in lines)
        # A growing table does not fold headers.
        fits = max(map(len, lines)) <= width
        assert fits == (width >= (8 + 5 + 11 + 15 + 6 if grows else 8 + 5 + 11 + 10 + 6))
        if not fits and not grows:
            assert text == whole.getvalue()


@pytest.mark.parametrize("width", [20, 30, 60])
def test_names_of_fields_are_whole_where_a_terminal_is_narrow(monkeypatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", Terminal("utf-8"))
    tables.print_fields([("memory while it runs", "1,234.5 MB of 16.0 GB"), ("b", "x")])
    assert "memory while it runs" in sys.stdout.shown
    assert "1,234.5" in sys.stdout.shown


def test_progress_in_a_pipe_is_a_line_per_step_and_quiet_says_nothing(capsys) -> None:
    for messages in (output.Messages(), output.Messages(quiet=True)):
        with output.progress_bar(messages) as progress, output.status(messages, "loading") as say:
            for done in range(5):
                progress("first\x1b", done, 10)
            progress("second", 10, 10)
            say("comparing")
            say("comparing")
        messages.say("end")
        said = [] if messages.quiet else ["loading", "first\\x1b", "second", "comparing", "end"]
        shown = capsys.readouterr()
        assert (shown.out, shown.err.splitlines()) == ("", said)


def test_closed_streams_are_no_terminals() -> None:
    closed = io.StringIO()
    closed.close()
    assert not output.is_terminal(closed)
    assert not output.is_terminal(None)


HOSTILE = "a\x1b[2J\x00\tb\n\x7f\x9bé\u202egpj\u200b\u2066\ufeff\u2028\U000e0041"


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_terminal_is_not_given_what_it_would_obey(monkeypatch, encoding: str) -> None:
    monkeypatch.setattr("sys.stdout", Terminal(encoding))
    output.TextOutput(shown=True).write(HOSTILE.encode() + b"\xff")
    expected = "a␛[2J␀\tb\n␡\ufffdé\\u202egpj\\u200b\\u2066\\ufeff\\u2028\\U000e0041\ufffd"
    assert sys.stdout.shown == expected


def test_lines_and_messages_hold_nothing_that_a_terminal_would_obey(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", Terminal("utf-8"))
    monkeypatch.setattr("sys.stderr", Terminal("utf-8"))
    output.echo(HOSTILE)
    assert sys.stdout.shown.count("\n") == 2
    output.Messages().say(f"wrote {HOSTILE}")
    output.error_line(HOSTILE)
    assert sys.stderr.shown.count("\n") == 2  # no name makes a line of its own
    output.show_traceback(ValueError(HOSTILE))
    for shown in (sys.stdout.shown, sys.stderr.shown):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u202e\u2066\ufeff\U000e0041]", shown)
    piped = io.StringIO()
    output.echo(HOSTILE, piped)
    assert piped.getvalue() == HOSTILE + "\n"


@given(st.binary(), st.lists(st.integers(0, 9)))
def test_whole_characters_are_all_bytes_cut_where_no_character_is(data: bytes, cuts: list[int]) -> None:
    characters, pieces, start = output.WholeCharacters(), [], 0
    for size in (*cuts, len(data)):
        pieces.append(characters.push(data[start : start + size]))
        start += size
    assert len(data) - sum(map(len, pieces)) == characters.pending <= 3
    pieces.append(characters.flush())
    assert b"".join(pieces) == data
    assert "".join(piece.decode("utf-8", "replace") for piece in pieces) == data.decode("utf-8", "replace")


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
    assert [json.loads(path.read_text()) for path in tmp_path.iterdir()] == [{"a": 1}]


def test_an_error_names_the_file_that_was_asked_for_and_a_device_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        write_json(tmp_path / "nowhere" / "file", {})
    assert missing.value.filename == str(tmp_path / "nowhere" / "file")
    write_json(Path(os.devnull), {"a": 1})
    assert not Path(os.devnull).is_file()


def test_missing_stdin_is_empty(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert read_input(STDIN, output.Messages(), "the prompt") == b""
