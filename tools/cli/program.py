"""The program: a table of verbs, each imported only when used, and what becomes of errors.

Whatever goes wrong ends as one line on stderr and an exit code: 1 when a check or a run failed, 2 for wrong
usage. Only -v shows a traceback, and only of errors that nobody foresaw.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ...runtime.errors import OptionError, PromptTooLongError
from ..output import (
    Messages,
    crash_line,
    error_line,
    foreseen_line,
    show_traceback,
    usage_line,
    warning_lines,
)
from . import COMPLETION

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

NAME = "blt-edge"

VERBS = {
    "export": "Turn a checkpoint into a bundle of ONNX graphs, and check it.",
    "validate": "Compare a bundle with its reference; the exit code is the verdict.",
    "quantize": "Write a bundle at lower precision: FP16, INT8, INT4, smaller tables.",
    "build": "Prepare a bundle for a device: runs and loads faster, takes less memory.",
    "generate": "Continue a text, printed as it comes.",
    "chat": "Continue a text together, turn by turn.",
    "serve": "Answer HTTP completions and chats, and show a page.",
    "score": "Measure bits per byte of files.",
    "patches": "Show how a text is cut into patches, and why.",
    "profile": "Measure where time goes, and how near it is to what memory allows.",
    "compare": "Set bundles side by side: size, quality, speed, memory.",
    "inspect": "Show what is in a bundle and how much memory it takes, or what a saved state is.",
    "completion": "Print a script that completes verbs and options in a shell.",
    "doctor": "Show versions, devices, and which engines really run here.",
}
"""Verbs and their help, so that `--help` imports none of them: `command` of the module of that name."""


class Program(click.Group):
    """The command group: verbs are looked up in `VERBS` and imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order one meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f".{cmd_name}", __package__).command
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`help` and `help VERB` are `--help` and `VERB --help`."""
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs and options that begin so, without importing a verb."""
        from click.shell_completion import CompletionItem

        verbs = [
            CompletionItem(name, help=told) for name, told in VERBS.items() if name.startswith(incomplete)
        ]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb that `args` begin with; an unknown one is refused with the nearest names."""
        name = args[0]
        if name.startswith("-") or name in VERBS or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        from difflib import get_close_matches

        near = get_close_matches(name, VERBS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise click.UsageError(f"there is no verb {name!r}; {hint}", ctx)

    def main(self, args: Sequence[str] | None = None, *ignored: Any, **unused: Any) -> NoReturn:
        """Run `args` (None = sys.argv) and exit; see the module for exit codes. Nothing else is heeded."""
        with warning_lines():
            code = _run(self, list(sys.argv[1:] if args is None else args), Messages())
        sys.exit(code if _flushed() else 1)


def _run(group: Program, arguments: list[str], messages: Messages) -> int:
    # What is printed is UTF-8, as documented, whatever the locale says; a name that is not keeps its bytes.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    if hasattr(sys.stderr, "reconfigure"):
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    # So that cleaning up happens: a progress display hides the cursor.
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        asked = os.environ.get(COMPLETION)
        if asked:
            from .completion import complete  # brings the types of all options

            return complete(group, asked)
        if not arguments:
            with group.make_context(NAME, ["--help"], resilient_parsing=True) as ctx:
                click.echo(group.get_help(ctx), err=True)
            return 2
        with group.make_context(NAME, arguments, obj=messages) as ctx:
            group.invoke(ctx)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.UsageError as error:
        error_line(usage_line(error))
        return 2
    except click.ClickException as error:
        error_line(error.format_message())
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        error_line("interrupted", prefix="")
        return 1
    except BrokenPipeError:
        # Whoever read our output has enough of it.
        return 1
    except Exception as error:
        line = foreseen_line(error)
        if line is None and messages.verbose:
            show_traceback(error)
        error_line(line or crash_line(error, messages.verbose))
        return 2 if isinstance(error, (OptionError, PromptTooLongError)) else 1
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _flushed() -> bool:
    """Whether all output could be written; if not, the interpreter must not try again at its end."""
    if sys.stdout is None:
        return True
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            error_line(f"stdout: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


@click.group(
    NAME,
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    options_metavar="",
    subcommand_metavar="VERB ...",
)
@click.version_option(None, "--version", package_name=NAME, message="%(prog)s %(version)s")
def program() -> None:
    """Byte Latent Transformers on edge devices: export a checkpoint to a bundle of ONNX graphs, check it, and
    generate and score text from it.

    \b
      blt-edge export demo -o demo-bundle
      blt-edge generate -m demo-bundle -p "Once upon a time" --temperature 0.7 --seed 7

    `blt-edge help VERB` describes a verb and its options.
    """
