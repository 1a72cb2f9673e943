"""Options that say what the new text has to fit: one constraint, and whether it has to be UTF-8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import printable
from .options import STDIN, InputFile, StopString, Value, option, options

if TYPE_CHECKING:
    from ...runtime.constraint import Constraint


class _FileOrSchema(Value):
    """A JSON schema, as it stands or in a file."""

    name = "file or text"
    offered = "file"

    def read(self, text: str) -> Path | str:
        return text if text.lstrip().startswith("{") else InputFile().read(text)


constraint_options = options(
    option(
        "--json-schema",
        type=_FileOrSchema(),
        metavar="FILE|TEXT",
        shown="none",
        help="Make JSON that fits this schema: a file, or the schema itself, which begins with {.",
    ),
    option("--json-object", help="Make a JSON object, of whatever keys and values."),
    option(
        "--regex",
        metavar="PATTERN",
        type=str,
        shown="none",
        help="Make a text that the pattern matches as a whole (Rust's syntax: no look-around).",
    ),
    option(
        "--grammar",
        type=InputFile(),
        metavar="FILE",
        shown="none",
        help="Make a text of this grammar, in llguidance's Lark (start: ...) or llama.cpp's GBNF (root ::=).",
    ),
    option(
        "--choice",
        type=StopString(),
        multiple=True,
        metavar="TEXT",
        shown="none",
        help="Make one of some texts: give it for each of them. Escapes as in --stop. Needs no library.",
    ),
    option("--utf8", help="Make valid UTF-8 only. Needs no library; the other kinds do so anyway."),
    title="Text that must fit",
)
"""Passed by these names; `take_constraint` makes one of them."""

_FLAGS = ("json_schema", "json_object", "regex", "grammar", "choice")


def take_constraint(asked: dict[str, Any]) -> Constraint | None:
    """Take the `constraint_options` but --utf8 out of `asked`: the constraint that they ask for.

    Raises UsageError for more than one, OptionError for one that is plainly wrong, ClickException for a file
    that can't be read.
    """
    values = {name: asked.pop(name, None) for name in _FLAGS}
    given = [name for name in _FLAGS if values[name] not in (None, False, ())]
    if not given:
        return None
    if len(given) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise click.UsageError(f"{flags} are given; a text can fit one of them only")
    from ...runtime.constraint import Constraint

    name, value = given[0], values[given[0]]
    if name == "json_object":
        return Constraint.json_object()
    if name == "choice":
        return Constraint.choice(value)
    if name == "regex":
        return Constraint.regex(value)
    make = Constraint.json_schema if name == "json_schema" else Constraint.grammar
    return make(value if isinstance(value, str) else _content(value))


def _content(path: Path) -> str:
    if path == STDIN:
        raise click.UsageError("a schema or grammar is not read from stdin; give a file")
    try:
        with path.open("rb") as file:
            data = file.read(1 << 20)  # more is refused as too long, whatever it is
    except OSError as error:
        raise click.ClickException(f"{printable(str(path))} can't be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise click.ClickException(f"{printable(str(path))} is no text in UTF-8; give one that is") from None
