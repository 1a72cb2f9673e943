"""`blt-edge completion`, and what a shell that was set up with it asks at each Tab.

The scripts and the protocol are click's: the shell runs `blt-edge` with `_BLT_EDGE_COMPLETE` in its
environment. Only the verb that is being typed is imported, and of it nothing that is slow.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ..output import Messages, is_terminal
from . import COMPLETION
from .options import OneOf, verb
from .verbs import FLAGS, spread

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem, ShellComplete

SHELLS = ("bash", "zsh", "fish")

_INSTALL = {
    "bash": """add to ~/.bashrc: eval "$(blt-edge completion bash)\"""",
    "zsh": """add to ~/.zshrc, after compinit: eval "$(blt-edge completion zsh)\"""",
    "fish": "blt-edge completion fish > ~/.config/fish/completions/blt-edge.fish",
}


@verb("completion", "bash", "fish > ~/.config/fish/completions/blt-edge.fish")
@click.argument("shell", type=OneOf(SHELLS), metavar="SHELL")
def command(messages: Messages, shell: str) -> None:
    """Print a script that completes verbs and options in a shell.

    SHELL is bash (4.4 or newer), zsh or fish. A comment at the script's head says how to install it.
    """
    first, *rest = _completer(shell, click.get_current_context().find_root().command).source().splitlines()
    # zsh wants its own word in the first line.
    lines = [first, f"# {_INSTALL[shell]}"] if first.startswith("#") else [f"# {_INSTALL[shell]}", first]
    click.echo("\n".join([*lines, *rest]))
    if is_terminal(sys.stdout):
        messages.say(f"to install it: {_INSTALL[shell]}")


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
