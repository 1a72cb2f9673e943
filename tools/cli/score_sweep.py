"""`blt-edge score --sweep`: a table and a picture of what thresholds cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.files import write_whole
from ..corpus.compressed import DamagedError, open_file
from ..corpus.sources import Source
from ..output import Messages, progress_bar
from ..tables import GrowingTable
from .documents import nothing_in, read_all, read_input, write_json
from .options import STDIN

if TYPE_CHECKING:
    from ...runtime import BltModel
    from ..patch_view.sweep import SweepPoint

_COLUMNS = ("threshold", ">bytes/patch", ">bits/byte", ">more", ">bytes/s")
_WIDEST = ("1,000.00", "10.0000", "+10.0000", "100,000")
"""Cells that the columns behind the thresholds have room for."""


def show_sweep(
    messages: Messages,
    model: BltModel,
    sources: Sequence[Source],
    thresholds: Sequence[float],
    context: int | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Score the files together at each threshold, and show what each costs as soon as it is known.

    What is known is not lost when it is interrupted. A file that is empty or can't be read is told, and left
    out. Raises ClickException for one that can't be read, after all else.
    """
    from ..patch_view.sweep import sweep

    texts, told = _read(messages, sources)
    if not texts and not any("unreadable" in one.get("note", "") for one in told):
        raise nothing_in("FILE", [source.path or STDIN for source in sources], "score")
    points: list[SweepPoint] = []
    rising = sweep(model, texts, thresholds, context=context, display=partial(progress_bar, messages))
    names = [f"{value:.4g} (bundle)" for value in (*thresholds, model.manifest.patching.threshold)]
    table = None if json_file == STDIN else GrowingTable(_COLUMNS, (max(names, key=len), *_WIDEST))
    size, complete = sum(map(len, texts)), False
    try:
        for point in rising if texts else ():
            points.append(point)
            if table is not None:
                table.row(_cells(point, points[0]))
        complete = True
    finally:
        points.sort(key=lambda point: point.threshold)
        document = {
            "model": str(model.path),
            "source": model.manifest.source.name,
            "complete": complete,
            "files": told,
            "bytes": size,
            "points": [point.to_dict() for point in points],
        }
        write_json(json_file, document)
        if points and plot is not None:
            _draw(points, plot, f"{model.path.resolve().name} on {_title(told)}, {size:,} bytes")
        if points and table is not None:
            click.echo(f"{size:,} bytes; thresholds in nats; more: than at the bundle's own")
    check_all_read(told)


def check_all_read(told: Sequence[Mapping[str, Any]]) -> None:
    """Raises ClickException where a file has a note other than that it is empty."""
    unread = sum(one.get("note", "empty") != "empty" for one in told)
    if unread:
        raise click.ClickException(f"{unread} of {len(told)} files could not be read")


def _read(messages: Messages, sources: Sequence[Source]) -> tuple[list[bytes], list[dict[str, Any]]]:
    """The texts that there are, and what is told of each file."""
    texts: list[bytes] = []
    told: list[dict[str, Any]] = []
    for source in sources:
        one: dict[str, Any] = {"file": source.name, "bytes": 0}
        try:
            text = _text(messages, source)
        except OSError as error:
            if len(sources) == 1:
                raise
            one["note"] = f"unreadable: {error.strerror}"
        except DamagedError as error:
            if len(sources) == 1:
                raise click.ClickException(f"{source.name}: {error}") from None
            one["note"] = f"unreadable: {error}"
        else:
            if text:
                texts.append(text)
                one["bytes"] = len(text)
            else:
                one["note"] = "empty"
        if "note" in one and len(sources) > 1:
            messages.note(f"{one['file']}: {one['note']}; it is left out")
        told.append(one)
    return texts, told


def _text(messages: Messages, source: Source) -> bytes:
    if source.path is None:
        return read_input(STDIN, messages, "the text")
    with open_file(source.path) as (stream, _):
        return read_all(stream, source.name, "the text")


def _title(told: Sequence[Mapping[str, Any]]) -> str:
    names = [Path(one["file"]).name for one in told if "note" not in one]
    return ", ".join(names) if len(names) < 4 else f"{len(names)} texts"


def _draw(points: Sequence[SweepPoint], plot: Path, title: str) -> None:
    from ..patch_view.sweep import draw_sweep

    kind = plot.suffix.lower().lstrip(".")
    write_whole(plot, lambda path: draw_sweep(points, path, kind, title))


def _cells(point: SweepPoint, own: SweepPoint) -> Sequence[str]:
    return (
        f"{point.threshold:.4g}" + " (bundle)" * point.bundles,
        f"{point.bytes_per_patch:.2f}",
        f"{point.bits_per_byte:.4f}",
        "" if point.bundles else f"{point.bits_per_byte - own.bits_per_byte:+.4f}",
        f"{point.bytes_per_second:,.0f}",
    )
