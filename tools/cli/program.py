"""The program: a table of verbs, each imported only when used, and what becomes of errors.

Whatever goes wrong ends as one line on stderr and an exit code: 1 when a check or a run failed, 2 for wrong
usage. Only -v shows a traceback, and only of errors that nobody foresaw.

`blt-edge completion`, and what a shell that was set up with it asks at each Tab.

The scripts and the protocol are click's: the shell runs `blt-edge` with `_BLT_EDGE_COMPLETE` in its
environment. Only the verb that is being typed is imported, and of it nothing that is slow.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..output import Session, crash_line, error_line, foreseen_line, is_terminal, is_usage, usage_line
from .options import FLAGS, OneOf, spread, verb

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem, ShellComplete

__all__ = ["COMPLETION", "SHELLS", "VERBS", "Program", "command", "complete", "program"]

NAME = "blt-edge"

COMPLETION = "_BLT_EDGE_COMPLETE"
"""The environment variable that holds what a shell asks at Tab (`completion`)."""

VERBS = {
    "export": "Turn a checkpoint into a bundle of ONNX graphs, and check it.",
    "validate": "Compare a bundle with its reference; the exit code is the verdict.",
    "quantize": "Write a bundle at lower precision: FP16, INT8, INT4, smaller tables.",
    "build": "Prepare a bundle for a device: runs and loads faster, takes less memory.",
    "generate": "Continue a text, printed as it comes.",
    "chat": "Continue a text together, turn by turn.",
    "serve": "Answer HTTP completions, and show a page.",
    "score": "Measure bits per byte of files.",
    "patches": "Show how a text is cut into patches, and why.",
    "profile": "Measure where time goes, and how near it is to what memory allows.",
    "compare": "Set bundles side by side: size, quality, speed, memory.",
    "inspect": "Show what is in a bundle and how much memory it takes.",
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
        """Import a verb; None when there is no such one."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f".{cmd_name}", __package__).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
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

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run `args` (None = sys.argv) and exit; see the module for exit codes."""
        arguments = list(sys.argv[1:] if args is None else args)
        session = Session()
        code = _run(self, arguments, session)
        sys.exit(code if _flushed() else 1)


def _run(group: Program, arguments: list[str], session: Session) -> int:
    _prepare_streams()
    try:
        asked = os.environ.get(COMPLETION)
        if asked:
            return complete(group, asked)
        if not arguments:
            with group.make_context(NAME, ["--help"], resilient_parsing=True) as ctx:
                click.echo(group.get_help(ctx), err=True)
            return 2
        with group.make_context(NAME, arguments, obj=session) as ctx:
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
        return _failed(error, session)
    return 0


def _failed(error: Exception, session: Session) -> int:
    line = foreseen_line(error)
    if line is None and session.verbose:
        traceback.print_exc()
    error_line(line or crash_line(error, session.verbose))
    return 2 if is_usage(error) else 1


def _prepare_streams() -> None:
    # A name or a character that the terminal's encoding lacks is no reason to stop.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    # So that cleaning up happens: a progress display hides the cursor.
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


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
      blt-edge generate -m demo-bundle -p "Once upon a time"

    `blt-edge VERB --help` describes a verb and its options.
    """


SHELLS = ("bash", "zsh", "fish")

_INSTALL = {
    "bash": """add to ~/.bashrc: eval "$(blt-edge completion bash)\"""",
    "zsh": """add to ~/.zshrc, after compinit: eval "$(blt-edge completion zsh)\"""",
    "fish": "blt-edge completion fish > ~/.config/fish/completions/blt-edge.fish",
}


@verb("completion")
@click.argument("shell", type=OneOf(SHELLS), metavar="SHELL")
def command(session: Session, shell: str) -> None:
    """Print a script that completes verbs and options in a shell.

    SHELL is bash (4.4 or newer), zsh or fish. A comment at the script's head says how to install it.
    """
    first, *rest = _completer(shell, click.get_current_context().find_root().command).source().splitlines()
    # zsh wants its own word in the first line.
    lines = [first, f"# {_INSTALL[shell]}"] if first.startswith("#") else [f"# {_INSTALL[shell]}", first]
    click.echo("\n".join([*lines, *rest]))
    if is_terminal(sys.stdout):
        session.say(f"to install it: {_INSTALL[shell]}")


def complete(program: click.Command, instruction: str) -> int:
    """Answer a shell on stdout; returns the exit code.

    instruction: what the variable holds, such as "bash_complete". Raises click.UsageError for another one.
    """
    shell, _, question = instruction.partition("_")
    if shell not in SHELLS or question not in ("source", "complete"):
        allowed = " or ".join(f"{name}_source" for name in SHELLS)
        raise click.UsageError(f"{COMPLETION} is {instruction!r}; allowed is {allowed}, or unset it")
    completer = _completer(shell, program)
    # As bytes, so that Windows does not turn the ends of lines into something else.
    click.echo((completer.source() if question == "source" else completer.complete()).encode())
    return 0


def _completer(shell: str, program: click.Command) -> ShellComplete:
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell

    class Completer(kind):  # type: ignore[misc, valid-type]
        """The shell's own, which also knows flags that take several files."""

        def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
            if not incomplete.startswith("-"):
                # The word may be a directory so far and a file in it in the end.
                args = spread([*args, "*"], FLAGS)[:-1]
            found: list[CompletionItem] = super().get_completions(args, incomplete)
            return found

    return Completer(program, {}, "blt-edge", COMPLETION)
