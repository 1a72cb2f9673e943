"""`blt-edge chat` in a pipe: answers, figures, commands."""

from __future__ import annotations

import os
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
    result = chat("Once", "", flags=("--threads", 1))
    first = model.generate("Once\n", GenerationOptions(max_new_bytes=10))
    second = model.generate(b"Once\n" + first.data, GenerationOptions(max_new_bytes=10))
    assert result.exit_code == 0
    both = visible(first.data + second.data).removeprefix(visible(first.data))
    assert result.stdout == closed(first.data) + both + "\n" * (not both.endswith("\n"))
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("[10 new bytes, ")
        for figure in ("bytes/s", "bytes a patch", "first in"):
            assert figure in line
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
    assert chat(line, f"/save {tmp_path / 'text'}").exit_code == 0
    assert (tmp_path / "text").read_bytes().startswith(line + b"\n")


def test_a_slash_of_the_text(chat, tmp_path: Path) -> None:
    assert chat("//etc//x", "///", f"/save {tmp_path / 'text'}").exit_code == 0
    text = (tmp_path / "text").read_bytes()
    assert text.startswith(b"/etc//x\n")
    assert b"\n//\n" in text


def test_it_starts_with_a_prompt(chat, model: BltModel, tmp_path: Path) -> None:
    (tmp_path / "start").write_bytes(b"Once\xff")
    made = model.generate(b"Once\xff", GenerationOptions(max_new_bytes=10)).data
    result = chat("", "/reset", "/text", flags=("--prompt-file", tmp_path / "start"))
    assert result.stdout == closed(made) + "Once\ufffd\n"
    assert "started over with 5 bytes of text" in result.stderr
    assert chat("", flags=("-p", "Once")).exit_code == 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("-p", "x", "--prompt-file", __file__), "--prompt and --prompt-file are both given"),
        (("-p", "-"), "stdin is where lines come from"),
        (("--prompt-file", "-"), "stdin is where lines come from"),
        (("-p", "x" * 500), "--prompt is 500 bytes long; the model has room for 499"),
        (("--json", "-"), "there is no option --json"),
    ],
)
def test_wrong_options(refused, tiny_model, flags: tuple[str, ...], line: str) -> None:
    assert refused("chat", "-m", tiny_model.bundle, *flags).startswith(line)


# Commands.


def test_help_names_every_command_and_fits_a_terminal(chat) -> None:
    lines = chat("/help").stderr.splitlines()
    for name in COMMANDS:
        assert any(line.startswith(f"{name} ") for line in lines)
    assert max(len(line) for line in lines[: lines.index("")]) <= 79


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/sav x", "there is no command /sav; did you mean /save or"),
        ("/", "there is no command /; there are /help, /text,"),
        ("/stats now", "/stats takes no argument, got 'now'"),
        ("/undo", "there is no turn to take back"),
        ("/save", "/save needs a file's name"),
        ("/save! ", "/save! needs a file's name"),
        ("/save /nowhere/text", "the directory /nowhere does not exist"),
        ("/save /", "/ is a directory; give a file"),
        ("/save a\0b", r"a\x00b has a byte that no file's name can have"),
        ("/set nonsense=3", "there is no setting 'nonsense'; there are max_new_bytes,"),
        ("/set temprature=3", "there is no setting 'temprature'; did you mean temperature?"),
        ("/set temperature", "got 'temperature'; write /set temperature=VALUE"),
        ("/set temperature+=1", "got 'temperature+=1'; write /set temperature=VALUE"),
        ("/set temperature=hot", "temperature is 'hot'; allowed is a finite number >= 0"),
        ("/set max_new_bytes=-1", "max_new_bytes is -1; allowed is a whole number >= 0"),
        ("/set top-k=-1", "top_k is -1; allowed is"),
        ("/set n=1.5", "max_new_bytes is '1.5'; allowed is a whole number >= 0"),
        ("/set draft=best", "draft is 'best'; allowed are auto, none,"),
        (r"/set stop=\q", r"stop: unknown escape \q"),
    ],
)
def test_wrong_commands_are_one_line_and_change_nothing(chat, line: str, told: str) -> None:
    result = chat("/set", line, "/set")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    lines = result.stderr.splitlines()
    place = next(index for index, one in enumerate(lines) if one.startswith(f"error: {told}"))
    assert lines[:place] == lines[place + 1 :]


