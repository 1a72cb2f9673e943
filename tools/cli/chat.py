"""`blt-edge chat`: a text continued in turns, by a person and the model, with its state kept between them."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import Session, TextOutput, foreseen_line, interrupt_sets, is_terminal, printable, status
from .chat_session import Answer, ChatError, ChatSession, typed_text
from .documents import read_prompt
from .model_options import EngineOptions, engine_options, load_model, sampling_options
from .options import STDIN, InputFile, model_option, verb

if TYPE_CHECKING:
    from .chat_commands import Chat
    from .line_reader import LineReader

__all__ = ["command"]


@verb("chat")
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="Text to start with, before the first line.")
@click.option(
    "--prompt-file",
    type=InputFile(),
    metavar="FILE",
    help="Start with this file's bytes, exactly as they are (a last newline included).",
)
@sampling_options
@engine_options
def command(
    session: Session,
    model: Path,
    prompt: str | None,
    prompt_file: Path | None,
    engine: EngineOptions,
    **sampling: Any,
) -> None:
    """Continue a text together, turn by turn.

    Each line typed is added to the text, and the model goes on with it; an empty line lets it go on. The
    state stays from turn to turn, so nothing is read twice. Lines that begin with a slash are commands; /help
    lists them. stdout carries the model's text, stderr everything else. Lines may come in a pipe; the exit
    code is then 1 when one of them failed.
    """
    from ...runtime import GenerationOptions
    from .chat_commands import Chat, complete
    from .line_reader import line_reader

    options = GenerationOptions(**sampling)
    if prompt == "-" or prompt_file == STDIN:
        raise click.UsageError("stdin is where lines come from; give a text, or --prompt-file FILE")
    start = read_prompt(prompt, prompt_file, session) or b""
    loaded = load_model(session, model, engine)
    chat = Chat(session, ChatSession(loaded, options, start), TextOutput(shown=True))
    reader = line_reader(complete)
    _begin(chat, reader, model)
    try:
        done = _converse(chat, reader)
    finally:
        reader.close()
    if not done:
        raise click.exceptions.Exit(1)


# 1. Before the first line.


def _begin(chat: Chat, reader: LineReader, model: Path) -> None:
    session, state = chat.session, chat.state
    if len(state.text) >= state.positions:
        raise click.UsageError(
            f"--prompt is {len(state.text)} bytes long; the model has room for {state.positions - 1}"
        )
    if reader.interactive:
        chat.say(f"{printable(str(model))}, {state.positions_left} positions left")
        chat.say("Type a line; the model goes on with the text. /help tells more, Ctrl-D leaves.")
    if not state.text:
        return
    with status(session, f"reading the prompt, {len(state.text)} bytes"):
        state.read()
    if reader.interactive:
        chat.out.write(_tail(state.text.decode("utf-8", "replace")))
        chat.out.close_line()


_SHOWN = 600


def _tail(text: str) -> str:
    """The text, or its last lines."""
    return text if len(text) <= _SHOWN else "... " + text[-_SHOWN:]


# 2. Line after line.


def _converse(chat: Chat, reader: LineReader) -> bool:
    """Take lines until there are no more; whether all of them could be done."""
    done = True
    while True:
        try:
            line = reader.read()
        except KeyboardInterrupt:
            if not reader.interactive:
                raise
            chat.session.note("")
            chat.note("/quit or Ctrl-D leaves")
            continue
        if line is None:
            if reader.interactive:
                chat.session.note("")
            return done
        try:
            if not _take(chat, line, reader.interactive):
                return done
        except BrokenPipeError:  # nobody reads on
            raise
        except KeyboardInterrupt:
            chat.out.close_line()
            if not reader.interactive:
                raise
            chat.note("stopped; the text is read again with the next line")
        except Exception as error:
            told = str(error) if isinstance(error, ChatError) else foreseen_line(error)
            if told is None:
                raise
            chat.out.close_line()
            chat.note(f"error: {printable(told)}")
            done = done and reader.interactive


def _take(chat: Chat, line: bytes, interactive: bool) -> bool:
    """Do what one line asks; False when it is to be the last."""
    from .chat_commands import run_command

    if line.startswith(b"/") and not line.startswith(b"//"):
        return run_command(chat, line.decode("utf-8", "surrogateescape"))
    answer = _answer(chat, typed_text(line[1:] if line.startswith(b"//") else line, chat.state.text))
    chat.say(f"[{_figures(answer)}]")
    _tell_of_room(chat, answer)
    if answer.reason == "cancelled" and not interactive:
        raise KeyboardInterrupt
    return True


def _answer(chat: Chat, typed: bytes) -> Answer:
    state, cancel = chat.state, threading.Event()
    reading = len(state.unread) + len(typed)
    with ExitStack() as progress, interrupt_sets(cancel):

        def write(text: str) -> None:
            progress.close()
            chat.out.write(text)

        if reading > 200 and is_terminal(sys.stderr):
            progress.enter_context(status(chat.session, f"reading {reading} bytes"))
        answer = state.turn(typed, write, cancel)
    chat.out.close_line()
    return answer


def _tell_of_room(chat: Chat, answer: Answer) -> None:
    left, advice = chat.state.positions_left, "/undo takes back the last turn, /reset starts over"
    if left == 0:
        chat.note(f"no positions are left, all {chat.state.positions} are used; {advice}")
    elif left < min(chat.state.options.max_new_bytes, chat.state.positions // 8):
        chat.say(f"{left} of {chat.state.positions} positions are left; {advice}")


_ENDINGS = {
    "length": "",
    "eos": "; the model ended the text",
    "stop": "; a stop string came",
    "context": "; the positions ran out",
    "cancelled": "; stopped",
}


def _figures(answer: Answer) -> str:
    stats = answer.stats
    told = [f"{stats.new_bytes} new byte{'' if stats.new_bytes == 1 else 's'}"]
    if stats.new_bytes > 1:
        told.append(f"{stats.bytes_per_second:.0f} bytes/s")
    if answer.patches:
        told.append(f"{(stats.prompt_bytes + stats.new_bytes) / answer.patches:.1f} bytes a patch")
    if stats.new_bytes:
        first = 1000 * stats.first_byte_seconds
        told.append(f"first in {first:.{int(first < 10)}f} ms")
    if stats.drafted:
        told.append(f"guesses {stats.accepted / stats.drafted:.0%}")
    cut = "; the last character is not complete" if answer.cut else ""
    return ", ".join(told) + _ENDINGS.get(answer.reason, "") + cut
