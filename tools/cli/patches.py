"""`blt-edge patches`: how a text is cut into patches, and why, in colours, pictures, pages and tables."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.files import write_whole
from ...runtime.names import PATCHING_MODES
from ..output import Session, is_terminal, printable, status
from .documents import check_plot, read_input, write_json
from .model_options import EngineOptions, engine_options, load_model
from .options import STDIN, InputFile, OneOf, OutputFile, json_option, model_option, verb

if TYPE_CHECKING:
    from rich.console import Console

    from ...runtime.patching import PatchingRule
    from ..patch_view.view import PatchView

__all__ = ["command"]


@verb("patches")
@model_option
@click.argument("text", required=False, metavar="[TEXT]")
@click.option(
    "--prompt-file",
    type=InputFile(),
    metavar="FILE",
    help="Show this file's bytes, exactly as they are (a last newline included).",
)
@click.option(
    "--mode",
    type=OneOf(PATCHING_MODES),
    show_default="the bundle's",
    help="What patches go by: the patcher's entropy, spaces, a fixed size, or none (each byte is one).",
)
@click.option(
    "--threshold",
    type=float,
    metavar="X",
    show_default="the bundle's",
    help="Mode entropy: start a patch where entropy is over X nats.",
)
@click.option(
    "--threshold-add",
    type=float,
    metavar="X",
    show_default="the bundle's",
    help="Mode entropy: only where it also rises by more than X nats; 0 turns it off.",
)
@click.option(
    "--monotonic/--no-monotonic",
    default=None,
    show_default="the bundle's",
    help="Mode entropy: start a patch where entropy rises by more than --threshold, however high it is.",
)
@click.option(
    "--patch-size", type=int, metavar="N", show_default="the bundle's", help="Mode static: bytes of a patch."
)
@click.option(
    "--max-patch-length",
    type=int,
    metavar="N",
    show_default="the bundle's",
    help="Any mode: start a patch after N bytes at the latest; 0 turns it off.",
)
@click.option(
    "--plot",
    type=OutputFile(),
    metavar="FILE",
    show_default="no picture",
    help="Draw entropy, threshold and patch starts over the bytes into FILE (.png, .svg or .pdf).",
)
@click.option(
    "--html",
    "html_file",
    type=OutputFile(),
    metavar="FILE",
    show_default="no page",
    help="Write one self-contained page to FILE, where each byte can be looked at; - is stdout.",
)
@json_option
@click.option(
    "--csv",
    "csv_file",
    type=OutputFile(),
    metavar="FILE",
    show_default="no table",
    help="Write a table of one row a byte to FILE; - is stdout.",
)
@engine_options
def command(
    session: Session,
    model: Path,
    text: str | None,
    prompt_file: Path | None,
    plot: Path | None,
    html_file: Path | None,
    json_file: Path | None,
    csv_file: Path | None,
    engine: EngineOptions,
    **changes: Any,
) -> None:
    """Show how a text is cut into patches, and why.

    TEXT may be - for stdin. On a terminal colours change where a patch starts, and are the stronger the
    higher the entropy; in a pipe | stands before each patch. What can't be seen is shown as a sign or an
    escape, and characters are whole, even if a patch starts inside one. Figures follow on stderr.

    Only the patcher reads the text, once, from BOS; a text that needs more positions than the model has is
    refused, as windows of it would have other patches. BOS is a patch of its own and shown nowhere: positions
    count the text's bytes from 0, patches from 1. --mode and what follows it try another rule than the
    bundle's, which stays as it is.
    """
    from ...runtime.manifest import load_manifest

    outputs = {"--plot": plot, "--html": html_file, "--json": json_file, "--csv": csv_file}
    _check_outputs(outputs)
    rule = _rule(load_manifest(model).patching, **changes)
    data = _text(session, text, prompt_file)
    loaded = load_model(session, model, engine, positions=1 + len(data))
    from ..patch_view.view import look

    with _slow(session, f"reading {len(data):,} bytes", len(data) > 1000):
        view = look(loaded, data, rule)
    if plot is not None:
        with _slow(session, f"drawing {plot}", len(data) > 1000):
            _draw(view, model, plot)
    if html_file is not None:
        from ..patch_view.page import html_page

        _write_text(html_file, html_page(view, model.resolve().name))
    if csv_file is not None:
        from ..patch_view.tables import csv_text

        _write_text(csv_file, csv_text(view))
    if json_file is not None:
        write_json(json_file, _document(view, model, loaded.manifest.source.name, loaded.manifest.patching))
    if STDIN not in outputs.values():
        _show(view)
    if not session.quiet:
        _figures(session, view, shown=STDIN not in outputs.values())


# 1. What was asked for.


def _check_outputs(outputs: dict[str, Path | None]) -> None:
    """Refuse what can't be written before anything is read."""
    given = [path for path in outputs.values() if path is not None]
    if len(set(given)) < len(given):
        raise click.UsageError(f"{', '.join(outputs)}: a file is given twice; give each its own")
    check_plot(outputs["--plot"])


