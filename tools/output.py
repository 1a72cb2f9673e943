"""What people are shown: progress, figures and error lines on stderr, generated text on stdout.

On a terminal progress is a bar that leaves nothing behind; in a pipe it is one plain line per step. An error
is one line in the user's words, whoever raised it. Nothing that a file, a model or a name says controls a
terminal: what one would obey, or not show, is written as an escape. rich is imported when something is shown.
What it does not know: verbs and their options, the server. Nothing below it prints.
"""

from __future__ import annotations

import codecs
import re
import signal
import sys
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, ClassVar, Protocol, TextIO

import click

from ..runtime.errors import BltError, BltWarning, requirement

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: nobody knows)."""

PROSE_WIDTH = 100
"""Columns of what is read rather than cut up by programs, where no terminal says how many there are."""
_EXTRAS = {
    "cpu": ("onnxruntime",),
    "export": ("onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub"),
    "validate": ("torch", "transformers"),
    "serve": ("starlette", "uvicorn", "prometheus_client", "jinja2"),
    "eval": ("lm_eval",),
}
"""Optional packages, by the extra that installs them."""


class _Visible(dict[int, "int | str"]):
    """A table for `str.translate`: controls, bidirectional and other invisible format characters (categories
    Cc, Cf), halves of pairs and separators of lines become escapes; `signs` go before that."""

    def __missing__(self, code: int) -> int | str:
        hidden = unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return chr(code).encode("unicode_escape").decode("ascii") if hidden else code


_TAB, _NEWLINE = {9: 9}, {10: 10}
_LINE = _Visible(_TAB)
_LINES = _Visible(_TAB | _NEWLINE)
# Text keeps its length in columns where there is a sign.
_TEXT = _Visible(
    {code: 0x2400 + code for code in range(32)}
    | {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
    | _TAB
    | _NEWLINE
)


# 1. How much to say, and to whom.


@dataclass
class Messages:
    """Verbosity of this run, and stderr for progress and figures."""

    verbose: bool = False
    """-v: tracebacks of errors that nobody foresaw, warnings of libraries."""
    quiet: bool = False
    """-q: nothing on stderr but errors."""

    def say(self, line: str = "") -> None:
        """Write a line on stderr, unless it is to be quiet."""
        if not self.quiet:
            self.note(line)

    def note(self, line: str) -> None:
        """Write a line on stderr that is no progress and no figure: even -q does not hide it."""
        if sys.stderr is not None:
            sys.stderr.write(line.translate(_LINE) + "\n")
            sys.stderr.flush()


def is_terminal(stream: object) -> bool:
    """Whether a person may be looking at the stream (sys.stdout and sys.stderr are None when closed)."""
    isatty = getattr(stream, "isatty", None)
    try:
        return bool(isatty and isatty())
    except ValueError:  # closed since
        return False


def printable(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey."""
    line = re.sub(r"\s*\n\s*", " ", text.strip())
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line
    )


def escaped(data: bytes) -> str:
    """`data` as a stop string is typed, on one line: with escapes for what can't be seen, or is no UTF-8."""
    text = data.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def echo(line: str = "", file: IO[str] | None = None) -> None:
    """Write lines on stdout, or on `file`: as they are in a pipe, and with escapes on a terminal."""
    target = sys.stdout if file is None else file
    if target is not None:
        target.write((line.translate(_LINES) if is_terminal(target) else line) + "\n")


def show_traceback(error: BaseException) -> None:
    """Write an exception's traceback on stderr."""
    if sys.stderr is not None:
        sys.stderr.write("".join(traceback.format_exception(error)).translate(_LINES))


def error_line(text: str, prefix: str = "error: ") -> None:
    """Write the line on stderr, as long as there is one."""
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"blt-edge: {prefix}{printable(text)}\n")
            sys.stderr.flush()


@contextmanager
def warning_lines() -> Iterator[None]:
    """Inside, a warning of ours is a line on stderr, on a line of its own; others read as Python's."""
    with warnings.catch_warnings():

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, BltWarning):
                if sys.stderr is not None:
                    told = warnings.formatwarning(message, category, filename, lineno, line)
                    sys.stderr.write(told.translate(_LINES))
                return
            if TextOutput.unfinished is not None:
                TextOutput.unfinished.end_line()
            error_line(str(message), prefix="warning: ")

        warnings.showwarning = show
        yield


