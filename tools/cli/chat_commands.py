"""The commands of `blt-edge chat`: what a line that begins with a slash does.

Each prints its answer on stderr, but for /text, whose answer is the text. A wrong command or value is a
`ChatError` of one line, and changes nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import click

from ...runtime.files import write_whole
from ...runtime.host import peak_resident
from ..output import Session, TextOutput, is_terminal, print_fields, printable, size, status
from .chat_session import ChatError, ChatSession
from .line_reader import expanded, paths_that_begin
from .options import StopString

__all__ = ["SETTINGS", "Chat", "complete", "run_command"]


@dataclass
class Chat:
    """What commands work on."""

    session: Session
    state: ChatSession
    out: TextOutput

    def say(self, line: str) -> None:
        """Write a line on stderr, unless it is to be quiet; a terminal gets no cut words."""
        if not self.session.quiet:
            self.note(line)

    def note(self, line: str) -> None:
        """The same, be it quiet or not."""
        if is_terminal(sys.stderr):
            line = textwrap.fill(line, shutil.get_terminal_size().columns - 1, subsequent_indent="  ")
        self.session.note(line)


def run_command(chat: Chat, line: str) -> bool:
    """Do what the line, which begins with a slash, says; False when the program is to end.

    Raises ChatError, OptionError and OSError, with nothing changed.
    """
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
        raise ChatError(f"there is no command {printable(name)}; {hint} (// begins a text with a slash)")
    command = COMMANDS[name]
    if argument.strip() and not command.argument:
        raise ChatError(f"{name} takes no argument, got {printable(argument)!r}")
    return command.run(chat, argument) is not False


# 1. Settings.

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
        _print(chat, [(name, _shown(name, getattr(chat.state.options, name))) for name in SETTINGS])
        return
    given, equals, value = argument.strip().partition("=")
    adds = given.endswith("+")
    name = given.removesuffix("+").strip().lstrip("-").replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    if name not in SETTINGS:
        near = get_close_matches(name, SETTINGS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(SETTINGS)}"
        raise ChatError(f"there is no setting {given.strip()!r}; {hint}")
    if not equals or (adds and name != "stop"):
        raise ChatError(f"got {argument.strip()!r}; write /set {name}=VALUE")
    before = chat.state.options.stop if adds else ()
    chat.state.change(**{name: (*before, *_stop(value)) if name == "stop" else _value(name, value.strip())})
    chat.say(f"{name}={_shown(name, getattr(chat.state.options, name))}")


def _value(name: str, text: str) -> Any:
    """The value; a text that is no number is left to the options to refuse, which know what is allowed."""
    if name in _NONE and text.lower() == "none":
        return None
    try:
        return _NUMBERS[name](text) if name in _NUMBERS else text
    except ValueError:
        return text


def _stop(text: str) -> tuple[bytes, ...]:
    if not text:
        return ()
    try:
        return (StopString().convert(text, None, None),)
    except click.BadParameter as error:
        raise ChatError(f"stop: {error.message}") from None


def _shown(name: str, value: Any) -> str:
    if name == "stop":
        return " ".join(map(_escaped, value)) or "none"
    if value is None:
        return f"none ({_NONE[name]})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escaped(data: bytes) -> str:
    """As it is typed: what can't be seen is escaped."""
    text = data.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# 2. The others.


