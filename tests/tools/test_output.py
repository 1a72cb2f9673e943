"""Tables, progress, numbers and text as people see them."""

from __future__ import annotations

import io

from blt_edge.tools.output import (
    Messages,
    TextOutput,
    count,
    is_terminal,
    print_fields,
    print_table,
    progress_bar,
    size,
    status,
)


def test_sizes_and_counts() -> None:
    sizes = {0: "0 bytes", 999: "999 bytes", 1500: "1.5 KB", 25.1e6: "25.1 MB", 9.3e9: "9.3 GB"}
    assert [size(number) for number in sizes] == list(sizes.values())
    counts = {0: "0", 999: "999", 1234567: "1.2 M", 4.63e9: "4.6 B"}
    assert [count(number) for number in counts] == list(counts.values())


def test_a_table_in_a_pipe_is_never_cut(monkeypatch) -> None:
    out = io.StringIO()
    name = "a/very/long/path/" * 20
    print_table(("file", ">bytes"), [(name, "1"), ("[bold]x[/bold]\x1b[0m", "234")], out)
    header, _, first, second = out.getvalue().splitlines()
    words = [line.split() for line in (header, first, second)]
    assert words == [["file", "bytes"], [name, "1"], ["[bold]x[/bold]\\x1b[0m", "234"]]
    assert len(first) == len(second)
    assert not any(line.endswith(" ") for line in out.getvalue().splitlines())
    fields = io.StringIO()
    print_fields([("a", "1"), ("long name", "2")], fields)
    assert fields.getvalue() == "a          1\nlong name  2\n"
    monkeypatch.setattr("sys.stdout", None)
    print_table(("a",), [("1",)])


def test_progress_in_a_pipe_is_a_line_per_step_and_quiet_says_nothing(capsys) -> None:
    for messages in (Messages(), Messages(quiet=True)):
        with progress_bar(messages) as progress, status(messages, "loading") as say:
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
    assert not is_terminal(closed)
    assert not is_terminal(None)


def test_a_terminal_is_not_given_what_it_would_obey(monkeypatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    TextOutput(shown=True).write("a\x1b[2J\x00\tb\n\x7f\x9bé")
    assert terminal.getvalue() == "a␛[2J␀\tb\n␡\ufffdé"
