"""`blt-edge chat`: a text continued in turns, by a person and the model, with its state kept between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import Messages, TextOutput, foreseen_line, printable, status
from .documents import read_prompt
from .model_options import EngineOptions, asked_options, engine_options, load_model, sampling_options
from .options import STDIN, InputFile, model_option, option, verb

if TYPE_CHECKING:
    from .chat_lines import Chat
    from .line_reader import LineReader

_SHOWN = 600
"""Characters of the text that a person is shown at the start."""


@verb(
    "chat",
    "-m demo-bundle --temperature 0.7",
    '-m demo-bundle -p "Once upon a time" -n 80 --temperature 0.7 --seed 7',
)
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="Text to start with, before the first line.")
@click.option(
    "--prompt-file",
    type=InputFile(),
    metavar="FILE",
    help="Start with this file's bytes, exactly as they are (a last newline included).",
)
@option(
    "--resume",
    type=InputFile(),
    metavar="FILE",
    shown="none",
    help="Go on from the text that /save FILE, or generate --prompt-cache FILE, has kept; nothing of it is "
    "read again.",
)
@sampling_options
@engine_options
def command(
    messages: Messages,
    model: Path,
    prompt: str | None,
    prompt_file: Path | None,
    resume: Path | None,
    engine: EngineOptions,
    **sampling: Any,
) -> None:
    """Continue a text together, turn by turn.

    Each line typed is added to the text, and the model goes on with it; an empty line lets it go on. The
    state stays from turn to turn, so nothing is read twice; /save and --resume keep it between runs. Lines
    that begin with a slash are commands; /help lists them. A bundle's chat template is not used here (`serve`
    uses it): what is typed is the text itself. stdout carries the model's text, stderr everything
    else. Lines may come in a pipe; the exit code is then 1 when one of them failed.
    """
    # Not at the top: they import numpy.
    from .chat_lines import Chat, complete
    from .chat_session import ChatSession
    from .line_reader import line_reader
    from .prompt_cache import check_fits

    options = asked_options(model, sampling)
    if prompt == "-" or STDIN in (prompt_file, resume):
        raise click.UsageError("stdin is where lines come from; give a text, or --prompt-file FILE")
    if resume is not None:
        if prompt is not None or prompt_file is not None:
            raise click.UsageError("--resume has a text already; give it, --prompt or --prompt-file")
        check_fits(resume, model)
    start = read_prompt(prompt, prompt_file, model, messages) or b""
    loaded = load_model(messages, model, engine)
    state = ChatSession(loaded, options, start if resume is None else loaded.restore(resume))
    chat = Chat(messages, state, TextOutput(shown=True))
    reader = line_reader(complete, state.positions - 1)
    if len(state.text) >= state.positions:
        raise click.UsageError(
            f"--prompt is {len(state.text)} bytes long; the model has room for {state.positions - 1}"
        )
    if reader.interactive:
        chat.say(f"{model}, {state.positions_left} positions left")
        chat.say("Type a line; the model goes on with the text. /help tells more, Ctrl-D leaves.")
    if state.text:
        if state.unread:
            with status(messages, f"reading the prompt, {len(state.text)} bytes"):
                state.read()
        if reader.interactive:
            text = state.text.decode("utf-8", "replace")
            chat.out.write((text if len(text) <= _SHOWN else "... " + text[-_SHOWN:]).encode())
            chat.out.close_line()
    try:
        done = _converse(chat, reader)
    finally:
        reader.close()
    if not done:
        raise click.exceptions.Exit(1)


def _converse(chat: Chat, reader: LineReader) -> bool:
    """Take lines until there are no more; whether all of them could be done."""
    from .chat_lines import take_line, told_to_read
    from .chat_session import ChatError

    done = True
    while True:
        try:
            line = reader.read()
        except KeyboardInterrupt:
            if not reader.interactive:
                raise
            chat.messages.note("")
            chat.note("/quit or Ctrl-D leaves")
            continue
        if line is None:
            if reader.interactive:
                chat.messages.note("")
            return done
        try:
            if not take_line(chat, line, reader.interactive):
                return done
        except BrokenPipeError:  # nobody reads on
            raise
        except KeyboardInterrupt:
            chat.out.close_line()
            if not reader.interactive:
                raise
            chat.note(f"stopped{told_to_read(chat.state)}")
        except Exception as error:
            told = str(error) if isinstance(error, ChatError) else foreseen_line(error)
            if told is None:
                raise
            chat.out.close_line()
            chat.note(f"error: {printable(told)}")
            done = done and reader.interactive
