"""`blt-edge chat` in a pipe: answers, figures, commands."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.tools.cli.chat_lines import COMMANDS, SETTINGS, complete
from blt_edge.tools.cli.line_reader import history_file, paths_that_begin
from support.chat import closed, visible


@pytest.fixture
def chat(cli, tiny_model) -> Any:
    """`chat("line", ..., flags=())` -> click's Result; 10 bytes a turn, no drafts."""

    def run(*lines: str | bytes, flags: tuple[object, ...] = ()) -> Any:
        given = [line.encode() if isinstance(line, str) else line for line in lines]
        base = ("chat", "-m", tiny_model.bundle, "-n", 10, "--draft", "none", "--threads", 1)
        return cli(*base, *flags, stdin=b"".join(line + b"\n" for line in given))

    return run


def test_answers_on_stdout_figures_on_stderr(chat, model: BltModel) -> None:
    result = chat("Once", "")
    first = model.generate("Once\n", GenerationOptions(max_new_bytes=10))
    second = model.generate(b"Once\n" + first.data, GenerationOptions(max_new_bytes=10))
    assert result.exit_code == 0
    both = visible(first.data + second.data).removeprefix(visible(first.data))
    assert result.stdout == closed(first.data) + both + "\n" * (not both.endswith("\n"))
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"\[10 new bytes, .*first in", line)
        assert "bytes/s" in line
        assert "bytes a patch" in line
    assert ">" not in result.output


def test_quiet_says_nothing_but_answers_and_errors(chat) -> None:
    assert (chat().exit_code, chat().output) == (0, "")
    result = chat("Once", "/set top_k=3", "/undo", "/reset", flags=("-q",))
    assert (result.exit_code, result.stderr) == (0, "")
    assert chat("/nonsense", flags=("-q",)).stderr.startswith("error: there is no command /nonsense")


def test_drafts_are_told_of(cli, tiny_model) -> None:
    flags = ("-m", tiny_model.bundle, "-n", 60, "--draft", "decoder", "--draft-length", 4)
    assert ", guesses " in cli("chat", *flags, stdin=b"Once\n").stderr


@pytest.mark.parametrize("line", [b"\xff\x00\xfe", "早い".encode(), bytes(set(range(1, 256)) - {10, 47})])
def test_lines_are_taken_byte_by_byte(chat, tmp_path: Path, line: bytes) -> None:
    assert chat(line, "//etc//x", "///", f"/text {tmp_path / 'text'}").exit_code == 0
    text = (tmp_path / "text").read_bytes()
    assert text.startswith(line + b"\n")
    assert b"\n/etc//x\n" in text  # a slash of the text
    assert b"\n//\n" in text


def test_it_starts_with_a_prompt(chat, model: BltModel, tmp_path: Path) -> None:
    (tmp_path / "start").write_bytes(b"Once\xff")
    made = model.generate(b"Once\xff", GenerationOptions(max_new_bytes=10)).data
    result = chat("", "/reset", "/text", flags=("--prompt-file", tmp_path / "start"))
    assert result.stdout == closed(made) + "Once\ufffd\n"
    assert "started over with 5 bytes of text" in result.stderr
    assert chat("", flags=("-p", "Once")).exit_code == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-p", "x", "--prompt-file", __file__), "--prompt and --prompt-file"),
        (("-p", "-"), "stdin"),
        (("--prompt-file", "-"), "stdin"),
        (("-p", "x" * 500), "--prompt is 500 bytes long.* 499"),
        (("--json", "-"), "no option --json"),
    ],
)
def test_wrong_options(refused, tiny_model, flags: tuple[str, ...], words: str) -> None:
    assert re.search(words, refused("chat", "-m", tiny_model.bundle, *flags))


# Commands.


