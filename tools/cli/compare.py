"""`blt-edge compare`: bundles side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...runtime.names import DEVICES
from ..compare import CompareOptions
from ..output import Messages, print_table, progress_bar, size
from .documents import check_plot, output_option, read_input, shown_name, with_folders, write_json
from .options import STDIN, BundleDirectory, OneOf, TextSource, json_option, option, verb

if TYPE_CHECKING:
    from ..compare.bundles import Comparison


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
@option("--threads", type=int, shown="as many as the engine likes", help="CPU threads.")
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
    260 classes; KL is the divergence from the first bundle's predictions, argmax the share of bytes it would
    choose too; boundaries are patch boundaries: those of the bundle that the first has too (precision), and
    those of the first that the bundle has too (recall). Lead is how long greedy texts stay the same. Each
    bundle is measured in a process of its own; private memory is the part that belongs to no file.
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
        raise click.UsageError(f"--text: {shown_name(texts[0])} is empty; there is nothing to compare on")
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
        rows = []
        for name, report in reports:
            tally = report.texts[text]
            shares = (tally.argmax_agreement, tally.boundary_precision, tally.boundary_recall)
            figures = (f"{tally.bits_per_byte:.4f}", f"{tally.mean_divergence:.5f}")
            rows.append((name, *figures, *(f"{share:.2%}" for share in shares)))
        print_table(("bundle", ">bits/byte", ">KL bits", ">argmax", ">precision", ">recall"), rows)
        click.echo()
    print_table(
        ("bundle", "tables", ">graphs", ">size", ">lead", ">prefill", ">decode", ">memory", ">private"),
        [
            (
                name,
                report.tables,
                size(report.graph_bytes),
                size(report.table_bytes),
                f"{report.mean_lead:.1f}" if report.greedy_leads else "",
                f"{report.prefill_bytes_per_second:,.0f}",
                f"{report.decode_bytes_per_second:,.0f}",
                size(report.peak_resident),
                size(report.peak_private),
            )
            for name, report in reports
        ],
    )
    leads = comparison.bundles[0].greedy_leads
    mean_length = sum(length for _, length in leads) / max(1, len(leads))
    machine = comparison.machine
    threads = f"{machine['threads']} threads" if machine.get("threads") else "threads not limited"
    click.echo(
        f"size: of the tables; lead: mean identical greedy bytes of {mean_length:.0f}, {len(leads)} prompts; "
        f"prefill and decode: bytes/s; windows of {comparison.context} ids\n"
        f"measured on {machine.get('processor')}, {machine.get('cpus')} CPUs, {threads}, "
        f"{machine.get('system')}, ONNX Runtime {machine.get('onnxruntime')}"
    )
    for name, report in reports:
        if report.note:
            click.echo(f"{name}: {report.note}")