def _text(session: Session, text: str | None, prompt_file: Path | None) -> bytes:
    if text is not None and prompt_file is not None:
        raise click.UsageError("TEXT and --prompt-file are both given; give one of them")
    if text is None and prompt_file is None:
        raise click.UsageError("TEXT is missing; give a text, - for stdin, or --prompt-file FILE")
    if text is not None and text != "-":
        data, name = os.fsencode(text), "TEXT"
        if len(data) < 256 and Path(text).is_file():
            told = printable(text)
            session.say(f"note: this shows the name itself; --prompt-file {told} shows what is in the file")
    else:
        data = read_input(prompt_file or STDIN, session, "the text")
        name = "TEXT: stdin" if prompt_file in (None, STDIN) else f"--prompt-file: {prompt_file}"
    if not data:
        raise click.UsageError(f"{name} is empty; give at least one byte")
    return data


def _rule(
    own: PatchingRule,
    *,
    mode: str | None,
    threshold: float | None,
    threshold_add: float | None,
    monotonic: bool | None,
    patch_size: int | None,
    max_patch_length: int | None,
) -> PatchingRule:
    """The bundle's rule with what is given in its place; what would have no effect is refused."""
    from ...runtime.errors import OptionError

    used = mode or own.mode
    belongs = {
        "--threshold": (threshold, "entropy"),
        "--threshold-add": (threshold_add, "entropy"),
        "--monotonic": (monotonic, "entropy"),
        "--patch-size": (patch_size, "static"),
    }
    for flag, (value, needed) in belongs.items():
        if value is not None and used != needed:
            raise click.UsageError(f"{flag} has no effect in mode {used}; add --mode {needed}, or omit it")
    rising = own.monotonic if monotonic is None else monotonic
    if threshold_add and rising:
        raise click.UsageError("--threshold-add has no effect in a monotonic rule; add --no-monotonic")
    changes = {
        "mode": mode,
        "threshold": threshold,
        "threshold_add": threshold_add,
        "monotonic": monotonic,
        "patch_size": patch_size,
        "max_patch_length": max_patch_length,
    }
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if max_patch_length == 0:
        given["max_patch_length"] = None
    try:
        return replace(own, **given)
    except OptionError as error:
        # The option's name in front, as `VerbCommand` looks for it.
        raise OptionError(str(error).removeprefix("patching ")) from error


# 2. What is shown.


def _slow(session: Session, what: str, is_slow: bool) -> AbstractContextManager[object]:
    """Says what is being done where somebody may wait for it."""
    return status(session, what) if is_slow and is_terminal(sys.stderr) else nullcontext()


def _draw(view: PatchView, bundle: Path, plot: Path) -> None:
    from ..patch_view.plot import draw_patches

    kind = plot.suffix.lower().lstrip(".")
    write_whole(plot, lambda path: draw_patches(view, path, kind, bundle.resolve().name))


def _write_text(target: Path, text: str) -> None:
    if target != STDIN:
        write_whole(target, lambda path: path.write_bytes(text.encode()))
    elif sys.stdout is not None:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())


def _document(view: PatchView, bundle: Path, source: str, own: PatchingRule) -> dict[str, Any]:
    from ..patch_view.tables import patch_document

    return {"model": str(bundle), "source": source, "bundle_rule": asdict(own), **patch_document(view)}


def _show(view: PatchView) -> None:
    """The text on stdout: in colours where 256 of them can be seen, else with marks."""
    from ..patch_view import terminal

    out = sys.stdout
    if out is None:
        return
    encoding = out.encoding or "utf-8"
    marks = terminal.choose_marks(view.data, encoding)
    if not is_terminal(out):
        out.writelines(line + "\n" for line in terminal.marked_lines(view, marks, encoding=encoding))
        return
    from rich.console import Console

    console = Console(file=out, highlight=False)
    if _has_colours(console):
        for line in terminal.coloured_lines(view, console.width):
            console.print(line, crop=False, overflow="ignore", no_wrap=True)
    else:
        out.writelines(line + "\n" for line in terminal.marked_lines(view, marks, console.width, encoding))


def _figures(session: Session, view: PatchView, shown: bool) -> None:
    """On stderr: what the colours or marks mean, when the text was shown, and what was counted."""
    from ..patch_view import terminal
    from ..patch_view.tables import summarize

    if shown:
        _legend(session, view)
    summary = summarize(view)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    for line in [*terminal.figures(view, summary), *terminal.histogram(summary, encoding=encoding)]:
        session.say(line)


def _legend(session: Session, view: PatchView) -> None:
    from rich.console import Console

    from ..patch_view import terminal

    if is_terminal(sys.stdout) and _has_colours(Console(file=sys.stdout)):
        if sys.stderr is not None:
            Console(stderr=True, highlight=False).print(terminal.coloured_legend(view))
        return
    marks = terminal.choose_marks(view.data, getattr(sys.stdout, "encoding", None) or "utf-8")
    inner = any(map(view.inner_starts, view.pieces))
    behind = f", {marks.inner} behind a character in which one starts" if inner else ""
    session.say(f"{marks.start} stands before each patch{behind}")


def _has_colours(console: Console) -> bool:
    """Whether shades can be told apart there."""
    return not console.no_color and console.color_system in ("256", "truecolor")
