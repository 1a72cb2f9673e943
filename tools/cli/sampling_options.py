"""The options of whatever generates text: the fields of `GenerationOptions` that are asked of a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .options import StopString, draft_options

__all__ = ["sampling_options"]

F = TypeVar("F", bound=Callable[..., Any])


def sampling_options(function: F) -> F:
    """-n, --temperature and so on, as `GenerationOptions` takes them; passed by its fields' names."""
    options = [
        click.option(
            "-n",
            "--max-new-bytes",
            "--max-new-tokens",
            "max_new_bytes",
            type=int,
            default=256,
            show_default=True,
            metavar="N",
            help="Generate at most this many bytes.",
        ),
        click.option(
            "--temperature",
            "--temp",
            "temperature",
            type=float,
            default=0.0,
            show_default=True,
            metavar="X",
            help="Divide logits by it; 0 is greedy: the most likely byte, and the filters below don't "
            "matter.",
        ),
        click.option(
            "--top-k",
            type=int,
            default=0,
            show_default=True,
            metavar="N",
            help="Keep the N most likely bytes; 0 turns it off.",
        ),
        click.option(
            "--top-p",
            type=float,
            default=1.0,
            show_default=True,
            metavar="X",
            help="Keep the most likely bytes whose probabilities sum to X; 1 turns it off.",
        ),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            show_default=True,
            metavar="X",
            help="Keep bytes at least X times as likely as the most likely one; 0 turns it off.",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            default=1.0,
            show_default=True,
            metavar="X",
            help="Make bytes that are in the text already less likely; 1 turns it off.",
        ),
        click.option(
            "--seed",
            type=int,
            metavar="N",
            show_default="another one each time",
            help="Seed of the random numbers.",
        ),
        click.option(
            "--stop",
            type=StopString(),
            multiple=True,
            metavar="TEXT",
            help=r"End before this text; may be given several times. Escapes: \n \r \t \0 \\ \xNN \uNNNN.",
        ),
        draft_options,
    ]
    for option in reversed(options):
        function = option(function)
    return function
