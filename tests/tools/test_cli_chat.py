"""`blt-edge chat`: turns, commands, and what a person sees of them in a pipe and on a terminal."""

from __future__ import annotations

import codecs
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions, OptionError
from blt_edge.runtime.vocabulary import decode
from blt_edge.tools.cli.chat_commands import COMMANDS, SETTINGS, complete
from blt_edge.tools.cli.chat_session import ChatError, ChatSession, typed_text
from blt_edge.tools.cli.line_reader import history_file, paths_that_begin
from hypothesis import given
from hypothesis import strategies as st

MAIN = "from blt_edge.tools.cli import main; main()"
# The tiny model is fast: slowed down, it can be interrupted in the middle.
SLOW = (
    "import blt_edge.runtime.generation as g, time; before = g._reason_to_end\n"
    "g._reason_to_end = lambda *a: (time.sleep(0.02), before(*a))[1]\n" + MAIN
)
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and terminals")


@pytest.fixture(scope="module")
def model(tiny_model) -> BltModel:
    return BltModel.load(tiny_model.bundle, threads=1)


def state(model: BltModel, start: bytes = b"", **fields: Any) -> ChatSession:
    return ChatSession(model, GenerationOptions(**{"max_new_bytes": 20, "draft": "none", **fields}), start)


def go_on(chat: ChatSession, typed: bytes = b"") -> str:
    written: list[str] = []
    chat.turn(typed, written.append, threading.Event())
    return "".join(written)


