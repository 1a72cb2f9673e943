"""How the command line of a verb is read, and how its help is written.

An option for several files takes them after one flag: `--text a.txt b.txt`, as the shell expands `*.txt`. Any
other is given once. What stands for a bundle that has to be made first, is made before the verb runs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.errors import OptionError
from ...runtime.names import MANIFEST_NAME
from ..output import Messages, flagged, option_name

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

FLAGS = ("--text", "--calibration")
"""The options that take several files, in verbs where they do."""

GROUPS: dict[click.Parameter, str] = {}
"""Titles of the groups that options stand under in help; the others come first, without one."""


NEEDED: set[click.Parameter] = set()
"""Options that a usage line names, though a verb can do without them."""


class DemoBundle:
    """Stands for the demo's bundle, which is made, if it has to be, right before the verb runs."""


class VerbCommand(click.Command):
    """A verb: an option that the runtime refuses is wrong usage, named as the user typed it."""

    examples: tuple[str, ...] = ()
    """Command lines, without the program's name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse `args`, each of several files under a flag of its own; every error knows the verb."""
        flags = {flag for one in self.params if getattr(one, "multiple", False) for flag in one.opts}
        args = spread(args, flags.intersection(FLAGS))
        try:
            if not ctx.resilient_parsing:
                self._refuse_repeated(ctx, args)
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def _refuse_repeated(self, ctx: click.Context, args: list[str]) -> None:
        """Of two values the last would win, and nobody be told."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        seen: set[click.Parameter] = set()
        for one in order:
            if isinstance(one, click.Option) and not one.multiple and (not one.is_flag or one.secondary_opts):
                if one in seen:
                    raise click.UsageError(f"{option_name(one)} is given twice; give it once")
                seen.add(one)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What a shell may offer where no argument is open: options, also before their first dash."""
        return super().shell_complete(ctx, incomplete or "-")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            for name, value in ctx.params.items():
                ctx.params[name] = _made(value, ctx)
            return super().invoke(ctx)
        except OptionError as error:
            raise click.BadParameter(flagged(str(error), self), ctx) from error

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return usage_pieces(self)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options under their groups' titles: the verb's own first, those of every verb last."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for one in self.get_params(ctx):
            record = one.get_help_record(ctx)
            # click 8.5 has empty rows for arguments.
            if record is not None and isinstance(one, click.Option):
                common = one.name in ("verbose", "quiet") or "--help" in one.opts
                groups.setdefault(GROUPS.get(one, "Every verb" if common else "Options"), []).append(record)
        groups["Every verb"] = groups.pop("Every verb")
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"  blt-edge {self.name} {example}".rstrip() + "\n")


def usage_pieces(command: click.Command) -> list[str]:
    """What has to be given, then that there are options, then the arguments."""
    options = [one for one in command.params if isinstance(one, click.Option)]
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    needed = [f"{one.opts[0]} {one.metavar}" for one in options if one.required or one in NEEDED]
    return [*needed, "[OPTIONS]", *(one.metavar or option_name(one) for one in arguments)]


def _made(value: Any, ctx: click.Context) -> Any:
    """The value, with a bundle in the place of what there is none of yet."""
    if isinstance(value, tuple):
        return tuple(_made(one, ctx) for one in value)
    if not isinstance(value, DemoBundle):
        return value
    from .demo import demo_bundle  # needs what exporting needs

    return demo_bundle(ctx.find_object(Messages) or Messages())


def is_model(path: Path) -> bool:
    """Whether a path is the directory of a bundle or of a checkpoint: no folder of texts."""
    return any(os.path.lexists(path / name) for name in (MANIFEST_NAME, "config.json", "params.json"))


def spread(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """`args` with the flag repeated before every file but the first that follows it.

    What follows belongs to the flag up to the next option, bundle or checkpoint.
    """
    result: list[str] = []
    flag, taken = "", 0
    for at, arg in enumerate(args):
        if arg == "--":
            return [*result, *args[at:]]
        if flag and taken and (arg == "-" or not arg.startswith("-")) and not is_model(Path(arg)):
            result.append(flag)
        elif flag and taken:
            flag = ""
        if flag:
            taken += 1
        elif arg in flags:
            flag, taken = arg, 0
        elif arg.partition("=")[0] in flags:
            flag, taken = arg.partition("=")[0], 1
        result.append(arg)
    return result