# 2. Wrong usage, found by click or by us.


def option_name(parameter: click.Parameter) -> str:
    """What the user knows a parameter by: "--top-k", "FILE"."""
    if isinstance(parameter, click.Argument):
        return (parameter.metavar or parameter.name or "").upper().strip("[].")
    return next((flag for flag in parameter.opts if flag.startswith("--")), parameter.opts[0])


def usage_line(error: click.UsageError) -> str:
    """A usage error in one line, with the option's name in front."""
    path = error.ctx.command_path if error.ctx else "blt-edge"
    more = f"; see {path} --help"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{option_name(error.param)} is missing{more}"
    if isinstance(error, click.NoSuchOption):
        near = " or ".join(error.possibilities or ())
        return f"there is no option {error.option_name}" + (f"; did you mean {near}?" if near else more)
    message = error.message.rstrip(".")
    for type_name, plain in (("integer", "whole number"), ("float", "number")):
        message = re.sub(f"is not a valid {type_name}( range)?$", f"is not a {plain}", message)
    # Our own say what to do; click's don't.
    more = "" if ";" in message else more
    if isinstance(error, click.BadParameter):
        return (
            f"{option_name(error.param)}: {message}{more}" if error.param is not None else f"{message}{more}"
        )
    return f"{message[:1].lower()}{message[1:]}{more}" if more else message


def flagged(message: str, command: click.Command) -> str:
    """A message about a field of an options class, as one about the option: "top_k is" to "--top-k is"."""
    word = re.match(r"[a-z]+ [a-z]+(?=: )|[a-z_]+(?=:? )", message)
    name = word[0].replace(" ", "_") if word else ""
    for parameter in command.params:
        if word and isinstance(parameter, click.Option) and parameter.name == name:
            return option_name(parameter) + message[word.end() :]
    return message


# 3. Errors of a run.


