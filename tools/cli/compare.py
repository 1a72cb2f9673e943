"""`blt-edge compare`: bundles side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...runtime.names import DEVICES
from ..compare import CompareOptions
from ..output import Messages, counted, progress_bar, size
from ..tables import print_table
from .documents import check_plot, nothing_in, output_option, read_input, shown_name, with_folders, write_json
from .options import DEFAULT_THREADS, STDIN, BundleDirectory, OneOf, TextSource, json_option, option, verb

if TYPE_CHECKING:
    from ...export.quality import Tally
    from ..compare.bundles import BundleReport, Comparison


@verb("compare", "bundle small --text alice.txt", "bundle small --text texts/ --plot compare.png")
@click.argument("bundles", type=BundleDirectory(), nargs=-1, required=True, metavar="BUNDLE...")
@option(
    "--text",
    "texts",
    type=TextSource(),
    multiple=True,
    required=True,
    metavar="FILE...",
    help="Texts to compare on, and folders of them; - is stdin. Take others than the bundles were calibrated "
    "on.",
)
@output_option("--plot", "no picture", "Draw size, quality and speed into FILE (.png, .svg or .pdf).")
@json_option
@option(
    "--context", type=int, shown="the trained context, from the bundle", help="Ids in a window, BOS included."
)
@option("--max-bytes", type=int, shown="all", help="Bytes of each text at most, in windows spread over it.")
@option("--prompts", of=CompareOptions, type=int, help="Greedy texts whose identical lead is measured.")
@option("--lead-bytes", of=CompareOptions, type=int, help="Bytes of each greedy text.")
@option("--prompt-bytes", of=CompareOptions, type=int, help="Bytes read at once to time prefill.")
@option("--new-bytes", of=CompareOptions, type=int, help="Bytes read one by one to time decoding.")
@option("--repeat", of=CompareOptions, type=int, help="Timings; the median counts.")
@option("-t", "--threads", type=int, shown=DEFAULT_THREADS, help="CPU threads.")
@option("--device", of=CompareOptions, type=OneOf(DEVICES), help="Where to run.")
def command(
    messages: Messages,
    bundles: tuple[Path, ...],
    texts: tuple[Path, ...],
    plot: Path | None,
    json_file: Path | None,
    **settings: int | str | None,
) -> None:
    """Set bundles side by side: size, quality, speed, memory.

    The first BUNDLE is what the others are compared with, best the float32 one. Bits per byte are over all
    260 classes, and how many more than the first bundle's; KL is the divergence from its predictions, argmax
    the share of bytes it would choose too. Of patch boundaries, false is the share of the bundle's that the
    first does not have, missed that of the first's that the bundle does not have. Lead is how long greedy
    texts stay the same. On disk is all that lies in the directory, what `build` added included. Each bundle
    is measured in a process of its own; private memory is the part that belongs to no file.
    """
    check_plot(plot)
    if texts.count(STDIN) > 1:
        raise click.UsageError("--text: - is given twice; stdin can be read only once")
    read: dict[str, bytes] = {}
    found = with_folders(texts)
    for path in found:
        alone = path != STDIN and all(other == path or other.name != path.name for other in found)
        name = path.name if alone else shown_name(path)
        if name in read:
            raise click.UsageError(f"--text: {path} is given twice; give each text once")
        read[name] = read_input(path, messages, "the text")
        if not read[name] and len(found) > 1:
            messages.note(f"{name} is empty; it is left out")
            del read[name]
    if not any(read.values()):
        raise nothing_in("--text", found, "compare on")
    from ..compare.bundles import compare_bundles, draw_comparison

    options = CompareOptions(**settings)  # type: ignore[arg-type]
    with progress_bar(messages) as progress:
        comparison = compare_bundles(bundles, read, options, progress)
    write_json(json_file, comparison.to_dict())
    if plot is not None:
        draw_comparison(comparison, plot)
    if json_file != STDIN:
        _show(comparison)


def _show(comparison: Comparison) -> None:
    directories = [Path(report.path).name for report in comparison.bundles]
    reports = [
        (name if directories.count(name) == 1 else report.path, report)
        for name, report in zip(directories, comparison.bundles, strict=True)
    ]
    for text, length in comparison.text_bytes.items():
        click.echo(f"{text}, {length:,} bytes")
        _show_quality([(name, report.texts[text]) for name, report in reports])
    if len(comparison.text_bytes) > 1:
        total = sum(comparison.text_bytes.values())
        click.echo(f"all {len(comparison.text_bytes)} texts, {total:,} bytes")
        _show_quality([(name, report.total) for name, report in reports])
    _show_sizes_and_speeds(reports, comparison)
    leads = comparison.bundles[0].greedy_leads
    mean_length = sum(length for _, length in leads) / max(1, len(leads))
    machine = comparison.machine
    prompts = counted(len(leads), "prompt")
    threads = f"{counted(machine['threads'], 'thread')}, " if machine.get("threads") else ""
    click.echo(
        f"on disk: all files; graphs and tables: portable ones; windows of {comparison.context} ids\n"
        f"lead: mean identical greedy bytes of {mean_length:.0f}, {prompts}; prefill and decode: "
        "bytes/s, and times the first's\n"
        f"measured on {machine.get('processor')}, {machine.get('cpus')} CPUs, {threads}"
        f"{machine.get('system')}, ONNX Runtime {machine.get('onnxruntime')}"
    )
    if len({report.built for _, report in reports}) > 1:
        unbuilt = " ".join(report.path for _, report in reports if not report.built)
        click.echo(f"not built, so that speeds and memory do not compare: {unbuilt}; see blt-edge build")
    for name, report in reports:
        if report.note:
            click.echo(f"{name}: {report.note}")


def _show_sizes_and_speeds(reports: Sequence[tuple[str, BundleReport]], comparison: Comparison) -> None:
    sizes, speeds = [], []
    for name, report in reports:
        tables = f"{size(report.table_bytes)} {report.tables}"
        engine = "built" if report.built else "portable"
        sizes.append((name, engine, size(report.disk_bytes), size(report.graph_bytes), tables))
        times = comparison.against_first(report)["times_decode"]
        speeds.append(
            (
                name,
                f"{report.mean_lead:.1f}" if report.greedy_leads else "",
                f"{report.prefill_bytes_per_second:,.0f}",
                f"{report.decode_bytes_per_second:,.0f}",
                "" if report is reports[0][1] else f"{times:.2f}",
                size(report.peak_resident),
                size(report.peak_private),
            )
        )
    print_table(("bundle", "engine", ">on disk", ">graphs", ">tables"), sizes)
    click.echo()
    print_table(("bundle", ">lead", ">prefill", ">decode", ">times", ">memory", ">private"), speeds)


def _show_quality(rows: Sequence[tuple[str, Tally]]) -> None:
    """Quality on a text by bundle, the first one's first."""
    first = rows[0][1].bits_per_byte
    columns = ("bundle", ">bits/byte", ">more", ">KL bits", ">argmax", ">false", ">missed")
    lines = []
    for index, (name, tally) in enumerate(rows):
        more = f"{tally.bits_per_byte - first:+.4f}" if index else ""
        shares = (tally.argmax_agreement, tally.false_boundaries, tally.missed_boundaries)
        figures = (f"{tally.bits_per_byte:.4f}", more, f"{tally.mean_divergence:.5f}")
        lines.append((name, *figures, *(f"{share:.2%}" for share in shares)))
    print_table(columns, lines)
    click.echo()
