"""`blt-edge compare`: bundles side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...runtime.names import DEVICES
from ..output import Session, print_table, progress_bar, size
from .documents import check_plot, read_input, shown_name, write_json
from .options import (
    STDIN,
    BundleDirectory,
    InputFile,
    OneOf,
    OutputFile,
    SeveralFilesCommand,
    json_option,
    verbosity,
)

if TYPE_CHECKING:
    from ...export.quality import Tally
    from ..compare.bundles import BundleReport, Comparison

__all__ = ["command"]


def _whole(name: str, default: int | None, text: str, shown: str | bool = True) -> click.Option:
    flag = f"--{name.replace('_', '-')}"
    return click.Option([flag, name], type=int, default=default, metavar="N", show_default=shown, help=text)


@verbosity
@click.command("compare", cls=SeveralFilesCommand)
@click.argument("bundles", type=BundleDirectory(), nargs=-1, required=True, metavar="BUNDLE...")
@click.option(
    "--text",
    "texts",
    type=InputFile(),
    multiple=True,
    required=True,
    metavar="FILE...",
    help="Texts to compare on; - is stdin. Take others than the bundles were calibrated on.",
)
@click.option(
    "--plot",
    type=OutputFile(),
    metavar="FILE",
    show_default="no picture",
    help="Draw size, quality and speed into FILE (.png, .svg or .pdf).",
)
@json_option
@click.option("--device", type=OneOf(DEVICES), default="auto", show_default=True, help="Where to run.")
@click.pass_obj
def command(
    session: Session,
    /,
    bundles: tuple[Path, ...],
    texts: tuple[Path, ...],
    plot: Path | None,
    json_file: Path | None,
    **settings: int | str | None,
) -> None:
    """Set bundles side by side: size, quality, speed, memory.

    The first BUNDLE is what the others are compared with, best the float32 one. Bits per byte are over all
    260 classes; KL is the divergence from the first bundle's predictions, argmax the share of bytes it would
    choose too; boundaries are patch boundaries: those of the bundle that the first has too (precision), and
    those of the first that the bundle has too (recall). Lead is how long greedy texts stay the same. Each
    bundle is measured in a process of its own; private memory is the part that belongs to no file.
    """
    check_plot(plot)
    read = _read(texts, session)
    from ..compare.bundles import CompareOptions, compare_bundles

    options = CompareOptions(**settings)  # type: ignore[arg-type]
    with progress_bar(session) as progress:
        comparison = compare_bundles(bundles, read, options, progress)
    if json_file is not None:
        write_json(json_file, comparison.to_dict())
    if plot is not None:
        from ..compare.plot import draw_comparison

        draw_comparison(comparison, plot)
    if json_file != STDIN:
        _show(comparison)


command.params[-3:-3] = [
    _whole("context", None, "Ids in a window, BOS included.", "the trained context, from the bundle"),
    _whole("max_bytes", None, "Bytes of each text at most, in windows spread over it.", "all"),
    _whole("prompts", 20, "Greedy texts whose identical lead is measured."),
    _whole("lead_bytes", 64, "Bytes of each greedy text."),
    _whole("prompt_bytes", 512, "Bytes read at once to time prefill."),
    _whole("new_bytes", 128, "Bytes read one by one to time decoding."),
    _whole("repeat", 3, "Timings; the median counts."),
    _whole("threads", None, "CPU threads.", "as many as the engine likes"),
]


def _read(paths: Sequence[Path], session: Session) -> dict[str, bytes]:
    if list(paths).count(STDIN) > 1:
        raise click.UsageError("--text: - is given twice; stdin can be read only once")
    texts: dict[str, bytes] = {}
    for path in paths:
        name = (
            path.name
            if path != STDIN and all(other == path or other.name != path.name for other in paths)
            else shown_name(path)
        )
        if name in texts:
            raise click.UsageError(f"--text: {path} is given twice; give each text once")
        texts[name] = read_input(path, session, "the text")
        if not texts[name]:
            raise click.UsageError(f"--text: {name} is empty; there is nothing to compare on")
    return texts


# What people see.


def _show(comparison: Comparison) -> None:
    names = _names(comparison.bundles)
    for text, length in comparison.text_bytes.items():
        click.echo(f"{text}, {length:,} bytes")
        rows = [
            (name, *_quality(report.texts[text]))
            for name, report in zip(names, comparison.bundles, strict=True)
        ]
        columns = ("bundle", ">bits/byte", ">KL bits", ">argmax", ">precision", ">recall")
        print_table(columns, rows)
        click.echo()
    print_table(
        ("bundle", "tables", ">graphs", ">size", ">lead", ">prefill", ">decode", ">memory", ">private"),
        [(name, *_figures(report)) for name, report in zip(names, comparison.bundles, strict=True)],
    )
    first = comparison.bundles[0]
    machine = comparison.machine
    threads = f"{machine['threads']} threads" if machine.get("threads") else "threads not limited"
    notes = [
        f"size: of the tables; lead: mean identical greedy bytes of {_lead_length(first):.0f}, "
        f"{len(first.greedy_leads)} prompts; prefill and decode: bytes/s; "
        f"windows of {comparison.context} ids",
        f"measured on {machine.get('processor')}, {machine.get('cpus')} CPUs, {threads}, "
        f"{machine.get('system')}, ONNX Runtime {machine.get('onnxruntime')}",
    ]
    notes += [
        f"{name}: {report.note}"
        for name, report in zip(names, comparison.bundles, strict=True)
        if report.note
    ]
    for note in notes:
        click.echo(note)


def _quality(tally: Tally) -> tuple[str, ...]:
    return (
        f"{tally.bits_per_byte:.4f}",
        f"{tally.mean_divergence:.5f}",
        f"{tally.argmax_agreement:.2%}",
        f"{tally.boundary_precision:.2%}",
        f"{tally.boundary_recall:.2%}",
    )


def _figures(report: BundleReport) -> tuple[str, ...]:
    return (
        report.tables,
        size(report.graph_bytes),
        size(report.table_bytes),
        f"{report.mean_lead:.1f}" if report.greedy_leads else "",
        f"{report.prefill_bytes_per_second:,.0f}",
        f"{report.decode_bytes_per_second:,.0f}",
        "unknown" if report.peak_resident is None else size(report.peak_resident),
        "unknown" if report.peak_private is None else size(report.peak_private),
    )


def _lead_length(report: BundleReport) -> float:
    return sum(length for _, length in report.greedy_leads) / max(1, len(report.greedy_leads))


def _names(reports: Sequence[BundleReport]) -> list[str]:
    """Directory names, or whole paths where names are the same."""
    names = [Path(report.path).name for report in reports]
    return [
        name if names.count(name) == 1 else report.path for name, report in zip(names, reports, strict=True)
    ]