def test_help_names_every_command_and_fits_a_terminal(chat) -> None:
    lines = chat("/help").stderr.splitlines()
    assert {line.partition(" ")[0] for line in lines} >= set(COMMANDS)
    assert max(len(line) for line in lines[: lines.index("")]) <= 79


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/sav x", "no command /sav; did you mean /save"),
        ("/", "no command /; there are /help, /text,"),
        ("/stats now", "no argument, got 'now'"),
        ("/undo", "no turn to take back"),
        ("/save", "/save needs a file's name"),
        ("/save! ", "/save! needs a file's name"),
        ("/text! ", "/text! needs a file's name"),
        ("/text /nowhere/text", "/nowhere does not exist"),
        ("/text /", "/ is a directory"),
        ("/save a", "there is no text yet"),
        ("/save /nowhere/text", "/nowhere does not exist"),
        ("/save /", "/ is a directory"),
        ("/save a\0b", r"a\x00b has a byte"),
        ("/set nonsense=3", "no setting 'nonsense'; there are max_new_bytes,"),
        ("/set temprature=3", "did you mean temperature?"),
        ("/set temperature", "write /set temperature=VALUE"),
        ("/set temperature+=1", "write /set temperature=VALUE"),
        ("/set temperature=hot", "temperature is 'hot'; allowed is"),
        ("/set max_new_bytes=-1", "max_new_bytes is -1; allowed is"),
        ("/set top-k=-1", "top_k is -1; allowed is"),
        ("/set n=1.5", "max_new_bytes is '1.5'; allowed is"),
        ("/set draft=best", "draft is 'best'; allowed are auto, none,"),
        (r"/set stop=\q", r"stop: unknown escape \q"),
    ],
)
def test_wrong_commands_are_one_line_and_change_nothing(chat, line: str, told: str) -> None:
    result = chat("/set", line, "/set")
    assert (result.exit_code, result.stdout) == (1, "")
    before, error, after = re.split(r"^(error: .*\n)", result.stderr, flags=re.MULTILINE)
    assert told in error
    assert before == after


def test_settings_are_shown_set_and_reach_the_model(chat, model: BltModel) -> None:
    given = ["7", "0.5", "40", "0.9", "0.05", "1.1", "3", r"\n\n", "lookup", "4"]
    values = dict(zip(SETTINGS, given, strict=True))
    result = chat(*[f"/set {name}={value}" for name, value in values.items()], "/set")
    assert result.exit_code == 0
    shown = dict(line.split(maxsplit=1) for line in result.stderr.splitlines()[len(values) :])
    assert shown == values
    result = chat("/set stop=END", r"/set stop+=\x00 a", "/set stop=", "/set seed=none", "/set temp = 0.5")
    stops, rest = ["stop=END", r"stop=END \x00 a", "stop=none"], ["seed=none", "temperature=0.5"]
    assert [line.partition(" (")[0] for line in result.stderr.splitlines()] == stops + rest
    result = chat("/set temperature=1", "/set seed=5", "/set n=30", "Once\\", flags=("-q",))
    options = GenerationOptions(max_new_bytes=30, temperature=1, seed=5)
    assert result.stdout == closed(model.generate("Once", options).data)


def test_stats(chat) -> None:
    lines = chat("Once", "", "/stats").stderr.splitlines()[2:]
    told = dict(line.split(maxsplit=1) for line in lines)
    beginnings = {"text": "25 bytes, 2 turns, ", "read": "5 bytes, ", "generated": "20 bytes, "}
    assert all(told[name].startswith(beginning) for name, beginning in beginnings.items())
    assert told["positions"] == "474 of 500 left"
    assert "patcher" in told["time"]
    assert "of state" in told["memory"]
    assert chat("/stats").exit_code == 0


def test_text_shows_everything_on_stdout(chat, model: BltModel) -> None:
    made = model.generate("Once\n", GenerationOptions(max_new_bytes=10))
    whole = made.text if made.text.endswith("\n") else made.text + "\n"
    assert chat("Once", "/text", flags=("-q",)).stdout == closed(made.data) + "Once\n" + whole


