"""Options that take several files after one flag: `--text a.txt b.txt`, as the shell expands `*.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from .options import VerbCommand

__all__ = ["FLAGS", "SeveralFilesCommand", "spread"]

FLAGS = ("--text", "--calibration")
"""The options that take several files."""


class SeveralFilesCommand(VerbCommand):
    """A verb with such options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse `args` with each file under a flag of its own."""
        return super().parse_args(ctx, spread(args, FLAGS))


def spread(args: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`args` with the flag repeated before every file but the first that follows it.

    What follows belongs to the flag up to the next option or directory: bundles are directories.
    """
    result: list[str] = []
    flag, taken = "", 0
    for at, arg in enumerate(args):
        if arg == "--":
            return [*result, *args[at:]]
        if flag and taken and (arg == "-" or not arg.startswith("-")) and not Path(arg).is_dir():
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
