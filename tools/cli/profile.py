"""`blt-edge profile`: what a byte costs, how long it takes, and how near that is to what memory allows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .display import status
from .documents import check_plot, json_line, read_input, shown_name, write_json, write_whole
from .options import DEVICES, DRAFTS, STDIN, InputFile, OneOf, OutputFile, json_option, model_option, verb
from .session import Session

if TYPE_CHECKING:
    from ..profiling.measure import Profile, ProfileOptions

    NumbersType = click.ParamType[tuple[int, ...]]
    WordsType = click.ParamType[tuple[str, ...]]
else:  # generic from click 8.2 on
    NumbersType = WordsType = click.ParamType

__all__ = ["command"]


class Numbers(NumbersType):
    """Whole numbers, with commas between."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"got {value!r}; give a whole number, or several with commas between", param, ctx)


class Words(WordsType):
    """Some of a few words, with commas between."""

    name = "words"

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._one = OneOf(allowed)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The words."""
        if isinstance(value, tuple):
            return value
        return tuple(self._one.convert(part.strip(), param, ctx) for part in str(value).split(","))


@verb("profile")
@model_option
@click.option("--device", type=OneOf(DEVICES), default="auto", show_default=True, help="Where to run.")
@click.option(
    "--threads",
    type=Numbers(),
    multiple=True,
    metavar="N,...",
    show_default="as many as the engine likes",
    help="CPU threads; several values are a sweep, here and below.",
)
@click.option(
    "--prompt-bytes",
    type=Numbers(),
    multiple=True,
    default=["512"],
    metavar="N,...",
    show_default=True,
    help="Bytes of the prompt.",
)
@click.option(
    "--new-bytes",
    type=int,
    default=128,
    show_default=True,
    metavar="N",
    help="Bytes to generate after it, greedily.",
)
@click.option(
    "--draft",
    "drafts",
    type=Words(DRAFTS),
    multiple=True,
    default=["none"],
    metavar="SOURCE,...",
    show_default=True,
    help=f"Where guesses at the next bytes come from: {', '.join(DRAFTS)}.",
)
@click.option(
    "--draft-length",
    type=int,
    metavar="N",
    show_default="as many as pay",
    help="Guesses at a time, 1 to 32.",
)
@click.option(
    "--warmup", type=int, default=1, show_default=True, metavar="N", help="Rounds before those that count."
)
@click.option("--repeat", type=int, default=5, show_default=True, metavar="N", help="Rounds that count.")
@click.option(
    "--text",
    type=InputFile(),
    metavar="FILE",
    show_default="English prose that comes with the package",
    help="Prompts are the beginning of FILE; - is stdin.",
)
@json_option
@click.option(
    "--plot",
    type=OutputFile(),
    metavar="FILE",
    show_default="no picture",
    help="Draw latencies and shares, or speeds of a sweep, into FILE (.png, .svg or .pdf).",
)
@click.option(
    "--trace",
    type=OutputFile(),
    metavar="FILE",
    show_default="no trace",
    help="Write a timeline of the last round for chrome://tracing or Perfetto.",
)
def command(
    session: Session,
    model: Path,
    text: Path | None,
    json_file: Path | None,
    plot: Path | None,
    trace: Path | None,
    **settings: Any,
) -> None:
    """Measure where time goes, and how near it is to what memory allows.

    First what a byte of text must read from memory, and the bytes/s that this machine's read bandwidth,
    measured here and now, allows at most; then prefill, decoding, latencies and time by stage as they were.
    The bundle generates as `generate` does, so sampling and everything on the host counts. The last line of
    stdout is always one JSON document; with --json - it is the only one.
    """
    _check_outputs(json_file, plot, trace)
    options = _options(**settings)
    data = _text(text, session)
    from ..profiling.doubts import doubts
    from ..profiling.measure import profile
    from .profile_tables import show

    with status(session) as say:
        measured = profile(model, data, options, say)
    reasons = doubts(measured)
    document = {**measured.to_dict(), "warnings": reasons}
    if json_file is not None and json_file != STDIN:
        write_json(json_file, document)
    if plot is not None:
        _draw(measured, plot)
    if trace is not None:
        from ..profiling.trace import chrome_trace

        write_json(trace, chrome_trace(measured))
    if json_file == STDIN:
        for reason in reasons:
            session.say(f"warning: {reason}")
    else:
        show(measured, reasons)
        click.echo()
    click.echo(json_line(document))


def _check_outputs(json_file: Path | None, plot: Path | None, trace: Path | None) -> None:
    """Refuse what can't be written before minutes of measuring."""
    if trace == STDIN:
        raise click.UsageError("--trace: got -; give a file, stdout carries the figures")
    files = [path for path in (json_file, plot, trace) if path not in (None, STDIN)]
    if len(set(files)) < len(files):
        raise click.UsageError("--json, --plot and --trace: a file is given twice; give each its own")
    check_plot(plot)


def _options(
    *,
    threads: tuple[tuple[int, ...], ...],
    prompt_bytes: tuple[tuple[int, ...], ...],
    drafts: tuple[tuple[str, ...], ...],
    **single: Any,
) -> ProfileOptions:
    from ..profiling.measure import ProfileOptions

    return ProfileOptions(
        threads=_flat(threads) or (None,),
        prompt_bytes=_flat(prompt_bytes),
        drafts=_flat(drafts),
        **single,
    )


def _flat(values: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """All values once, in the order given."""
    return tuple(dict.fromkeys(value for several in values for value in several))


def _text(path: Path | None, session: Session) -> bytes:
    if path is None:
        from ...calibration.data import bundled_texts

        return bundled_texts()[0].path.read_bytes()
    data = read_input(path, session, "the text")
    if not data:
        raise click.UsageError(f"--text: {shown_name(path)} is empty; there is nothing to take prompts from")
    return data


def _draw(measured: Profile, target: Path) -> None:
    from ..profiling.plot import draw_profile

    kind = target.suffix.lower().lstrip(".")
    write_whole(target, lambda path: draw_profile(measured, path, kind))
