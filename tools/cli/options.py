"""What verbs are made of: the types of their values, and the options that several of them share.

Values are checked as far as that needs no model; how a command line is read is in `verbs.py`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ...runtime.names import DRAFTS, MANIFEST_NAME, MOST_ROWS, STAGES
from ..output import Messages, printable
from .verbs import GROUPS, NEEDED, DemoBundle, VerbCommand, is_model

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    AnyType = click.ParamType[Any]
    TextChoice = click.Choice[str]
else:  # generic from click 8.2 on
    AnyType = click.ParamType
    TextChoice = click.Choice

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_THREADS = "what others leave free, at most what build found best"
"""Of --threads."""

STDIN = Path("-")
"""Stands for stdin where a file is read, and for stdout where one is written."""


def verb(name: str, *examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a verb with -v and -q: its docstring is the help, its first argument the messages.

    examples: command lines without the program's name, which end the help.
    """

    def keep(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        messages = ctx.find_object(Messages)
        if messages is not None and value:
            setattr(messages, str(param.name), True)

    helps = {
        "verbose": "Show tracebacks of unexpected errors and the warnings of libraries.",
        "quiet": "No progress and no figures on stderr.",
    }

    def wrap(function: Callable[..., None]) -> click.Command:
        command = click.command(name, cls=VerbCommand)(click.pass_obj(function))
        assert isinstance(command, VerbCommand)
        command.examples = examples
        for word, text in helps.items():
            flags = [f"-{word[0]}", f"--{word}"]
            option = click.Option(flags, is_flag=True, expose_value=False, callback=keep, help=text)
            command.params.append(option)
        return command

    return wrap


class Value(AnyType):
    """A type whose values `read` makes of a text; with what a shell that completes words may offer for it."""

    offered = ""
    """"file" or "dir" where a path is meant."""
    words: tuple[str, ...] = ()

    def read(self, text: str) -> Any:
        """The value. Raises ValueError with a line that follows the option's name."""
        raise NotImplementedError

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, or a refusal of what was typed; a default is a value already."""
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The words that begin so; the shell itself looks for paths."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(word) for word in self.words if word.startswith(incomplete)]
        # bash forgets words that come with paths.
        if not self.offered or (incomplete and found and not any(Path().glob(f"{incomplete}*/"))):
            return found
        return [*found, CompletionItem(incomplete, type=self.offered)]


class BundleDirectory(Value):
    """A directory that holds a manifest, which the runtime checks; or `demo`, of which one is made."""

    name = "bundle"
    offered = "dir"
    words = ("demo",)

    def read(self, text: str) -> Path | DemoBundle:
        path = Path(text)
        advice = "give the directory of a bundle that `blt-edge export` wrote"
        if text == "demo" and not is_model(path):
            return DemoBundle()
        if not os.path.lexists(path):
            if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.parent.exists():
                advice += f"; if it is a hub id: {_export(text)}"
            raise ValueError(f"{text} does not exist; {advice}")
        if not path.is_dir():
            raise ValueError(f"{text} is not a directory; {advice}")
        if not os.access(path, os.R_OK | os.X_OK):
            raise ValueError(f"{text} can't be read; check its permissions")
        if not os.path.lexists(path / MANIFEST_NAME):
            if is_model(path):
                raise ValueError(f"{text} is a checkpoint, not a bundle; make one of it: {_export(text)}")
            raise ValueError(f"{text} has no {MANIFEST_NAME}, so it is no bundle; {advice}")
        return path


def _export(source: str) -> str:
    """The command that makes a bundle of a checkpoint."""
    bundle = re.sub(r"[^\w.-]", "", Path(source).resolve().name) or "model"
    return f"blt-edge export {shlex.quote(source)} -o {bundle}-bundle"


def expanded(name: str) -> Path:
    """The path that a person means, ~ being home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~name of nobody
        return Path(name)


class CheckpointSource(Value):
    """A folder that is there, a hub id with or without a revision, or `demo`: the same string."""

    name = "model"
    offered = "dir"
    words = ("demo",)

    def read(self, text: str) -> str:
        path = expanded(text)
        if text == "demo" or (text and path.is_dir()):
            return text
        if path.exists():
            raise ValueError(f"{text} is a file; give the folder that holds config.json and the weights")
        hub_id = text.partition("@")[0]
        if hub_id.count("/") != 1 or text.startswith(("/", ".", "~")) or text.endswith(("/", "@")):
            raise ValueError(
                f"{text} does not exist; give a checkpoint's folder, a hub id owner/name, or demo"
            )
        return text


class Rows(Value):
    """Numbers of texts at once, such as 2,4,8; or none."""

    name = "rows"
    words = ("none",)

    def read(self, text: str) -> tuple[int, ...]:
        if text == "none":
            return ()
        numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
        if not all(2 <= number <= MOST_ROWS for number in numbers):
            raise ValueError(f"{text!r}: give numbers from 2 to {MOST_ROWS}, such as 2,4,8, or none")
        return tuple(sorted(set(numbers)))


class StageNames(Value):
    """Stages, such as latent,decoder; ("all",), and () for none."""

    name = "stages"
    words = (*STAGES, "all", "none")

    def read(self, text: str) -> tuple[str, ...]:
        parts = [part.strip() for part in text.split(",")]
        alone = [part for part in parts if part in ("all", "none")]
        if alone and len(parts) > 1:
            raise ValueError(f"{alone[0]} stands alone; give it, or stages such as latent,decoder")
        if not set(parts) <= set(self.words):
            raise ValueError(f"got {printable(text)!r}, allowed are {', '.join(self.words)}")
        return () if alone == ["none"] else tuple(dict.fromkeys(parts))


class BlockSize(Value):
    """A number of weights that share a scale; None for auto."""

    name = "block size"
    words = ("auto", "32", "64", "128")

    def read(self, text: str) -> int | None:
        if text == "auto":
            return None
        if text not in self.words:
            raise ValueError(f"got {printable(text)!r}, this version has {' or '.join(self.words)}")
        return int(text)


class InputFile(Value):
    """A file that can be read, or `STDIN` for `-`."""

    name = offered = "file"

    def read(self, text: str) -> Path:
        path = Path(text)
        if path == STDIN:
            return STDIN
        if not path.exists():
            raise ValueError(f"{text} does not exist")
        if path.is_dir():
            raise ValueError(f"{text} is a directory; give a file")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{text} can't be read; check its permissions")
        return path


class TemplateFile(InputFile):
    """A chat template's file, or `none`."""

    words = ("none",)

    def read(self, text: str) -> Any:
        if text == "none":
            return text
        if text == "-":
            raise ValueError("- is no file; give a chat template's, or none")
        path = super().read(text)
        if not path.is_file():  # it is read for the plan, and again for the bundle
            raise ValueError(f"{text} is no file that can be read twice; give one")
        return path


class TextSource(InputFile):
    """A text file, a folder of them at any depth, or `STDIN` for `-`."""

    def read(self, text: str) -> Path:
        path = Path(text)
        if not path.is_dir():
            return super().read(text)
        if is_model(path):
            raise ValueError(f"{text} is a model's directory; give a text, or a folder of texts")
        if not os.access(path, os.R_OK | os.X_OK):
            raise ValueError(f"{text} can't be read; check its permissions")
        return path


class OutputFile(Value):
    """A file to write, or `STDIN` for `-`: refused before any work when it could not be written."""

    name = offered = "file"

    def read(self, text: str) -> Path:
        path = Path(text)
        if path == STDIN:
            return STDIN
        if path.is_dir():
            raise ValueError(f"{text} is a directory; give a file, or - for stdout")
        if not path.parent.is_dir():
            raise ValueError(f"the directory {path.parent} does not exist; create it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{text} can't be written; check its permissions")
        return path


class MemorySize(Value):
    """An amount of memory such as 800MB, 1.5GB or a number of bytes, in bytes."""

    name = "size"

    def __init__(self, nothing: str = "") -> None:
        """nothing: what 0 does where it is allowed, as a clause."""
        self._nothing = nothing

    def read(self, text: str) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
        step = 1024 if found and found[3] else 1000
        amount = float(found[1]) * step ** " kmgt".index(found[2] or " ") if found else 0.0
        if not (1 <= amount < 1e18 or (found and amount == 0 and self._nothing)):
            also = f"; {self._nothing}" if self._nothing else ""
            raise ValueError(f"got {printable(text)!r}; give an amount such as 800MB or 1.5GB{also}")
        return int(amount)


class OneOf(TextChoice):
    """A choice whose refusal names what was got and what this version has."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            allowed = " or ".join(self.choices)
            self.fail(f"got {printable(str(value))!r}, this version has {allowed}", param, ctx)
        return str(value)


class StopString(Value):
    r"""A string with escapes, as bytes: \n \r \t \0 \\ \xNN (a byte) \uNNNN \UNNNNNNNN (a character)."""

    name = "text"

    def read(self, text: str) -> bytes:
        try:
            data = b"".join(map(_unescaped, _PIECES.findall(text)))
        except ValueError as error:
            raise ValueError(f"{error} in {text!r}; a backslash itself is written \\\\") from None
        if not data:
            raise ValueError("is empty; allowed are strings of at least one byte")
        return data


_PIECES = re.compile(r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\(?s:.)?|[^\\]+")
_SHORT = {"n": b"\n", "r": b"\r", "t": b"\t", "0": b"\0", "\\": b"\\", "'": b"'", '"': b'"'}


def _unescaped(piece: str) -> bytes:
    if not piece.startswith("\\"):
        return os.fsencode(piece)
    if piece[1:] in _SHORT:
        return _SHORT[piece[1:]]
    if len(piece) < 4:
        raise ValueError(f"unknown escape {piece}")
    code = int(piece[2:], 16)
    try:
        return bytes([code]) if len(piece) == 4 else chr(code).encode()
    except (ValueError, OverflowError):  # beyond Unicode, or half a surrogate pair
        raise ValueError(f"{piece} is no character") from None


def option(
    *flags: str, help: str, type: Any = bool, metavar: str = "", shown: str = "", of: Any = None, **more: Any
) -> Callable[[F], F]:
    """An option that shows its default, and what a default of None means (`shown`). bool makes it a flag.

    metavar: N for whole numbers and X for others, unless given. of: a class whose field of the option's name
    has the default.
    """
    if of is not None:
        more["default"] = getattr(of, flags[-1].removeprefix("--").replace("-", "_"))
    if type is bool:
        return click.option(*flags, is_flag=True, help=help, **more)
    name = metavar or {int: "N", float: "X"}.get(type)
    default = shown or more.get("default") is not None
    return click.option(*flags, type=type, metavar=name, show_default=default, help=help, **more)


def options(*each: Callable[[Any], Any], title: str = "") -> Callable[[F], F]:
    """Several options as one decorator, in the order in which help shows them, under a title of their own."""

    def wrap(function: F) -> F:
        before = len(_parameters(function))
        for one in reversed(each):
            function = one(function)
        if title:  # options among them that have one keep it
            for added in _parameters(function)[before:]:
                GROUPS.setdefault(added, title)
        return function

    return wrap


def needed(one: Callable[[Any], Any]) -> Callable[[F], F]:
    """An option that the usage line names, though the parser does not ask for it."""

    def wrap(function: F) -> F:
        function = one(function)
        NEEDED.add(_parameters(function)[-1])
        return function

    return wrap


def _parameters(function: Callable[..., Any]) -> list[click.Parameter]:
    found: list[click.Parameter] = getattr(function, "__click_params__", [])
    return found


bundle_argument = click.argument("bundle", type=BundleDirectory(), metavar="BUNDLE")
model_option = option(
    "-m",
    "--model",
    type=BundleDirectory(),
    required=True,
    metavar="BUNDLE",
    help="Bundle directory; or demo, whose bundle is made when there is none.",
)
verify_option = option(
    "--verify", help="Compare the sha256 of whole files; without it, large files are compared by samples."
)
json_option = options(
    option(
        "--json",
        "json_file",
        type=OutputFile(),
        metavar="FILE",
        help="Write one JSON document to FILE; - is stdout, which then carries nothing else.",
    ),
    title="Output",
)
"""Passed as `json_file`."""

draft_options = options(
    option(
        "--draft",
        type=OneOf(DRAFTS),
        default="auto",
        help="Guess bytes ahead and check them together, which is faster and changes no text (but for "
        "near-ties in quantized bundles): by the decoder, the patcher, or what followed earlier in the text; "
        "auto goes by what pays.",
    ),
    option("--draft-length", type=int, shown="as many as pay", help="Guesses at a time, 1 to 32."),
    title="Guessing ahead",
)
"""--draft and --draft-length, as `GenerationOptions` takes them."""

tolerance_options = options(
    option(
        "--rtol",
        type=float,
        shown="1e-4 for fp32, more for others",
        help="Largest difference of stage outputs and logits, as a share of their scale (at least 1); "
        "the mean may be a tenth of it.",
    ),
    option(
        "--atol",
        type=float,
        shown="1e-4 for fp32, more for others",
        help="Largest difference of entropies, in nats.",
    ),
    title="Comparison",
)
"""--rtol and --atol; None leaves them to the bundle's precision."""
