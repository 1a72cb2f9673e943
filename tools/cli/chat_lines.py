"""What a line of `blt-edge chat` does: a turn of the text, or a command, which begins with a slash.

stdout carries the model's text, and what /text shows; stderr everything else. A wrong command or value is a
`ChatError` of one line, and changes nothing.
What it does not know: how lines are typed, where they come from.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from ...runtime.files import write_whole
from ..output import (
    Messages,
    TextOutput,
    counted,
    escaped,
    interrupt_sets,
    is_terminal,
    printable,
    size,
    status,
)
from ..tables import print_fields
from .chat_session import ADVICE, ChatError, ChatSession, Reply, typed_text
from .generate import memory_told, stage_shares
from .line_reader import paths_that_begin
from .options import StopString, expanded
from .prompt_cache import is_state


@dataclass
class Chat:
    """What lines work on."""

    messages: Messages
    state: ChatSession
    out: TextOutput

    def say(self, line: str) -> None:
        """Write a line on stderr, unless it is to be quiet; a terminal gets no cut words."""
        if not self.messages.quiet:
            self.note(line)

    def note(self, line: str) -> None:
        """The same, be it quiet or not."""
        lines = [line]
        if is_terminal(sys.stderr):
            lines = textwrap.wrap(line, shutil.get_terminal_size().columns - 1, subsequent_indent="  ")
        for one in lines:
            self.messages.note(one)


def take_line(chat: Chat, line: bytes, interactive: bool) -> bool:
    """Do what one line asks; False when it is to be the last.

    Raises ChatError, OptionError and OSError, with nothing changed; KeyboardInterrupt for an answer that was
    stopped where nobody types.
    """
    if line.startswith(b"/") and not line.startswith(b"//"):
        return _run_command(chat, line.decode("utf-8", "surrogateescape"))
    state, cancel = chat.state, threading.Event()
    typed = typed_text(line[1:] if line.startswith(b"//") else line, state.text)
    reading = len(state.unread) + len(typed)
    with ExitStack() as progress, interrupt_sets(cancel):

        def write(data: bytes) -> None:
            progress.close()
            chat.out.write(data)

        if reading > 200 and is_terminal(sys.stderr):
            progress.enter_context(status(chat.messages, f"reading {reading} bytes"))
        reply = state.turn(typed, write, cancel)
    chat.out.close_line()
    chat.say(f"[{_figures(reply, state.options.constraint is not None)}]")
    left, positions = state.positions_left, state.positions
    if left == 0:
        chat.note(f"no positions are left, all {positions} are used; {ADVICE}")
    elif left < min(state.options.max_new_bytes, positions // 8):
        chat.say(f"{left} of {positions} positions are left; {ADVICE}")
    if reply.reason == "cancelled" and not interactive:
        raise KeyboardInterrupt
    return True


_ENDINGS = {
    "length": "",
    "eos": "; the model ended the text",
    "stop": "; a stop string came",
    "context": "; the positions ran out",
    "cancelled": "; stopped",
}


def _figures(reply: Reply, fits: bool) -> str:
    """fits: whether the text had to fit something."""
    stats = reply.stats
    told = [counted(stats.new_bytes, "new byte")]
    if stats.new_bytes > 1:
        told.append(f"{stats.bytes_per_second:.0f} bytes/s")
    if reply.patches:
        told.append(f"{(stats.prompt_bytes + stats.new_bytes) / reply.patches:.1f} bytes a patch")
    if stats.new_bytes:
        first = 1000 * stats.first_byte_seconds
        told.append(f"first in {first:.{int(first < 10)}f} ms")
    if stats.acceptance is not None:
        told.append(f"guesses {stats.acceptance:.0%}")
    cut = "; the last character is not complete" if reply.cut else ""
    ending = _ENDINGS.get(reply.reason, "")
    if fits and reply.reason == "eos":
        ending = "; the text is complete"
    elif fits and reply.reason == "length":
        ending = "; it may lack its end"
    return ", ".join(told) + ending + cut


_NUMBERS: dict[str, type[int] | type[float]] = {
    "max_new_bytes": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "draft_length": int,
}
SETTINGS = (*list(_NUMBERS)[:-1], "stop", "draft", "draft_length")
"""What /set sets: fields of `GenerationOptions`."""

_OTHER_NAMES = {"temp": "temperature", "n": "max_new_bytes", "max_new_tokens": "max_new_bytes"}
_NONE = {"seed": "another one each turn", "draft_length": "as many as pay"}


def _set(chat: Chat, argument: str) -> None:
    if not argument.strip():
        _print([(name, _shown(name, getattr(chat.state.options, name))) for name in SETTINGS])
        return
    given, equals, value = argument.strip().partition("=")
    adds = given.endswith("+")
    name = given.removesuffix("+").strip().lstrip("-").replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    if name not in SETTINGS:
        raise ChatError(f"there is no setting {given.strip()!r}; {_near(name, SETTINGS)}")
    if not equals or (adds and name != "stop"):
        raise ChatError(f"got {argument.strip()!r}; write /set {name}=VALUE")
    new = _value(name, value)
    chat.state.change(**{name: (*chat.state.options.stop, *new) if adds else new})
    chat.say(f"{name}={_shown(name, getattr(chat.state.options, name))}")


def _value(name: str, text: str) -> Any:
    """The value; a text that is no number is left to the options to refuse, which know what is allowed."""
    if name == "stop":
        try:
            return (StopString().read(text),) if text else ()
        except ValueError as error:
            raise ChatError(f"stop: {error}") from None
    text = text.strip()
    if name in _NONE and text.lower() == "none":
        return None
    try:
        return _NUMBERS[name](text) if name in _NUMBERS else text
    except ValueError:
        return text


def _shown(name: str, value: Any) -> str:
    if name == "stop":
        return " ".join(map(escaped, value)) or "none"
    if value is None:
        return f"none ({_NONE[name]})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _help(chat: Chat, argument: str) -> None:
    for line in _LINES.splitlines():
        chat.messages.note(line)
    chat.messages.note("")
    _print([(f"{name} {command.argument}", command.help) for name, command in COMMANDS.items()])


_LINES = r"""The model was trained to go on with texts, not to answer. What you type is
added to the text as a line of its own, and the model writes on from there.

  an empty line      let the model go on
  a line and \       without a newline: "Once upon a time\" goes on in that line
  \ and a line       begin where the text ends, without a newline between
  \ alone            add just a newline
  \\ at either end   a backslash that is meant
  //...              a line that begins with a slash
  Ctrl-C             stop the model; what it wrote stays
  Ctrl-D             leave