def visible(data: bytes) -> str:
    """What is shown of an answer: a last character that is not complete waits for the next turn."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def closed(data: bytes) -> str:
    """An answer on stdout, where what follows begins on a line of its own."""
    shown = visible(data)
    return shown if shown.endswith("\n") or not shown else shown + "\n"


def assert_sound(chat: ChatSession) -> None:
    """The state is that of a beginning of the text."""
    read = chat.text[: max(0, chat.sequence.length - 1)]
    assert decode(chat.sequence.ids) == read
    assert read + chat.unread == chat.text
    if chat.sequence.length:
        expected = chat.model.logits(read)[-1]
        np.testing.assert_allclose(chat.sequence.logits, expected, rtol=0, atol=2e-5)


# 1. Lines.


@pytest.mark.parametrize(
    ("line", "text", "added"),
    [
        (b"", b"", b""),
        (b"", b"x", b""),
        (b"a b", b"", b"a b\n"),
        (b"a", b"x", b"\na\n"),
        (b"a", b"x\n", b"a\n"),
        (b"a\\", b"x\n", b"a"),
        (b"a\\", b"x", b"\na"),
        (b"\\a", b"x", b"a\n"),
        (b"\\ a\\", b"x", b" a"),
        (b"\\", b"x", b"\n"),
        (b"\\", b"x\n", b"\n"),
        (b"\\\\", b"x\n", b"\\\n"),
        (b"\\\\a\\\\", b"x\n", b"\\a\\\n"),
        (b"\\\\\\", b"x\n", b"\\"),
        (b"a\\b", b"", b"a\\b\n"),
        (b"a\nb", b"x", b"\na\nb\n"),
        (b"\xff\x00", b"", b"\xff\x00\n"),
        (b" ", b"x\n", b" \n"),
    ],
)
def test_what_a_line_adds(line: bytes, text: bytes, added: bytes) -> None:
    assert typed_text(line, text) == added


@given(line=st.binary(max_size=6), text=st.binary(max_size=3))
def test_a_line_adds_itself_and_newlines(line: bytes, text: bytes) -> None:
    added = typed_text(line, text)
    assert added.strip(b"\n\\") == line.strip(b"\n\\")
    assert len(added) <= len(line) + 2
    if line and not line.startswith(b"\\") and text:
        assert (text + added)[len(text) - text.endswith(b"\n") :].startswith(b"\n")


# 2. Turns.


def test_turns_are_one_text_and_nothing_is_read_twice(model: BltModel) -> None:
    counted: list[int] = []
    model.observer = lambda stage, began, seconds, count: stage == "encoder" and counted.append(count)
    try:
        chat = state(model, b"Once upon a time")
    finally:
        model.observer = None
    expected, since = b"Once upon a time", b""
    for typed in (b"", b" there was", b"\xff\n", b"", b"x" * 40):
        shown = go_on(chat, typed)
        made = model.generate(expected + typed, chat.options)
        since = made.data if typed else since + made.data
        assert visible(since).endswith(shown)
        assert len(visible(since)) == len(shown) + (0 if typed else len(visible(since[: -len(made.data)])))
        expected += typed + made.data
        assert chat.text == expected
        assert_sound(chat)
    assert sum(counted) == 1 + len(expected)
    chat.undo()
    go_on(chat, b"y")
    assert sum(counted) == 1 + len(expected) + 21  # nothing but the new turn
    assert chat.totals.new == 6 * 20


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stopped_answer_stays(model: BltModel, after: int) -> None:
    chat, cancel, written = state(model, max_new_bytes=60), threading.Event(), []

    def write(text: str) -> None:
        written.append(text)
        if len(written) > after:
            cancel.set()

    answer = chat.turn(b"Once", write, cancel)
    assert answer.reason == "cancelled"
    free = model.generate(b"Once", chat.options).data
    made = chat.text[4:]
    assert free.startswith(made)
    assert len(made) < 60
    assert_sound(chat)
    go_on(chat)
    assert chat.text[4:] == model.generate(b"Once", replace(chat.options, max_new_bytes=len(made) + 60)).data


def test_stopped_inside_a_prompt_it_is_read_on_with_the_next_turn(model: BltModel) -> None:
    chat, cancel = state(model), threading.Event()
    cancel.set()
    answer = chat.turn(b"x" * 400, lambda text: None, cancel)
    assert (answer.reason, answer.stats.new_bytes, chat.text) == ("cancelled", 0, b"x" * 400)
    assert 0 < len(chat.unread) < 400
    go_on(chat)
    assert chat.text == b"x" * 400 + model.generate(b"x" * 400, chat.options).data
    assert_sound(chat)


def test_a_broken_turn_keeps_the_text_and_drops_the_state(model: BltModel) -> None:
    chat = state(model)
    go_on(chat, b"Once")
    before = chat.text

    def interrupted(text: str) -> None:
        if len(chat.text) > len(before) + 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.turn(b" and", interrupted, threading.Event())
    assert chat.sequence.length == 0
    assert chat.text.startswith(before + b" and")
    kept = chat.text
    go_on(chat)
    assert chat.text == kept + model.generate(kept, chat.options).data
    assert_sound(chat)


def test_a_character_cut_at_the_end_is_completed_by_the_next_turn(model: BltModel) -> None:
    found = 0
    for seed in range(40):
        options = {"temperature": 1.5, "seed": seed, "max_new_bytes": 1}
        chat = state(model, **options)
        cut = chat.turn(b"a", lambda text: None, threading.Event()).cut
        if not cut:
            continue
        found += 1
        assert chat.text[1:] >= b"\xc2"
        with pytest.raises(UnicodeDecodeError):
            chat.text.decode()
        lead = chat.text[1:]
        shown = go_on(chat)
        assert shown == (lead + chat.text[2:]).decode("utf-8", "replace") or chat._utf8.pending
        go_on(chat, b"b")  # what is typed begins anew
        assert_sound(chat)
    assert found


def test_undo_takes_back_question_and_answer(model: BltModel) -> None:
    chat = state(model, b"It was")
    texts = []
    for typed in (b" a dark", b"", b" night"):
        texts.append(chat.text)
        go_on(chat, typed)
    assert chat.undo() == (6, 20)
    assert chat.text == texts[2]
    assert_sound(chat)
    assert chat.undo() == (0, 20)
    assert chat.undo() == (7, 20)
    assert chat.text == b"It was"
    assert_sound(chat)
    with pytest.raises(ChatError, match="no turn"):
        chat.undo()
    go_on(chat, b" x")
    assert chat.text == b"It was x" + model.generate(b"It was x", chat.options).data


def test_undo_beyond_the_roll_back_limit_tells_what_is_read_again(model: BltModel) -> None:
    chat = state(model, max_new_bytes=70)
    go_on(chat, b"Once upon")
    assert chat.undo_reads() == 0  # all of it goes
    before = chat.text
    go_on(chat, b"more")
    assert chat.undo_reads() == len(before) > 64
    chat.undo()
    assert chat.text == before
    assert_sound(chat)


def test_reset_goes_back_to_the_start(model: BltModel) -> None:
    chat = state(model, b"It was")
    chat.read()
    first = go_on(chat)
    chat.reset()
    assert (chat.text, chat.turns) == (b"It was", [])
    assert go_on(chat) == first


def test_positions_run_out(model: BltModel) -> None:
    chat = state(model, b"abc " * 120)
    go_on(chat)
    assert chat.positions_left == 0
    for typed in (b"", b"x"):
        with pytest.raises(ChatError, match=r"all 500 positions.*/undo takes back the last turn"):
            go_on(chat, typed)
    chat.undo()
    assert chat.positions_left == 19
    with pytest.raises(ChatError, match="this needs 20 positions, 19 of 500 are left; add less"):
        go_on(chat, b"y" * 20)
    before = chat.text
    assert before == b"abc " * 120
    go_on(chat, b"y" * 19)
    assert chat.text.startswith(before + b"y" * 19)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.binary(max_size=12), st.integers(1, 40)),
        st.tuples(st.just("stop"), st.binary(max_size=12), st.integers(1, 30)),
        st.tuples(st.sampled_from(["undo", "undo", "reset", "drop"]), st.just(b""), st.just(0)),
        st.tuples(st.just("draft"), st.just(b""), st.integers(0, 4)),
    ),
    max_size=8,
)


@given(steps=steps)
def test_any_walk_holds_its_text(model: BltModel, steps: list[tuple[str, bytes, int]]) -> None:
    chat, past = state(model, b"so"), []
    for kind, typed, number in steps:
        if kind == "turn":
            past.append(chat.text)
            go_on(chat, typed)
            assert chat.text.startswith(past[-1] + typed)
        elif kind == "stop":
            past.append(chat.text)
            cancel = threading.Event()
            chat.turn(typed, lambda text: len(chat.text) > number + len(past[-1]) and cancel.set(), cancel)  # noqa: B023
        elif kind == "undo" and past:
            chat.undo()
            assert chat.text == past.pop()
        elif kind == "reset":
            chat.reset()
            past = []
        elif kind == "drop":
            chat.drop_state()
        elif kind == "draft":
            chat.change(draft=("none", "auto", "decoder", "patcher", "lookup")[number], max_new_bytes=15)
        assert_sound(chat)


def test_what_the_model_cannot_do_is_refused_before_a_turn(model: BltModel) -> None:
    rule = replace(model.manifest.patching, mode="space")
    other = BltModel(
        replace(model.manifest, patching=rule), model._backends, model._table, model.limits, model.path
    )
    chat = state(other)
    with pytest.raises(OptionError, match="patcher"):
        chat.change(draft="patcher")
    assert chat.options.draft == "none"
    with pytest.raises(OptionError):
        state(other, draft="patcher")


# 3. In a pipe.


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
    result = chat("Once", "/set top_k=3", "/undo", "/reset", flags=("-q",))
    assert (result.exit_code, result.stderr) == (0, "")
    assert chat("/nonsense", flags=("-q",)).stderr.startswith("error: there is no command /nonsense")


def test_drafts_are_told_of(cli, tiny_model) -> None:
    flags = ("-m", tiny_model.bundle, "-n", 60, "--draft", "decoder", "--draft-length", 4)
    assert ", guesses " in cli("chat", *flags, stdin=b"Once\n").stderr


def test_no_lines_at_all(chat) -> None:
    result = chat()
    assert (result.exit_code, result.output) == (0, "")


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
        (("--temp", "-1"), "--temperature is -1.0; allowed is"),
        (("--json", "-"), "there is no option --json"),
        (("--context", "9"), "there is no option --context"),
    ],
)
def test_wrong_options(chat, flags: tuple[str, ...], line: str) -> None:
    result = chat("Once", flags=flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"blt-edge: error: {line}" in result.stderr


# 4. Commands.


def test_help_names_every_command_and_fits_a_terminal(chat) -> None:
    lines = chat("/help").stderr.splitlines()
    for name in COMMANDS:
        assert any(line.startswith(f"{name} ") for line in lines)
    assert max(len(line) for line in lines[: lines.index("")]) <= 79


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/sav x", "there is no command /sav; did you mean /save or"),
        ("/UNDO", "there is no command /UNDO; there are /help, /text,"),
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
        ("/set temperature=", "temperature is ''; allowed is a finite number >= 0"),
        ("/set temperature=nan", "temperature is nan; allowed is"),
        ("/set max_new_bytes=0", "max_new_bytes is 0; allowed is a whole number >= 1"),
        ("/set n=1.5", "max_new_bytes is '1.5'; allowed is a whole number >= 1"),
        ("/set top-k=-1", "top_k is -1; allowed is"),
        ("/set top_p=0", "top_p is 0.0; allowed is"),
        ("/set min_p=2", "min_p is 2.0; allowed is"),
        ("/set repetition_penalty=0", "repetition_penalty is 0.0; allowed is"),
        ("/set seed=-1", "seed is -1; allowed is"),
        ("/set draft=best", "draft is 'best'; allowed are auto, none,"),
        ("/set draft_length=33", "draft_length is 33; allowed is"),
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
    values = {
        "max_new_bytes": "7",
        "temperature": "0.5",
        "top_k": "40",
        "top_p": "0.9",
        "min_p": "0.05",
        "repetition_penalty": "1.1",
        "seed": "3",
        "stop": r"\n\n",
        "draft": "lookup",
        "draft_length": "4",
    }
    assert set(values) == set(SETTINGS)
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


# 5. Processes and terminals.


@posix
def test_ctrl_c_in_a_pipe_ends_the_program(tiny_model) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "chat", "-m", str(tiny_model.bundle), "-n", "400"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Once\nmore\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = err.decode().splitlines()
    assert lines[0].endswith("; stopped]")
    assert lines[1:] == ["blt-edge: interrupted"]


@pytest.fixture
def terminal(tiny_model, tmp_path: Path) -> Any:
    """`terminal(code)`: the program on a terminal, its history in tmp_path/state."""
    from support.terminal import Terminal

    def start(code: str = MAIN, *flags: object, state: Path = tmp_path / "state") -> Terminal:
        env = {"TERM": "xterm", "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(state), "LC_ALL": "C.UTF-8"}
        base = ("chat", "-m", tiny_model.bundle, "--draft", "none", "--threads", 1)
        return Terminal(code, [*base, *flags], env)

    return start


@posix
def test_on_a_terminal(terminal, tmp_path: Path) -> None:
    shell = terminal(MAIN, "-n", 10)
    shell.wait_for("> ")
    assert "/help tells more, Ctrl-D leaves." in shell.shown
    shell.type("Once\n")
    shell.wait_for("first in")
    shell.wait_for("]\n> ")
    shell.type("some words")
    shell.wait_for("some words")
    shell.type_until("\x03", "/quit or Ctrl-D leaves\n> ")
    shell.type("/tex\t\n")  # completed
    assert "/text\nOnce\n" in shell.wait_for("\n> ")
    shell.type("\x04")
    assert shell.end() == 0
    assert shell.shown.endswith("\n")
    kept = tmp_path / "state" / "blt-edge" / "chat_history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert kept.read_text().splitlines() == ["Once", "/text"]


@posix
def test_typed_lines_come_back_in_the_next_run(terminal, tmp_path: Path) -> None:
    folder = tmp_path / "state" / "blt-edge"
    folder.mkdir(parents=True)
    (folder / "chat_history").write_text("Once upon\n")
    (folder / "chat_history").chmod(0o644)
    shell = terminal(MAIN, "-n", 3)
    shell.wait_for("> ")
    shell.type("\x1b[A\n")  # the arrow that goes up
    assert "Once upon\n" in shell.wait_for("]\n> ")
    shell.type("/quit\n")
    assert shell.end() == 0
    assert stat.S_IMODE((folder / "chat_history").stat().st_mode) == 0o600


@posix
def test_a_history_that_cannot_be_kept_is_no_error(terminal, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("no folder")
    shell = terminal(MAIN, "-n", 3, state=tmp_path / "blocked")
    shell.wait_for("> ")
    shell.type("Once\n")
    shell.wait_for("]\n> ")
    shell.type("\x04")
    assert shell.end() == 0
    assert "rror" not in shell.shown


@posix
def test_ctrl_c_stops_the_answer_and_stays_in_the_program(terminal, model: BltModel) -> None:
    first = visible(model.generate(b"Once\n", GenerationOptions(max_new_bytes=9)).data)[0]
    shell = terminal(SLOW, "-n", 400)
    shell.wait_for("> ")
    shell.type("Once\n")
    shell.wait_for(f"Once\n{first}")
    shell.type("\x03")
    shell.wait_for("; stopped]\n> ")
    shell.type("/stats\n")
    told = shell.wait_for("\n> ")
    assert "1 turn" in told
    assert int(told.split("generated ")[1].split()[0]) < 400
    shell.type("\x04")
    assert shell.end() == 0
    assert "Traceback" not in shell.shown


@posix
def test_ctrl_c_twice_stops_at_once_and_stays_too(terminal) -> None:
    stuck = "import os\n" + SLOW.replace("0.02", "20 if a[2] == 4 and os.write(2, b'stuck') else 0")
    shell = terminal(stuck, "-n", 30)
    shell.wait_for("> ")
    shell.type("Once\n")
    shell.wait_for("stuck")
    shell.type("\x03")
    time.sleep(0.5)
    shell.type("\x03")
    shell.wait_for("stopped; the text is read again with the next line\n", seconds=15)
    shell.type("/text\n")
    shell.wait_for("\nOnce\n")
    shell.wait_for("\n> ")
    shell.type("/quit\n")
    assert shell.end() == 0


@posix
def test_several_pasted_lines_are_one_turn(terminal) -> None:
    shell = terminal(MAIN, "-n", 3)
    shell.wait_for("> ")
    shell.type("\x1b[200~one\ntwo é\x1b[201~\n")
    shell.wait_for("]\n> ")
    shell.type("/stats\n")
    assert "14 bytes, 1 turn" in shell.wait_for("\n> ")
    shell.type("\x04")
    assert shell.end() == 0


@posix
def test_without_readline_lines_can_be_typed(terminal) -> None:
    shell = terminal(f"import sys; sys.modules['readline'] = None\n{MAIN}", "-n", 3)
    shell.wait_for("> ")
    shell.type("Once\n")
    shell.wait_for("]\n> ")
    shell.type("\x04")
    assert shell.end() == 0
