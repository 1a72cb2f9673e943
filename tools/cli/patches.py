"""`blt-edge patches`: how a text is cut into patches, and why, in colours, pictures, pages and tables."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.files import write_whole
from ...runtime.paths import folder_name
from ..output import Messages, is_terminal, printable, status
from .documents import check_plot, output_option, read_input, write_json, write_text
from .model_options import EngineOptions, engine_options, load_model
from .options import STDIN, InputFile, json_option, model_option, verb
from .rule_options import changed_rule, rule_options

if TYPE_CHECKING:
    from ..patch_view.view import PatchView


@verb(
    "patches",
    '-m demo-bundle "Once upon a time"',
    "-m demo-bundle --prompt-file text.txt --html patches.html",
)
@model_option
@click.argument("text", required=False, metavar="[TEXT]")
@click.option(
    "--prompt-file",
    type=InputFile(),
    metavar="FILE",
    help="Show this file's bytes, exactly as they are (a last newline included).",
)
@rule_options
@output_option(
    "--plot",
    "no picture",
    "Draw entropy, threshold and patch starts over the bytes into FILE (.png, .svg or .pdf).",
)
@output_option(
    "--html",
    "no page",
    "Write one self-contained page to FILE, where each byte can be looked at; - is stdout.",
)
@json_option
@output_option("--csv", "no table", "Write a table of one row a byte to FILE; - is stdout.")
@engine_options
def command(
    messages: Messages,
    model: Path,
    text: str | None,
    prompt_file: Path | None,
    plot: Path | None,
    html: Path | None,
    json_file: Path | None,
    csv: Path | None,
    engine: EngineOptions,
    **changes: Any,
) -> None:
    """Show how a text is cut into patches, and why.

    TEXT may be - for stdin. On a terminal colours change where a patch starts, and are the stronger the
    higher the entropy; in a pipe | stands before each patch. What can't be seen is shown as a sign or an
    escape, and characters are whole, even if a patch starts inside one. Figures follow on stderr.

    Only the patcher reads the text, once, from BOS; one that needs more positions than the model has in
    windows, each from BOS, at whose beginnings a patch begins. BOS is a patch of its own and shown nowhere:
    positions count the text's bytes from 0, patches from 1. --mode and what follows it try another rule than
    the bundle's, which stays as it is; what one costs in bits per byte, `score` says.
    """
    outputs = {"--plot": plot, "--html": html, "--json": json_file, "--csv": csv}
    given = [path for path in outputs.values() if path is not None]
    if len(set(given)) < len(given):
        raise click.UsageError(f"{', '.join(outputs)}: a file is given twice; give each its own")
    check_plot(plot)
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(model)
    rule = changed_rule(manifest.patching, changes)
    data = _text(messages, text, prompt_file)
    loaded = load_model(messages, model, engine, positions=min(1 + len(data), manifest.model.max_positions))
    from ..patch_view.view import csv_text, look, patch_document

    name = folder_name(model)
    with _slow(messages, f"reading {len(data):,} bytes", data):
        view = look(loaded, data, rule)
    if plot is not None:
        from ..patch_view.plot import draw_patches

        kind = plot.suffix.lower().lstrip(".")
        with _slow(messages, f"drawing {plot}", data):
            write_whole(plot, lambda path: draw_patches(view, path, kind, name))
    if html is not None:
        from ..patch_view.page import html_page

        write_text(html, html_page(view, name))
    if csv is not None:
        write_text(csv, csv_text(view))
    if json_file is not None:
        source, own = loaded.manifest.source.name, loaded.manifest.patching
        about = {"model": str(model), "source": source, "bundle_rule": asdict(own)}
        write_json(json_file, {**about, **patch_document(view)})
    if STDIN not in given:
        _show(messages, view)
    _say_figures(messages, view)


def _text(messages: Messages, text: str | None, prompt_file: Path | None) -> bytes:
    if text is not None and prompt_file is not None:
        raise click.UsageError("TEXT and --prompt-file are both given; give one of them")
    if text is None and prompt_file is None:
        raise click.UsageError("TEXT is missing; give a text, - for stdin, or --prompt-file FILE")
    if text is not None and text != "-":
        data, name = os.fsencode(text), "TEXT"
        if len(data) < 256 and Path(text).is_file():
            told = printable(text)
            messages.say(f"note: this shows the name itself; --prompt-file {told} shows what is in the file")
    else:
        data = read_input(prompt_file or STDIN, messages, "the text")
        name = "TEXT: stdin" if prompt_file in (None, STDIN) else f"--prompt-file: {prompt_file}"
    if not data:
        raise click.UsageError(f"{name} is empty; give at least one byte")
    return data


def _slow(messages: Messages, what: str, data: bytes) -> AbstractContextManager[object]:
    """Says what is being done where somebody may wait for it."""
    return status(messages, what) if len(data) > 1000 and is_terminal(sys.stderr) else nullcontext()


def _show(messages: Messages, view: PatchView) -> None:
    """The text on stdout, in colours where 256 can be seen, else with marks; what they mean on stderr."""
    from ..patch_view import terminal

    out = sys.stdout
    if out is None:
        return
    width = None
    if is_terminal(out):
        from rich.console import Console

        console = Console(file=out, highlight=False)
        width = console.width
        if not console.no_color and console.color_system in ("256", "truecolor"):
            for line in terminal.coloured_lines(view, width):
                console.print(line, crop=False, overflow="ignore", no_wrap=True)
            if not messages.quiet and sys.stderr is not None:
                Console(stderr=True, highlight=False).print(terminal.coloured_legend(view))
            return
    encoding = out.encoding or "utf-8"
    marks = terminal.choose_marks(view.data, encoding)
    out.writelines(line + "\n" for line in terminal.marked_lines(view, marks, width, encoding))
    inner = f", {marks.inner} behind a character in which one starts" if view.has_inner_starts else ""
    messages.say(f"{marks.start} stands before each patch{inner}")


def _say_figures(messages: Messages, view: PatchView) -> None:
    from ..patch_view import terminal
    from ..patch_view.view import summarize

    summary = summarize(view)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    if len(view.windows) > 1:
        longest = view.windows[1]
        messages.say(f"read in {len(view.windows)} windows of up to {longest:,} bytes, each from BOS")
    for line in [*terminal.figures(view, summary), *terminal.histogram(summary, encoding=encoding)]:
        messages.say(line)
