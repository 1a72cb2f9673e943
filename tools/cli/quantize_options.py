"""Options of the verbs that make a bundle of lower precision: `quantize` and `export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ...runtime.names import CALIBRATION_METHODS, SEARCHES
from ..output import Session
from .options import STDIN, InputFile, OneOf

if TYPE_CHECKING:
    from ...export.quantize import QuantizationOptions

__all__ = ["Integers", "integer_options", "note_unused"]

F = TypeVar("F", bound=Callable[..., Any])

_FOR = {
    "block_size": ("int8w", "int4"),
    "search": ("int8", "int8w", "int4"),
    **dict.fromkeys(("calibration", "calibration_method", "windows", "smooth", "seed"), ("int8",)),
}
"""Precisions of a stage for which an option says something."""


@dataclass(frozen=True)
class Integers:
    """What the user said about how weights and activations become integers."""

    block_size: int
    search: str
    calibration: tuple[Path, ...]
    calibration_method: str
    windows: int | None
    smooth: float | None
    seed: int

    def options(self) -> QuantizationOptions:
        """As the library takes them; what was not given keeps the library's own default."""
        from ...export.quantize import QuantizationOptions

        if STDIN in self.calibration:
            raise click.UsageError("--calibration: stdin can't be read in windows; give files")
        given: dict[str, Any] = {} if self.windows is None else {"windows": self.windows}
        return QuantizationOptions(
            block_size=self.block_size,
            search=self.search,
            texts=self.calibration or None,
            method=self.calibration_method,
            seed=self.seed,
            smooth=self.smooth,
            **given,
        )


def integer_options(function: F) -> F:
    """--block-size, --search, --calibration, --calibration-method, --windows, --smooth and --seed."""
    options = [
        click.option(
            "--block-size",
            type=int,
            default=32,
            show_default=True,
            metavar="N",
            help="Weights that share a scale in int8w and int4 stages: 32, 64 or 128.",
        ),
        click.option(
            "--search",
            type=OneOf(SEARCHES),
            default="mse",
            show_default=True,
            help="How weight scales are found: by squared error, or rounding to nearest.",
        ),
        click.option(
            "--calibration",
            type=InputFile(),
            multiple=True,
            metavar="FILE...",
            show_default="English and multilingual text that comes with the package",
            help="Texts that ranges of int8 activations are collected on.",
        ),
        click.option(
            "--calibration-method",
            type=OneOf(CALIBRATION_METHODS),
            default="mse",
            show_default=True,
            help="How a range is chosen from what was seen.",
        ),
        click.option(
            "--windows",
            type=int,
            metavar="N",
            show_default="enough for every language of the bundled text",
            help="Windows of the calibration texts that are read.",
        ),
        click.option(
            "--smooth",
            type=float,
            metavar="X",
            show_default="off",
            help="Move the ranges of int8 activations into the weights before, 0 to 1 (SmoothQuant's alpha).",
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, metavar="N", help="What chooses the windows."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def note_unused(session: Session, precisions: Mapping[str, str]) -> None:
    """Name the options above that were given although no stage has a precision that they are for."""
    context = click.get_current_context()
    for option in context.command.params:
        needed = _FOR.get(str(option.name), ())
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and needed and not set(needed) & set(precisions.values()):
            session.note(f"note: {option.opts[0]} changes nothing: no stage is {' or '.join(needed)}")