def _help(chat: Chat, argument: str) -> None:
    chat.session.note(_LINES)
    _print(chat, [(f"{name} {command.argument}", command.help) for name, command in COMMANDS.items()])


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
    state, totals = chat.state, chat.state.totals
    length, turns = len(state.text), len(state.turns)
    patches = max(0, len(state.sequence.boundaries.patch_lengths()) - 1) if state.sequence.length else 0
    text = f"{_many(length, 'byte')}, {_many(turns, 'turn')}"
    if patches:
        text += f", {(state.sequence.length - 1) / patches:.2f} bytes a patch"
    fields = [
        ("text", text),
        ("positions", f"{state.positions_left} of {state.positions} left"),
        ("read", _paced(totals.read, totals.prefill_seconds)),
        ("generated", _paced(totals.new, totals.decode_seconds)),
    ]
    if totals.drafted:
        share = totals.accepted / totals.drafted
        fields.append(("drafts", f"{totals.accepted} of {totals.drafted} guesses right ({share:.0%})"))
    total = totals.prefill_seconds + totals.decode_seconds
    if total:
        shares = {name: seconds / total for name, seconds in totals.stage_seconds.items()}
        shares["other"] = max(0.0, 1.0 - sum(shares.values()))
        fields.append(("time", ", ".join(f"{name} {share:.0%}" for name, share in shares.items())))
    peak = peak_resident()
    memory = f"{size(state.sequence.state_bytes)} of state"
    fields.append(("memory", memory + (f", {size(peak)} at peak in all" if peak else "")))
    fields.append(("engine", str(state.model.engine)))
    _print(chat, fields)


def _paced(count: int, seconds: float) -> str:
    return _many(count, "byte") + (f", {count / seconds:.1f} bytes/s" if count and seconds else "")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _reset(chat: Chat, argument: str) -> None:
    chat.state.reset()
    chat.say(f"started over with {_many(len(chat.state.text), 'byte')} of text")


def _undo(chat: Chat, argument: str) -> None:
    again = chat.state.undo_reads()
    with status(chat.session, f"reading the first {again} bytes again") if again else nullcontext():
        typed, made = chat.state.undo()
    left = _many(len(chat.state.text), "byte")
    chat.say(f"took back {typed} typed and {_many(made, 'generated byte')}; the text has {left}")


def _text(chat: Chat, argument: str) -> None:
    chat.out.write(chat.state.text.decode("utf-8", "replace"))
    chat.out.close_line()


def _save(chat: Chat, argument: str) -> None:
    _write(chat, argument, over=False)


def _save_over(chat: Chat, argument: str) -> None:
    _write(chat, argument, over=True)


def _write(chat: Chat, argument: str, over: bool) -> None:
    name = argument.strip()
    if not name:
        raise ChatError(f"/save{'!' * over} needs a file's name")
    if "\0" in name:
        raise ChatError(f"{name} has a byte that no file's name can have; give another name")
    target = expanded(name)
    if target.is_dir():
        raise ChatError(f"{name} is a directory; give a file")
    if not over and os.path.lexists(target):
        raise ChatError(f"{name} is there already; /save! {name} writes over it")
    if not target.parent.is_dir():
        raise ChatError(f"the directory {target.parent} does not exist; create it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ChatError(f"{name} can't be written; check its permissions")
    write_whole(target, lambda path: path.write_bytes(chat.state.text))
    chat.say(f"{_many(len(chat.state.text), 'byte')} written to {printable(name)}")


def _quit(chat: Chat, argument: str) -> bool:
    return False


def _print(chat: Chat, fields: list[tuple[str, str]]) -> None:
    if sys.stderr is not None:
        print_fields(fields, sys.stderr)


@dataclass(frozen=True)
class _Command:
    run: Callable[[Chat, str], bool | None]
    help: str
    argument: str = ""


COMMANDS = {
    "/help": _Command(_help, "show this"),
    "/text": _Command(_text, "show the text so far"),
    "/undo": _Command(_undo, "take back the last turn: what you typed and what the model wrote"),
    "/reset": _Command(_reset, "start over, with the text of --prompt or with none"),
    "/set": _Command(
        _set,
        "change how text is generated, such as temperature=0.7; /set alone shows all; "
        "stop+=TEXT adds a stop string, stop= removes all",
        "NAME=VALUE",
    ),
    "/stats": _Command(_stats, "figures of the text and of all turns"),
    "/save": _Command(_save, "write the text to a new file", "FILE"),
    "/save!": _Command(_save_over, "write it over a file that is there", "FILE"),
    "/quit": _Command(_quit, "leave, as Ctrl-D does"),
}


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
    return paths_that_begin(word) if command in ("/save", "/save!") else []
