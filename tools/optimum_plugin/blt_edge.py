"""`optimum-cli export blt`: blt-edge's export as a command of Hugging Face's Optimum.

Installed as a module of the namespace `optimum.commands.register`, where optimum-cli looks for commands each
time it starts (a folder that must have no `__init__.py`). Options are read off `blt-edge export` and handed
back to it as typed, so the two can't drift: values, errors and exit codes are those of blt-edge.
"""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from typing import Any, NoReturn

import click
from blt_edge.tools.cli.export import command
from blt_edge.tools.cli.program import VERBS, program
from blt_edge.tools.output import error_line
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

OPTIONS = [parameter for parameter in command.params if isinstance(parameter, click.Option)]

_MODEL_HELP = "A checkpoint's folder, a hub id, or demo, the small checkpoint that comes with blt-edge."


class BltExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """The command as optimum-cli drives it: `parse_args` at every start, `run` when it is meant."""

    COMMAND = CommandInfo(
        name="blt", help="Export a Byte Latent Transformer to ONNX graphs for edge devices (blt-edge)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Give the parser `-m/--model`, an output, and every option of `blt-edge export`."""
        parser.description = f"{VERBS['export']} The same as `blt-edge export`."
        parser.allow_abbrev = False

        def refuse(message: str) -> NoReturn:
            error_line(f"{message}; see optimum-cli export blt --help")
            raise SystemExit(2)

        setattr(parser, "error", refuse)  # noqa: B010 - a method, to mypy
        parser.add_argument("-m", "--model", metavar="MODEL", help=_MODEL_HELP, action=_Once)
        parser.add_argument("positional_output", nargs="?", metavar="DIR", help="The same as --output.")
        for option in OPTIONS:
            parser.add_argument(*option.opts, **_parsed_as(option))

    def run(self) -> NoReturn:
        given: Namespace = self.args
        if given.model is None:
            self.parser.error("--model is missing")
        if given.positional_output is not None:
            if given.output is not None:
                self.parser.error("the output is given twice")
            given.output = given.positional_output
        program.main(arguments(given))


def arguments(given: Namespace) -> list[str]:
    """What `blt-edge` is called with: the options that were given, as one word each, then the model."""
    words = ["export"]
    for option in OPTIONS:
        flag, value = option.opts[-1], getattr(given, str(option.name))
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [f"{flag}={item}" for item in value]
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return [*words, "--", given.model]


def _parsed_as(option: click.Option) -> dict[str, Any]:
    """How argparse reads a click option: as text, since its values are checked by whom they are for."""
    told = (option.help or "").replace("%", "%%")
    if option.is_flag:
        return {"dest": option.name, "action": "store_true", "help": told}
    if option.show_default:
        default = option.show_default if isinstance(option.show_default, str) else option.default
        told += f"  [default: {default}]".replace("%", "%%")
    # Brackets in a metavar make argparse of Python 3.10 stumble over its own usage line.
    choices = option.type.choices if isinstance(option.type, click.Choice) else ()
    metavar = (option.metavar or "{" + ",".join(choices) + "}").rstrip(".")
    several = {"action": "extend", "nargs": "+"} if option.multiple else {}
    return {"dest": option.name, "metavar": metavar, "help": told, **(several or {"action": _Once})}


class _Once(Action):
    """A value that is given once: of two the last would win, and nobody be told."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, flag: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{flag} is given twice; give it once")
        setattr(namespace, self.dest, values)


REGISTER_COMMANDS = [(BltExportCommand, ExportCommand)]
"""What optimum-cli looks for: commands, each with the one it belongs under."""