def foreseen_line(error: Exception) -> str | None:
    """The line of an error that can happen to anybody; None for one that nobody foresaw."""
    if isinstance(error, BltError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or take a smaller model or --prefill-chunk"
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        for extra, packages in _EXTRAS.items():
            if name in packages:
                install = f"pip install {requirement(extra)}"
                return f"this needs the package {name}, which is not installed: {install}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def crash_line(error: Exception, verbose: bool) -> str:
    """The line of an error that nobody foresaw."""
    text = str(error).strip()
    hint = "" if verbose else " (run with -v for the traceback)"
    return f"{type(error).__name__}: {text}{hint}" if text else f"{type(error).__name__}{hint}"


# 4. Progress.


@contextmanager
def progress_bar(messages: Messages) -> Iterator[Progress]:
    """A callback that shows progress in bytes while the block runs."""
    if messages.quiet or sys.stderr is None:
        yield lambda what, done, total: None
        return
    if not is_terminal(sys.stderr):
        yield _Lines(messages)
        return
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    # A bar over two lines would leave one of them behind.
    narrow = Column(no_wrap=True, overflow="ellipsis", max_width=32)
    display = progress.Progress(
        progress.TextColumn("{task.description}", markup=False, table_column=narrow),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=is_terminal(sys.stdout),
    )
    with _shown(display):
        task = display.add_task("preparing", total=None)

        def show(what: str, done: int, total: int) -> None:
            display.update(task, description=printable(what), completed=done, total=total or None)

        yield show


class _Lines:
    """Progress where nothing can be drawn: a line when something else begins."""

    def __init__(self, messages: Messages) -> None:
        self._messages, self._last = messages, ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._last:
            self._last = what
            self._messages.say(printable(what))


@contextmanager
def status(messages: Messages, first: str = "") -> Iterator[Callable[[str], None]]:
    """A callback that says what is being done now; on a terminal the last thing said vanishes at the end."""
    if messages.quiet or not is_terminal(sys.stderr):
        lines = _Lines(messages)
        if first:
            lines(first, 0, 0)
        yield lambda what: lines(what, 0, 0)
        return
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    shown = Status(Text(printable(first)), console=Console(stderr=True))
    with _shown(shown):
        yield lambda what: shown.update(Text(printable(what)))


class _Display(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...


_DISPLAYS: list[_Display] = []
"""Those that are on the terminal."""


@contextmanager
def _shown(display: _Display) -> Iterator[None]:
    # Ctrl-C while it starts, when the cursor is hidden already, would leave it hidden.
    from ..runtime.files import uninterrupted

    try:
        with uninterrupted():
            display.start()
        _DISPLAYS.append(display)
        yield
    finally:
        display.stop()
        if display in _DISPLAYS:
            _DISPLAYS.remove(display)


@contextmanager
def progress_aside() -> Iterator[None]:
    """Inside, no progress is on a terminal that stdout is, too, so that it can be written on."""
    from ..runtime.files import uninterrupted

    aside = [*_DISPLAYS] if is_terminal(sys.stdout) else []
    for display in aside:
        display.stop()
    yield
    for display in aside:
        with uninterrupted():
            display.start()


# 5. Numbers.


def size(bytes_: float | None) -> str:
    """Bytes in decimal units: "512 bytes", "25.1 MB"; "unknown" for None."""
    if bytes_ is None:
        return "unknown"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if bytes_ >= scale:
            return f"{bytes_ / scale:.1f} {unit}"
    return f"{bytes_:.0f} bytes"


def counted(number: int, what: str) -> str:
    """So many of what is counted: "1 byte", "2 bytes"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(numbers: Sequence[object]) -> str:
    """At least one number as people list them: "2, 4 and 8"."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def count(number: float) -> str:
    """A count in three digits or so: "512", "1.2 M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f}"


# 6. Generated text, and Ctrl-C while it comes.


class WholeCharacters:
    """Cuts UTF-8 that arrives in pieces between characters. The bytes are left as they are."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""

    @property
    def pending(self) -> int:
        """Bytes held back, 0 to 3: the beginning of a character."""
        return len(self._held)

    def push(self, data: bytes) -> bytes:
        """The bytes up to the end of the last whole character; invalid ones are characters, too."""
        self._decoder.decode(data)
        data = self._held + data
        whole = len(data) - len(self._decoder.getstate()[0])
        self._held = data[whole:]
        return data[:whole]

    def flush(self) -> bytes:
        """What was held back. The next push begins a new text."""
        self._decoder.reset()
        held, self._held = self._held, b""
        return held


class TextOutput:
    """stdout, as far as text goes there: its bytes as they are, whatever the locale says. A terminal is shown
    escapes for what it would obey, and U+FFFD for what is no UTF-8."""

    unfinished: ClassVar[TextOutput | None] = None
    """The one that has an open line on a terminal."""

    def __init__(self, shown: bool) -> None:
        self._stream = sys.stdout if shown else None
        self._visible = is_terminal(self._stream)
        self.open_line = False  # something was written, and no newline after it

    def write(self, data: bytes) -> None:
        """Write text at once: whole characters, on a terminal."""
        if self._stream is None or not data:
            return
        shown = data.decode("utf-8", "replace").translate(_TEXT).encode() if self._visible else data
        write_bytes(shown, self._stream)
        self.open_line = not data.endswith(b"\n")
        TextOutput.unfinished = self if self.open_line and self._visible else None

    def close_line(self) -> None:
        """Let what follows on stdout begin on a line of its own."""
        if self.open_line:
            self.write(b"\n")

    def end_line(self) -> None:
        """Let what follows on stderr begin on a line of its own, without adding to stdout."""
        if self.open_line and sys.stderr is not None:
            sys.stderr.write("\n")
            sys.stderr.flush()
        self.open_line = False
        TextOutput.unfinished = None


def write_bytes(data: bytes, file: TextIO | None = None) -> None:
    """Write bytes on stdout, or on `file`, at once: past the stream's encoding and its ends of lines."""
    target = sys.stdout if file is None else file
    if target is not None:
        target.flush()
        target.buffer.write(data)
        target.buffer.flush()


@contextmanager
def interrupt_sets(event: threading.Event) -> Iterator[None]:
    """Inside, the first Ctrl-C sets the event, so that the last byte and the figures are not lost."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return

    def set_event(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, set_event)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