def test_every_setting_is_shown_and_set(chat) -> None:
    given = ["7", "0.5", "40", "0.9", "0.05", "1.1", "3", r"\n\n", "lookup", "4"]
    values = dict(zip(SETTINGS, given, strict=True))
    result = chat(*[f"/set {name}={value}" for name, value in values.items()], "/set")
    assert result.exit_code == 0
    shown = dict(line.split(maxsplit=1) for line in result.stderr.splitlines()[len(values) :])
    assert shown == values


def test_stop_strings_are_added_and_removed(chat) -> None:
    result = chat("/set stop=END", r"/set stop+=\x00 a", "/set stop=", "/set seed=none", "/set temp = 0.5")
    assert result.stderr.splitlines() == [
        "stop=END",
        r"stop=END \x00 a",
        "stop=none",
        "seed=none (another one each turn)",
        "temperature=0.5",
    ]


def test_settings_reach_the_model(chat, model: BltModel) -> None:
    result = chat("/set temperature=1", "/set seed=5", "/set n=30", "Once\\", flags=("-q",))
    options = GenerationOptions(max_new_bytes=30, temperature=1, seed=5)
    assert result.stdout == closed(model.generate("Once", options).data)


def test_stats(chat) -> None:
    lines = chat("Once", "", "/stats").stderr.splitlines()[2:]
    told = dict(line.split(maxsplit=1) for line in lines)
    assert told["text"].startswith("25 bytes, 2 turns, ")
    assert told["positions"] == "474 of 500 left"
    assert told["read"].startswith("5 bytes, ")
    assert told["generated"].startswith("20 bytes, ")
    assert "patcher" in told["time"]
    assert "of state" in told["memory"]
    assert chat("/stats").exit_code == 0


def test_text_shows_everything_on_stdout(chat, model: BltModel) -> None:
    result = chat("Once", "/text", flags=("-q",))
    made = model.generate("Once\n", GenerationOptions(max_new_bytes=10))
    whole = made.text if made.text.endswith("\n") else made.text + "\n"
    assert result.stdout == closed(made.data) + "Once\n" + whole


def test_save_is_whole_and_overwrites_only_when_told(chat, tmp_path: Path) -> None:
    target = tmp_path / "the text.txt"
    result = chat("Once", f"/save {target}", f"/save {target}", "More", f"/save! {target}")
    assert result.exit_code == 1
    assert f"error: {target} is there already; /save! {target} writes over it" in result.stderr
    assert result.stderr.count("bytes written to") == 2
    data = target.read_bytes()
    assert data.startswith(b"Once\n")
    assert b"More\n" in data
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_save_that_fails_leaves_what_was_there(chat, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text").write_bytes(b"before")

    def fails(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    result = chat("Once", f"/save! {tmp_path / 'text'}", "/text")
    assert f"error: {tmp_path / 'text'}: No space left on device" in result.stderr
    assert (tmp_path / "text").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_undo_says_what_it_takes_and_reads(chat) -> None:
    result = chat("/set n=70", "Once", "more", "/undo", "/undo")
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert "reading the first 75 bytes again" in lines
    assert any(line.startswith("took back 6 typed and 70 generated bytes; the text has 75") for line in lines)
    assert lines[-1] == "took back 5 typed and 70 generated bytes; the text has 0 bytes"


def test_full_of_text(chat) -> None:
    result = chat("/set n=500", "x" * 400, "more", "", "/undo", "y", "/reset", "z")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    full = "all 500 positions of the model are used; /undo takes back the last turn, /reset starts over"
    assert lines.count(f"error: {full}") == 2
    assert any(line.startswith("no positions are left, all 500 are used; /undo") for line in lines)
    assert any("; the positions ran out]" in line for line in lines)


def test_few_positions_are_told_of(chat) -> None:
    lines = chat("x" * 479).stderr.splitlines()
    assert lines[-1].startswith("9 of 500 positions are left; /undo takes back")


def test_completion(tmp_path: Path, monkeypatch) -> None:
    assert complete("/s", "/s") == ["/set ", "/stats", "/save ", "/save! "]
    assert complete("/set top", "top") == ["top_k=", "top_p="]
    assert complete("", "") == []
    assert complete("some words", "words") == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert complete("/save f", "f") == ["file", f"folder{os.sep}"]
    assert paths_that_begin(f"{tmp_path}/fi") == [f"{tmp_path}/file"]
    assert paths_that_begin("nowhere/x") == []


@pytest.mark.parametrize("given", ["", "relative"])
def test_where_the_history_is(tmp_path: Path, monkeypatch, given: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", given)
    assert history_file() == tmp_path / ".local" / "state" / "blt-edge" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert history_file() == tmp_path / "state" / "blt-edge" / "chat_history"
