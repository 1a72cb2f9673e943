"""Write docs/cli.md: every verb of `blt-edge` with its help, arguments, options and defaults, off the parser.

    python -m blt_edge.tools.docs

Run it whenever a verb or an option changes; a test compares the page with the parser.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from .cli.program import NAME, VERBS, program
from .cli.verbs import VerbCommand, usage_pieces

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"

_HEAD = """\
# Command line

<!-- Written by `python -m blt_edge.tools.docs`; change the verbs, not this page. -->

{about}

Verbs: {verbs}.

The result goes to stdout; progress, figures and errors to stderr. In a pipe both are plain text. An error is
one line. The exit code is 0 when all went well, 1 when a check or a run failed or was interrupted, and 2 for
wrong usage. Every verb also takes:

{common}
"""
_TAIL = """\
## With Optimum

Where Hugging Face's Optimum is installed (`pip install '.[optimum]'` in the clone), its command line exports,
too: with the same options, checks and exit codes as `blt-edge export`, and the checkpoint as `-m`.

```console
$ optimum-cli export blt -m demo optimum-bundle --precision int4
```
"""
_COMMON = ("verbose", "quiet")


def page() -> str:
    context = click.Context(program, info_name=NAME)
    commands = [command for verb in VERBS if (command := program.get_command(context, verb))]
    common = [option for option in commands[0].params if option.name in _COMMON]
    head = _HEAD.format(
        about=_prose(program.help or ""),
        verbs=", ".join(f"[{verb}](#{verb})" for verb in VERBS),
        common="\n".join(_table(common)),
    )
    return "\n".join([head, *map(_section, commands), _TAIL])


def _section(command: click.Command) -> str:
    options = [one for one in command.params if isinstance(one, click.Option) and one.name not in _COMMON]
    usage = " ".join([NAME, str(command.name), *usage_pieces(command)])
    lines = [f"## {command.name}", "", "```text", usage, "```", "", _prose(command.help or ""), ""]
    if options:
        lines += [*_table(options), ""]
    assert isinstance(command, VerbCommand)
    examples = [f"{NAME} {command.name} {example}".rstrip() for example in command.examples]
    return "\n".join([*lines, "```text", *examples, "```", ""] if examples else lines)


def _table(options: Sequence[click.Parameter]) -> Iterator[str]:
    yield "| option | default | |"
    yield "|---|---|---|"
    for option in options:
        assert isinstance(option, click.Option)
        flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        metavar = f" {_cell(option.metavar)}" if option.metavar and not option.is_flag else ""
        yield f"| {flags}{metavar} | {_default(option)} | {_told(option)} |"


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return _cell(option.show_default)
    return f"`{option.default}`" if option.show_default and not option.is_flag else ""


def _told(option: click.Option) -> str:
    kind, text = option.type, _cell(option.help or "")
    if isinstance(kind, click.Choice):
        text += f" One of {', '.join(f'`{choice}`' for choice in kind.choices)}."
    elif isinstance(kind, (click.IntRange, click.FloatRange)):
        low = "" if kind.min is None else f"{'more than' if kind.min_open else 'at least'} {kind.min:g}"
        high = "" if kind.max is None else f"{'less than' if kind.max_open else 'at most'} {kind.max:g}"
        text += f" Allowed: {', '.join(filter(None, (low, high)))}."
    if option.envvar and option.show_envvar:
        text += f" Also as `{option.envvar}` in the environment."
    return text


def _cell(text: str) -> str:
    """A help text inside a table: what Markdown would take for its own is escaped, but not inside code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    escaped = [part if part.startswith("`") else re.sub(r"([\\<>*_\[\]])", r"\\\1", part) for part in parts]
    return _flags_as_code("".join(escaped)).replace("|", "\\|")


def _prose(text: str) -> str:
    """A verb's help: paragraphs, and blocks after \\b as they are."""
    result = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.splitlines()
        if lines and lines[0] == "\b":
            result.append("\n".join(["```text", *(line.strip() for line in lines[1:]), "```"]))
        else:
            result.append(_flags_as_code(paragraph.replace("<", "\\<")))
    return "\n\n".join(result)


def _flags_as_code(text: str) -> str:
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)(?![\w`])", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
