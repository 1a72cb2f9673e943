"""`blt-edge score`: bits per byte of files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import Messages, print_table, progress_bar
from .documents import read_input, shown_name, write_json
from .model_options import EngineOptions, engine_options, load_model
from .options import STDIN, InputFile, json_option, model_option, option, verb

if TYPE_CHECKING:
    from ...runtime import Score


@verb("score")
@model_option
@click.argument("files", type=InputFile(), nargs=-1, required=True, metavar="FILE...")
@option(
    "--context",
    type=int,
    shown="the trained context, from the bundle",
    help="Ids in a window, BOS included; each window is read from BOS.",
)
@engine_options
@json_option
def command(
    messages: Messages,
    model: Path,
    files: tuple[Path, ...],
    context: int | None,
    engine: EngineOptions,
    json_file: Path | None,
) -> None:
    """Measure bits per byte of files.

    FILE may be - for stdin. Bits are over all 260 classes; lower is better. Every byte is scored once, in
    windows without overlap.
    """
    if files.count(STDIN) > 1:
        raise click.UsageError("FILE: - is given twice; stdin can be read only once")
    texts = [(shown_name(path), read_input(path, messages, "the text")) for path in files]
    for name, text in texts:
        if not text:
            raise click.UsageError(f"FILE: {name} is empty; there is nothing to score")
    loaded = load_model(messages, model, engine, positions=context)
    with progress_bar(messages) as progress:
        scores = [
            loaded.score(text, context=context, progress=partial(progress, f"scoring {Path(name).name}"))
            for name, text in texts
        ]
    figures = [(name, _figures([score])) for (name, _), score in zip(texts, scores, strict=True)]
    total = _figures(scores)
    document = {
        "model": str(model),
        "source": loaded.manifest.source.name,
        "context": scores[0].context,
        "files": [{"file": name, **told} for name, told in figures],
        "total": total,
    }
    write_json(json_file, document)
    if json_file == STDIN:
        return
    several = len(figures) > 1
    rows = [
        (
            name,
            f"{told['bytes']:,}",
            f"{told['patches']:,}",
            f"{told['bytes_per_patch']:.2f}",
            f"{told['bits_per_byte']:.4f}",
            f"{told['bytes_per_second']:,.0f}",
        )
        for name, told in [*figures, *[("total", total)] * several]
    ]
    columns = ("file", ">bytes", ">patches", ">bytes/patch", ">bits/byte", ">bytes/s")
    print_table(columns, rows, total=several)


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
