"""`blt-edge chat` as a process: Ctrl-C, and what a person sees on a terminal."""

from __future__ import annotations

import signal
import stat
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.runtime.vocabulary import encode
from support.chat import MAIN, SLOW, posix, start, visible

pytestmark = posix


def test_ctrl_c_in_a_pipe_ends_the_program(tiny_model) -> None:
    process = start("chat", "-m", tiny_model.bundle, "-n", 400, code=SLOW, stdin=PIPE)
    process.stdin.write(b"Once\nmore\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    figures, *rest = process.communicate(timeout=60)[1].decode().splitlines()
    assert process.returncode == 1
    assert figures.endswith("; stopped]")
    assert rest == ["blt-edge: interrupted"]


@pytest.fixture
def terminal(tiny_model, tmp_path: Path) -> Any:
    """`terminal(code)`: the program on a terminal, at its first prompt, its history in tmp_path/state."""
    from support.terminal import Terminal  # POSIX only

    def start(code: str = MAIN, *flags: object, state: Path = tmp_path / "state") -> Terminal:
        env = {"TERM": "xterm", "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(state), "LC_ALL": "C.UTF-8"}
        base = ("chat", "-m", tiny_model.bundle, "--draft", "none", "--threads", 1)
        shell = Terminal(code, [*base, *flags], env)
        shell.wait_for("> ")
        return shell

    return start


def leave(shell: Any, keys: str = "\x04") -> None:
    shell.type(keys)
    assert shell.end() == 0
    assert "Traceback" not in shell.shown


def test_on_a_terminal(terminal, tmp_path: Path) -> None:
    shell = terminal(MAIN, "-n", 10)
    assert "/help tells more, Ctrl-D leaves." in shell.shown
    assert "first in" in shell.ask("Once\n", "]\n> ")
    shell.ask("some words", "some words")
    shell.type_until("\x03", "/quit or Ctrl-D leaves\n> ")
    assert "\nOnce\n" in shell.ask("/text\n", "\n> ")
    assert "/stats\ntext " in shell.ask("/stat\t\n", "\n> ")  # completed
    leave(shell)
    assert shell.shown.endswith("\n")
    kept = tmp_path / "state" / "blt-edge" / "chat_history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert kept.read_text().splitlines() == ["Once", "/text", "/stats"]


def test_a_resumed_text_is_shown(terminal, model: BltModel, tmp_path: Path) -> None:
    sequence = model.sequence()
    sequence.append(encode(b"Once upon\xff"))
    sequence.save(tmp_path / "a.state")
    shell = terminal(MAIN, "-n", 3, "--resume", tmp_path / "a.state")
    assert "489 positions left\n" in shell.shown
    assert shell.shown.endswith("\nOnce upon\ufffd\n> ")
    assert "reading" not in shell.shown
    shell.ask("more\\\n", "]\n> ")
    assert "read       5 bytes" in shell.ask("/stats\n", "\n> ")  # and the newline before them
    leave(shell)


def test_typed_lines_come_back_in_the_next_run(terminal, tmp_path: Path) -> None:
    kept = tmp_path / "state" / "blt-edge" / "chat_history"
    kept.parent.mkdir(parents=True)
    kept.write_text("Once upon\n")
    kept.chmod(0o644)
    shell = terminal(MAIN, "-n", 3)
    assert "Once upon\n" in shell.ask("\x1b[A\n", "]\n> ")  # the arrow that goes up
    leave(shell, "/quit\n")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize("before", ["", "import sys; sys.modules['readline'] = None\n"])
def test_without_history_or_readline_lines_can_be_typed(terminal, tmp_path: Path, before: str) -> None:
    (tmp_path / "blocked").write_text("no folder")
    shell = terminal(before + MAIN, "-n", 3, state=tmp_path / "blocked")
    shell.ask("Once\n", "]\n> ")
    leave(shell)
    assert "rror" not in shell.shown


def test_ctrl_c_stops_the_answer_and_stays_in_the_program(terminal, model: BltModel) -> None:
    first = visible(model.generate(b"Once\n", GenerationOptions(max_new_bytes=9)).data)[0]
    shell = terminal(SLOW, "-n", 400)
    shell.ask("Once\n", f"Once\n{first}")
    shell.ask("\x03", "; stopped]\n> ")
    told = shell.ask("/stats\n", "\n> ")
    assert "1 turn" in told
    assert int(told.split("generated ")[1].split()[0]) < 400
    leave(shell)


def test_ctrl_c_twice_stops_at_once_and_stays_too(terminal) -> None:
    stuck = "import os\n" + SLOW.replace(
        "0.02", "20 if a[0]._new_bytes == 4 and os.write(2, b'stuck') else 0"
    )
    shell = terminal(stuck, "-n", 30)
    shell.ask("Once\n", "stuck")
    shell.type("\x03")
    time.sleep(0.5)
    shell.ask("\x03", "stopped; 9 bytes of the text are read with the next line\n", seconds=15)
    shell.ask("/text\n", "\nOnce\n")
    shell.wait_for("\n> ")
    leave(shell, "/quit\n")


def test_several_pasted_lines_are_one_turn(terminal) -> None:
    shell = terminal(MAIN, "-n", 3)
    shell.ask("\x1b[200~one\ntwo é\x1b[201~\n", "]\n> ")
    assert "14 bytes, 1 turn" in shell.ask("/stats\n", "\n> ")
    leave(shell)