"""


def _stats(chat: Chat, argument: str) -> None:
    state, past = chat.state, chat.state.past
    text = f"{counted(len(state.text), 'byte')}, {counted(len(state.turns), 'turn')}"
    patches = max(0, len(state.sequence.boundaries.patch_lengths()) - 1) if state.sequence.length else 0
    if patches:
        text += f", {(state.sequence.length - 1) / patches:.2f} bytes a patch"
    reading, making = sum(one.prefill_seconds for one in past), sum(one.decode_seconds for one in past)
    fields = [
        ("text", text),
        ("positions", f"{state.positions_left} of {state.positions} left"),
        ("read", _paced(sum(one.prompt_bytes for one in past), reading)),
        ("generated", _paced(sum(one.new_bytes for one in past), making)),
    ]
    drafted, accepted = sum(one.drafted for one in past), sum(one.accepted for one in past)
    if drafted:
        fields.append(("drafts", f"{accepted} of {drafted} guesses right ({accepted / drafted:.0%})"))
    total = reading + making
    if total:
        stages = {name: sum(one.stage_seconds[name] for one in past) for name in past[0].stage_seconds}
        shares = stage_shares(stages, total).items()
        fields.append(("time", ", ".join(f"{name} {share:.0%}" for name, share in shares)))
    fields.append(("memory", memory_told(state.sequence.state_bytes)))
    if state.kept:
        fields.append(("undo", f"{counted(state.kept, 'earlier state')} kept, {size(state.kept_bytes)}"))
    fields.append(("engine", str(state.model.engine)))
    _print(fields)


def _paced(count: int, seconds: float) -> str:
    return counted(count, "byte") + (f", {count / seconds:.1f} bytes/s" if count and seconds else "")


def _reset(chat: Chat, argument: str) -> None:
    chat.state.reset()
    chat.say(f"started over with {counted(len(chat.state.text), 'byte')} of text{told_to_read(chat.state)}")


def _undo(chat: Chat, argument: str) -> None:
    typed, made = chat.state.undo()
    left = counted(len(chat.state.text), "byte")
    told = f"took back {typed} typed and {counted(made, 'generated byte')}; the text has {left}"
    chat.say(told + told_to_read(chat.state))


def told_to_read(state: ChatSession) -> str:
    """How much of the text the next line reads beside itself, to follow a clause; empty for nothing."""
    unread = len(state.unread)
    if not unread:
        return ""
    return f"; {counted(unread, 'byte')} of the text {'is' if unread == 1 else 'are'} read with the next line"


def _text(chat: Chat, argument: str, over: bool = False) -> None:
    if not argument.strip() and not over:
        chat.out.write(chat.state.text)
        chat.out.close_line()
        return
    target = _target("/text!" if over else "/text", argument)
    if not over and os.path.lexists(target):
        raise ChatError(f"{target} is there already; /text! {target} writes over it")
    write_whole(target, lambda path: path.write_bytes(chat.state.text))
    chat.say(f"{counted(len(chat.state.text), 'byte')} written to {target}")


def _save(chat: Chat, argument: str, over: bool = False) -> None:
    target = _target("/save!" if over else "/save", argument)
    if os.path.lexists(target):
        if not over and not is_state(target):
            raise ChatError(
                f"{target} is there already and is no saved state; /save! {target} writes over it"
            )
        if target.exists() and not target.is_file():
            raise ChatError(f"{target} is not a regular file; give another name")
    with status(chat.messages, f"saving to {target}") if is_terminal(sys.stderr) else nullcontext():
        chat.state.save(target)
    text = counted(len(chat.state.text), "byte")
    chat.say(f"{text} of text and their state written to {target}, {size(target.stat().st_size)}")


def _target(command: str, argument: str) -> Path:
    """The file that a command is to write. Raises ChatError where that can't be."""
    name = argument.strip()
    if not name:
        raise ChatError(f"{command} needs a file's name")
    if "\0" in name:
        raise ChatError(f"{name} has a byte that no file's name can have; give another name")
    target = expanded(name)
    if target.is_dir():
        raise ChatError(f"{name} is a directory; give a file")
    if not target.parent.is_dir():
        raise ChatError(f"the directory {target.parent} does not exist; create it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ChatError(f"{name} can't be written; check its permissions")
    return target


def _print(fields: list[tuple[str, str]]) -> None:
    if sys.stderr is not None:
        print_fields(fields, sys.stderr)


@dataclass(frozen=True)
class _Command:
    run: Callable[[Chat, str], None]
    help: str
    argument: str = ""


COMMANDS = {
    "/help": _Command(_help, "show this"),
    "/text": _Command(_text, "show the text so far, or write it to a new file", "[FILE]"),
    "/text!": _Command(partial(_text, over=True), "write it over a file that is there", "FILE"),
    "/undo": _Command(_undo, "take back the last turn: what you typed and what the model wrote"),
    "/reset": _Command(_reset, "start over, with the text of --prompt or with none"),
    "/set": _Command(
        _set,
        "change how text is generated, such as temperature=0.7; /set alone shows all; "
        "stop+=TEXT adds a stop string, stop= removes all",
        "NAME=VALUE",
    ),
    "/stats": _Command(_stats, "figures of the text and of all turns"),
    "/save": _Command(
        _save,
        "write the text and its state to a new file, or over an earlier state; "
        "chat --resume FILE goes on from it, in the same words and without reading them again",
        "FILE",
    ),
    "/save!": _Command(partial(_save, over=True), "write them over whatever file is there", "FILE"),
    "/quit": _Command(lambda chat, argument: None, "leave, as Ctrl-D does"),
}


def _run_command(chat: Chat, line: str) -> bool:
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        hint = _near(name, COMMANDS)
        raise ChatError(f"there is no command {printable(name)}; {hint} (// begins a text with a slash)")
    command = COMMANDS[name]
    if argument.strip() and not command.argument:
        raise ChatError(f"{name} takes no argument, got {printable(argument)!r}")
    command.run(chat, argument)
    return name != "/quit"


def _near(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names))
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def complete(line: str, word: str) -> list[str]:
    """What the last word of a line may become: commands, settings, files."""
    if line == word:
        return [
            name + " " * bool(command.argument)
            for name, command in COMMANDS.items()
            if word and name.startswith(word)
        ]
    command = line.split(" ", 1)[0]
    if command == "/set":
        return [f"{name}=" for name in SETTINGS if name.startswith(word)]
    return paths_that_begin(word) if command.rstrip("!") in ("/save", "/text") else []