def test_text_is_written_whole_and_over_a_file_only_when_told(chat, tmp_path: Path) -> None:
    target = tmp_path / "the text.txt"
    result = chat("Once", f"/text {target}", f"/text {target}", "More", f"/text! {target}")
    assert result.exit_code == 1
    assert f"is there already; /text! {target} writes over it" in result.stderr
    assert result.stderr.count("bytes written to") == 2
    assert re.match(rb"(?s)Once\n.*More\n", target.read_bytes())
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_text_that_cannot_be_written_leaves_what_was_there(chat, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text").write_bytes(b"before")

    def fails(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    result = chat("Once", f"/text! {tmp_path / 'text'}", "/text")
    assert f"error: {tmp_path / 'text'}: No space left on device" in result.stderr
    assert (tmp_path / "text").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_saved_goes_on_in_another_run(chat, tmp_path: Path) -> None:
    whole = chat("Once", "more", "", "/text", flags=("-q",)).stdout
    state, expected = tmp_path / "a.state", whole[whole.index("Once\n") :]
    result = chat("Once", f"/save {state}", "more", f"/save {state}", flags=("-q",))
    assert (result.exit_code, result.stderr) == (0, "")
    result = chat("", "/text", "/stats", flags=("--resume", state))
    assert result.exit_code == 0
    assert result.stdout.endswith(expected)
    assert "\nread       0 bytes\n" in result.stderr
    assert "started over with 31 bytes of text" in chat("x", "/reset", flags=("--resume", state)).stderr
    assert [path.name for path in tmp_path.iterdir()] == [state.name]


def test_save_says_what_it_wrote_and_writes_over_states_only(chat, tmp_path: Path) -> None:
    state, notes = tmp_path / "a.state", tmp_path / "notes"
    notes.write_bytes(b"mine")
    result = chat("Once", f"/save {state}", f"/save {notes}", f"/save! {notes}")
    size = state.stat().st_size
    told = f"15 bytes of text and their state written to {state}, {size / 1000:.1f} KB\n"
    assert told in result.stderr
    assert (
        f"error: {notes} is there already and is no saved state; /save! {notes} writes over it\n"
        in result.stderr
    )
    assert notes.stat().st_size == size
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        result = chat("Once", f"/save! {tmp_path / 'fifo'}")
        assert "fifo is not a regular file; give another name" in result.stderr


def test_a_save_that_fails_leaves_what_was_there(chat, tmp_path: Path, monkeypatch) -> None:
    state = tmp_path / "a.state"
    chat("Once", f"/save {state}")
    before = state.read_bytes()

    def full(*told: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blt_edge.runtime.state_file.write_whole", full)
    result = chat("More", f"/save {state}", "", "/text")
    assert f"error: {state} cannot be written (No space left on device)" in result.stderr
    assert state.read_bytes() == before
    assert "More\n" in result.stdout


def test_resume_has_a_text_already(chat, refused, tiny_model, tmp_path: Path) -> None:
    chat("Once", f"/save {tmp_path / 'a'}")
    flags = ("chat", "-m", tiny_model.bundle, "--resume")
    assert "--resume has a text already" in refused(*flags, tmp_path / "a", "-p", "x")
    assert "stdin is where lines come from" in refused(*flags, "-")
    assert "gone does not exist" in refused(*flags, tmp_path / "gone")


def test_undo_says_what_it_takes_and_what_is_to_be_read(chat, monkeypatch) -> None:
    lines = ("/set n=70", "Once", "more", "/stats", "/undo", "/undo")
    result = chat(*lines)
    assert result.exit_code == 0
    assert "are read" not in result.stderr
    assert re.search(r"^undo +1 earlier state kept, \d", result.stderr, re.MULTILINE)
    monkeypatch.setattr("blt_edge.runtime.backends.base.available_memory", lambda: 0)
    result = chat(*lines)
    assert "; the text has 75 bytes; 75 bytes of the text are read with the next line\n" in result.stderr
    undone = re.findall(r"took back (\d+) typed and (\d+) .* has (\d+) bytes", result.stderr)
    assert undone == [("6", "70", "75"), ("5", "70", "0")]


def test_positions_that_run_out_are_told_of(chat) -> None:
    result = chat("/set n=500", "x" * 400, "more", "", "/undo", "y", "/reset", "z")
    assert result.exit_code == 1
    full = r"^error: all 500 positions .*/undo takes back the last turn, /reset starts over$"
    assert len(re.findall(full, result.stderr, re.MULTILINE)) == 2
    assert "\nno positions are left, all 500 are used; /undo" in result.stderr
    assert "; the positions ran out]" in result.stderr
    assert "\n9 of 500 positions are left; /undo" in chat("x" * 479).stderr


def test_completion(tmp_path: Path, monkeypatch) -> None:
    assert complete("/s", "/s") == ["/set ", "/stats", "/save ", "/save! "]
    assert complete("/set top", "top") == ["top_k=", "top_p="]
    assert complete("", "") == []
    assert complete("some words", "words") == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for command in ("/save", "/save!", "/text", "/text!"):
        assert complete(f"{command} f", "f") == ["file", f"folder{os.sep}"]
    assert paths_that_begin(f"{tmp_path}/fi") == [f"{tmp_path}/file"]
    assert paths_that_begin("nowhere/x") == []


@pytest.mark.parametrize("given", ["", "relative"])
def test_where_the_history_is(tmp_path: Path, monkeypatch, given: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", given)
    assert history_file() == tmp_path / ".local" / "state" / "blt-edge" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert history_file() == tmp_path / "state" / "blt-edge" / "chat_history"
