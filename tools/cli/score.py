"""`blt-edge score`: bits per byte of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import Session, print_table, progress_bar
from .documents import read_input, shown_name, write_json
from .model_options import EngineOptions, engine_options, load_model
from .options import STDIN, InputFile, json_option, model_option, verb

if TYPE_CHECKING:
    from ...runtime import BltModel, Score

__all__ = ["command"]


@dataclass(frozen=True)
class _Line:
    """Figures of one file, or of all together."""

    name: str
    bytes: int
    patches: int
    """Without the one of each window that BOS is alone in."""
    windows: int
    bits: float
    seconds: float

    @property
    def figures(self) -> dict[str, Any]:
        """What is told of it."""
        return {
            "bytes": self.bytes,
            "patches": self.patches,
            "bytes_per_patch": self.bytes / max(1, self.patches),
            "bits_per_byte": self.bits / self.bytes,
            "bytes_per_second": self.bytes / self.seconds if self.seconds > 0 else 0.0,
            "windows": self.windows,
            "seconds": self.seconds,
        }


@verb("score")
@model_option
@click.argument("files", type=InputFile(), nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--context",
    type=int,
    metavar="N",
    show_default="the trained context, from the bundle",
    help="Ids in a window, BOS included; each window is read from BOS.",
)
@engine_options
@json_option
def command(
    session: Session,
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
    texts = _read(files, session)
    loaded = load_model(session, model, engine, positions=context)
    with progress_bar(session) as progress:
        scores = [
            loaded.score(text, context=context, progress=partial(progress, f"scoring {Path(name).name}"))
            for name, text in texts
        ]
    lines = [_line(name, score) for (name, _), score in zip(texts, scores, strict=True)]
    total = _total(lines)
    if json_file is not None:
        write_json(json_file, _document(model, loaded, scores[0].context, lines, total))
    if json_file != STDIN:
        _show(lines, total)


def _read(files: Sequence[Path], session: Session) -> list[tuple[str, bytes]]:
    if list(files).count(STDIN) > 1:
        raise click.UsageError("FILE: - is given twice; stdin can be read only once")
    texts = [(shown_name(path), read_input(path, session, "the text")) for path in files]
    for name, text in texts:
        if not text:
            raise click.UsageError(f"FILE: {name} is empty; there is nothing to score")
    return texts


def _line(name: str, score: Score) -> _Line:
    return _Line(
        name=name,
        bytes=score.bytes,
        patches=score.patches - score.windows,
        windows=score.windows,
        bits=score.bits_per_byte * score.bytes,
        seconds=score.seconds,
    )


def _total(lines: Sequence[_Line]) -> _Line:
    return _Line(
        name="total",
        bytes=sum(line.bytes for line in lines),
        patches=sum(line.patches for line in lines),
        windows=sum(line.windows for line in lines),
        bits=sum(line.bits for line in lines),
        seconds=sum(line.seconds for line in lines),
    )


def _show(lines: Sequence[_Line], total: _Line) -> None:
    shown = [*lines, total] if len(lines) > 1 else lines
    rows = [
        (
            line.name,
            f"{line.bytes:,}",
            f"{line.patches:,}",
            f"{line.figures['bytes_per_patch']:.2f}",
            f"{line.figures['bits_per_byte']:.4f}",
            f"{line.figures['bytes_per_second']:,.0f}",
        )
        for line in shown
    ]
    columns = ("file", ">bytes", ">patches", ">bytes/patch", ">bits/byte", ">bytes/s")
    print_table(columns, rows, total=len(lines) > 1)


def _document(
    bundle: Path, model: BltModel, context: int, lines: Sequence[_Line], total: _Line
) -> dict[str, Any]:
    return {
        "model": str(bundle),
        "source": model.manifest.source.name,
        "context": context,
        "files": [{"file": line.name, **line.figures} for line in lines],
        "total": total.figures,
    }
