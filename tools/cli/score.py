"""`blt-edge score`: bits per byte of files, each told as soon as it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import Messages, progress_bar
from ..tables import GrowingTable
from .documents import (
    check_plot,
    jsonl_lines,
    nothing_in,
    open_input,
    output_option,
    shown_name,
    with_folders,
    write_json,
)
from .model_options import EngineOptions, engine_options, load_model
from .options import STDIN, TextSource, json_option, model_option, option, verb
from .profile import CommaSeparated
from .rule_options import changed_rule, rule_options
from .score_sweep import check_all_read, show_sweep

if TYPE_CHECKING:
    from ...runtime import BltModel
    from ...runtime.scoring import Score

_COLUMNS = ("file", ">bytes", ">patches", ">bytes/patch", ">bits/byte", ">bytes/s")
_WIDEST = ("100,000,000", "100,000,000", "1,000.00", "unreadable", "100,000")
"""Cells that the columns behind the names have room for."""


@verb("score", "-m demo-bundle alice.txt", "-m demo-bundle texts/ --json scores.json")
@model_option
@click.argument("files", type=TextSource(), nargs=-1, required=True, metavar="FILE...")
@option(
    "--context",
    type=int,
    shown="the trained context, from the bundle",
    help="Ids in a window, BOS included; each window is read from BOS.",
)
@rule_options
@option(
    "--sweep",
    type=CommaSeparated(click.FLOAT),
    metavar="X,...",
    shown="one threshold",
    help="Score all files once with the bundle's threshold and with each of these, in nats: what each costs.",
)
@output_option("--plot", "no picture", "With --sweep: draw bits per byte over bytes per patch into FILE.")
@engine_options
@json_option
@output_option("--jsonl", "no lines", "Write a JSON line to FILE for each file, as it is known; - is stdout.")
def command(
    messages: Messages,
    model: Path,
    files: tuple[Path, ...],
    context: int | None,
    sweep: tuple[float, ...] | None,
    plot: Path | None,
    engine: EngineOptions,
    json_file: Path | None,
    jsonl: Path | None,
    **changes: Any,
) -> None:
    """Measure bits per byte of files.

    FILE may be - for stdin, or a folder: its texts at any depth, without hidden ones and links. Bits are over
    all 260 classes; lower is better. Every byte is scored once, in windows without overlap. A row comes as
    soon as its file is read, so Ctrl-C loses no other; --json is written then, too, with "complete" false.

    --mode, --threshold and what follows them cut patches by another rule than the bundle's: the difference is
    what that costs.
    """
    check_plot(plot)
    if plot is not None and sweep is None:
        raise click.UsageError("--plot draws a sweep; add --sweep X,...")
    for name, value in {**changes, "jsonl": jsonl}.items():
        if sweep is not None and value is not None:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} and --sweep are both given; give one of them")
    if files.count(STDIN) > 1:
        raise click.UsageError("FILE: - is given twice; stdin can be read only once")
    if json_file is not None and json_file == jsonl:
        raise click.UsageError(f"--json, --jsonl: {json_file} is given twice; give each its own")
    paths = with_folders(files)
    from ...runtime.manifest import load_manifest

    rule = changed_rule(load_manifest(model).patching, changes)
    loaded = load_model(messages, model, engine, positions=context, reads_only=True).with_patching(rule)
    if sweep is not None:
        show_sweep(messages, loaded, paths, sweep, context, json_file, plot)
        return
    table = None
    if STDIN not in (json_file, jsonl):
        names = ("total", *map(shown_name, paths))
        table = GrowingTable(_COLUMNS, (max(names, key=len), *_WIDEST))
    told: list[dict[str, Any]] = []
    scores: list[Score] = []
    complete = False
    with jsonl_lines(jsonl) as write_line:
        try:
            for path in paths:
                found = _score(messages, loaded, path, context, alone=len(paths) == 1)
                name = shown_name(path)
                if isinstance(found, str):
                    told.append({"file": name, "bytes": 0, "note": found})
                else:
                    scores.append(found)
                    told.append({"file": name, **_figures([found])})
                write_line(told[-1])
                if table is not None:
                    table.row(_cells(told[-1]))
            complete = True
        finally:
            total = _figures(scores) if scores else None
            write_line({"total": total, "complete": complete})
            document = {
                "model": str(model),
                "source": loaded.manifest.source.name,
                "context": loaded.manifest.model.trained_context if context is None else context,
                "complete": complete,
                "files": told,
                "total": total,
            }
            write_json(json_file, document)
            if table is not None and total is not None and len(told) > 1:
                table.row(_cells({"file": "total", **total}), total=True)
    check_all_read(told)
    if not scores:
        raise nothing_in("FILE", paths, "score")


def _score(
    messages: Messages, model: BltModel, path: Path, context: int | None, *, alone: bool
) -> Score | str:
    """The score of a file, or why it has none; raised when there is no other (`alone`)."""
    from ...runtime.scoring import EmptyTextError

    name = shown_name(path)
    try:
        size = 0 if path == STDIN else path.stat().st_size
        with open_input(path, messages, "the text") as file, progress_bar(messages) as progress:
            told = partial(progress, f"scoring {Path(name).name}")
            return model.score(
                file, context=context, progress=lambda done, _: told(done, size and max(size, done))
            )
    except EmptyTextError:
        if alone:
            raise nothing_in("FILE", [path], "score") from None
        return "empty"
    except OSError as error:
        if alone:
            raise
        messages.note(f"{name}: {error.strerror}")
        return f"unreadable: {error.strerror}"


def _cells(told: Mapping[str, Any]) -> Sequence[str]:
    if "note" in told:
        return (told["file"], "0", "", "", told["note"].partition(":")[0])
    return (
        told["file"],
        f"{told['bytes']:,}",
        f"{told['patches']:,}",
        f"{told['bytes_per_patch']:.2f}",
        f"{told['bits_per_byte']:.4f}",
        f"{told['bytes_per_second']:,.0f}",
    )


def _figures(scores: Sequence[Score]) -> dict[str, Any]:
    """What is told of one file, or of all together."""
    size, seconds = sum(score.bytes for score in scores), sum(score.seconds for score in scores)
    windows = sum(score.windows for score in scores)
    patches = sum(score.patches for score in scores) - windows  # BOS is alone in one of each window
    return {
        "bytes": size,
        "patches": patches,
        "bytes_per_patch": size / max(1, patches),
        "bits_per_byte": sum(score.bits_per_byte * score.bytes for score in scores) / size,
        "bytes_per_second": size / seconds if seconds > 0 else 0.0,
        "windows": windows,
        "seconds": seconds,
    }
