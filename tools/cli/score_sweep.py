"""`blt-edge score --sweep`: a table and a picture of what thresholds cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...runtime.files import write_whole
from ..output import Messages, print_table, progress_bar
from .documents import write_json
from .options import STDIN

if TYPE_CHECKING:
    from ...runtime import BltModel


def show_sweep(
    messages: Messages,
    model: BltModel,
    texts: Mapping[str, bytes],
    thresholds: Sequence[float],
    context: int | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Score the texts that are not empty at each threshold, and show what each costs."""
    texts = {name: text for name, text in texts.items() if text}
    if not texts:
        raise click.UsageError("FILE: is empty; there is nothing to score")
    from ..patch_view.sweep import draw_sweep, sweep

    size = sum(map(len, texts.values()))
    with progress_bar(messages) as progress:
        points = sweep(model, list(texts.values()), thresholds, context=context, progress=progress)
    about = {"model": str(model.path), "source": model.manifest.source.name, "files": list(texts)}
    write_json(json_file, {**about, "bytes": size, "points": [point.to_dict() for point in points]})
    if plot is not None:
        names = ", ".join(Path(name).name for name in texts) if len(texts) < 4 else f"{len(texts)} texts"
        title = f"{model.path.resolve().name} on {names}, {size:,} bytes"
        kind = plot.suffix.lower().lstrip(".")
        write_whole(plot, lambda path: draw_sweep(points, path, kind, title))
    if json_file == STDIN:
        return
    own = next(point for point in points if point.bundles)
    rows = [
        (
            f"{point.threshold:.4g}" + " (bundle)" * point.bundles,
            f"{point.bytes_per_patch:.2f}",
            f"{point.bits_per_byte:.4f}",
            "" if point.bundles else f"{point.bits_per_byte - own.bits_per_byte:+.4f}",
            f"{point.bytes_per_second:,.0f}",
        )
        for point in points
    ]
    print_table(("threshold", ">bytes/patch", ">bits/byte", ">more", ">bytes/s"), rows)
    click.echo(f"{size:,} bytes; thresholds in nats; more: than at the bundle's own")
