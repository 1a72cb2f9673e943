"""`blt-edge profile`: what a byte costs, how long it takes, and how near that is to what memory allows.

The profile is shown as people read it: the cost of a byte, then what was measured, then warnings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.files import write_whole
from ...runtime.names import DEVICES, DRAFTS
from ..output import Messages, counted, size, status
from ..tables import print_fields, print_table
from .documents import check_plot, output_option, read_input, shown_name, write_json, write_text
from .options import (
    DEFAULT_THREADS,
    STDIN,
    AnyType,
    F,
    InputFile,
    OneOf,
    OutputFile,
    json_option,
    model_option,
    option,
    verb,
)

if TYPE_CHECKING:
    from ..profile.measure import Profile
    from ..profile.statistics import Case, Decode


class CommaSeparated(AnyType):
    """Values of one type, with commas between."""

    name = "list"

    def __init__(self, one: Any) -> None:
        self._one = one

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._one.convert(part.strip(), param, ctx) for part in str(value).split(","))


def _sweep_option(*flags: str, one: Any, metavar: str, default: str | None, text: str) -> Callable[[F], F]:
    shown = True if default else DEFAULT_THREADS
    settings: dict[str, Any] = {"default": [default] if default else None, "show_default": shown}
    return click.option(
        *flags, type=CommaSeparated(one), metavar=f"{metavar},...", multiple=True, help=text, **settings
    )


def _table_option(flag: str, text: str) -> Callable[[F], F]:
    """A table for others' use: into a file, or without one on stdout."""
    kind = OutputFile()
    return click.option(
        flag, type=kind, is_flag=False, flag_value="-", metavar="[FILE]", show_default="no table", help=text
    )


@verb("profile", "-m demo-bundle", "-m demo-bundle --threads 1,2,4 --json profile.json")
@model_option
@option("--device", type=OneOf(DEVICES), default="auto", help="Where to run.")
@_sweep_option(
    "-t",
    "--threads",
    one=click.INT,
    metavar="N",
    default=None,
    text="CPU threads; several values are a sweep, here and below.",
)
@_sweep_option("--prompt-bytes", one=click.INT, metavar="N", default="512", text="Bytes of the prompt.")
@option("--new-bytes", type=int, default=128, help="Bytes to generate after it, greedily.")
@_sweep_option(
    "--draft",
    "drafts",
    one=OneOf(DRAFTS),
    metavar="SOURCE",
    default="none",
    text=f"Where guesses at the next bytes come from: {', '.join(DRAFTS)}.",
)
@option("--draft-length", type=int, shown="as many as pay", help="Guesses at a time, 1 to 32.")
@option("--warmup", type=int, default=1, help="Rounds before those that count.")
@option("--repeat", type=int, default=5, help="Rounds that count.")
@option(
    "--text",
    type=InputFile(),
    metavar="FILE",
    shown="English prose that comes with the package",
    help="Prompts are the beginning of FILE; - is stdin.",
)
@_table_option(
    "--markdown",
    "Write a table to paste to FILE, or in place of all else to stdout: a row a test, as llama-bench has.",
)
@_table_option("--csv", "The same for spreadsheets, every figure in a column of its own.")
@json_option
@output_option(
    "--plot", "no picture", "Draw latencies and shares, or speeds of a sweep, into FILE (.png, .svg or .pdf)."
)
@output_option("--trace", "no trace", "Write a timeline of the last round for chrome://tracing or Perfetto.")
def command(
    messages: Messages,
    model: Path,
    text: Path | None,
    markdown: Path | None,
    csv: Path | None,
    json_file: Path | None,
    plot: Path | None,
    trace: Path | None,
    threads: tuple[tuple[int, ...], ...],
    prompt_bytes: tuple[tuple[int, ...], ...],
    drafts: tuple[tuple[str, ...], ...],
    **single: Any,
) -> None:
    """Measure where time goes, and how near it is to what memory allows.

    First what a byte of text must read from memory, and the bytes/s that this machine's read bandwidth,
    measured here and now, allows at most; then prefill, decoding, latencies and time by stage as they were.
    The bundle generates as `generate` does, so sampling and everything on the host counts. Speeds are means
    over the rounds, with their standard deviation.
    """
    if trace == STDIN:
        raise click.UsageError("--trace: got -; give a file, stdout carries the figures")
    outputs = {"--markdown": markdown, "--csv": csv, "--json": json_file, "--plot": plot, "--trace": trace}
    given = [path for path in outputs.values() if path is not None]
    if len(set(given)) < len(given):
        raise click.UsageError(f"{', '.join(outputs)}: two of them go to one place; give each its own")
    check_plot(plot)
    from ..profile.measure import ProfileOptions, profile, profile_warnings

    options = ProfileOptions(
        threads=_flat(threads) or (None,), prompt_bytes=_flat(prompt_bytes), drafts=_flat(drafts), **single
    )
    data = _text(text, messages)
    with status(messages) as say:
        measured = profile(model, data, options, say)
    warnings = profile_warnings(measured)
    document = {**measured.to_dict(), "warnings": warnings}
    write_json(json_file, document)
    if markdown is not None or csv is not None:
        from ..profile.table import csv_text, markdown_text

        for target, render in ((markdown, markdown_text), (csv, csv_text)):
            if target is not None:
                write_text(target, render(measured))
    if plot is not None:
        from ..profile import plot as drawing

        kind = plot.suffix.lower().lstrip(".")
        write_whole(plot, lambda path: drawing.draw_profile(measured, path, kind))
    if trace is not None:
        from ..profile.recorder import chrome_trace

        rounds = [(case.name, case.rounds[-1]) for case in measured.cases]
        about = {"model": measured.path, "engine": measured.engine, "machine": measured.machine["processor"]}
        write_json(trace, chrome_trace(rounds, about))
    if STDIN in given:
        for warning in warnings:
            messages.say(f"warning: {warning}")
    else:
        show(measured, warnings)


def _flat(values: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(value for given in values for value in given))


def _text(path: Path | None, messages: Messages) -> bytes:
    if path is None:
        from ...calibration.data import bundled_texts

        return bundled_texts()[0].path.read_bytes()
    data = read_input(path, messages, "the text")
    if not data:
        raise click.UsageError(f"--text: {shown_name(path)} is empty; there is nothing to take prompts from")
    return data


def show(profile: Profile, warnings: Sequence[str]) -> None:
    _show_head(profile)
    click.echo()
    _show_cost(profile)
    click.echo()
    if len(profile.cases) == 1:
        _show_case(profile.cases[0])
    else:
        _show_sweep(profile.cases)
    if warnings:
        click.echo()
    for warning in warnings:
        click.echo(f"warning: {warning}")


def _show_head(profile: Profile) -> None:
    machine, options, jetson = profile.machine, profile.options, profile.jetson
    fields = [
        ("bundle", f"{profile.path}, from {profile.manifest.source.name}"),
        (
            "machine",
            f"{machine['processor']}, {machine['cpus']} CPUs, {machine['system']}, "
            f"ONNX Runtime {machine['onnxruntime']}",
        ),
    ]
    if jetson is not None:
        total = jetson.unified_memory_bytes
        memory = f", {size(total)} shared by processors and GPU" if total else ""
        clocks = {True: "fixed", False: "moving", None: "unknown"}[jetson.clocks_fixed]
        fields.append(("board", f"{jetson.board}, JetPack {jetson.jetpack or 'unknown'}{memory}"))
        fields.append(("power", f"mode {jetson.power_mode or 'unknown'}, clocks {clocks}"))
    fields.append(("engine", profile.engine))
    rounds, warmups = counted(options.repeat, "round"), counted(options.warmup, "warm-up")
    fields.append(("measured", f"{rounds} of {options.new_bytes} greedy bytes after {warmups}"))
    print_fields(fields)


def _show_cost(profile: Profile) -> None:
    case, table = profile.cases[0], profile.manifest.embedding
    cost = case.cost
    which = f", {case.name}" if len(profile.cases) > 1 else ""
    click.echo(f"what a byte reads after {cost.positions:,} positions{which}")
    rows = [
        (
            stage.stage,
            stage.precision,
            size(stage.weights),
            size(stage.cache),
            f"{stage.calls_per_byte:.3f}",
            size(stage.per_byte),
        )
        for stage in cost.stages.values()
    ]
    table_rows = f"{cost.table_rows} x {size(cost.row_bytes)}"
    rows.append(("tables", table.precision, table_rows, "", "", size(cost.tables_per_byte)))
    weights, cache = size(cost.weights_per_byte), size(cost.cache_per_byte)
    rows.append(("a byte", "", weights, cache, "", size(cost.read_per_byte)))
    print_table(("stage", "precision", ">weights", ">cache", ">runs/byte", ">read/byte"), rows, total=True)
    click.echo()
    bandwidth, ceiling = case.bandwidth, cost.ceiling_bytes_per_second
    fields = [
        ("bandwidth", f"{bandwidth.bytes_per_second / 1e9:.1f} GB/s: {bandwidth.method}"),
        ("ceiling", f"{ceiling:,.1f} bytes/s of text, if memory were never idle"),
        ("state", f"{size(cost.state_bytes)} of caches and recent states"),
    ]
    for stage in cost.stages.values():
        if stage.left_out:
            embedding = f"the {stage.stage}'s byte embedding, {size(stage.left_out)}"
            fields.append(("left out", f"{embedding}: one row of it is read"))
    print_fields(fields)


def _show_case(case: Case) -> None:
    prefill, decode = case.prefill, case.decode
    chunks = counted(prefill.chunks, "chunk")
    patches = f"{case.bytes_per_patch:.2f} bytes each" if case.bytes_per_patch else "none ended"
    fields = [
        ("load", f"{case.load_seconds:.2f} s"),
        (
            "prefill",
            f"{prefill.bytes_per_second.mean_and_deviation} bytes/s, "
            f"{case.prompt_bytes:,} bytes in {chunks}, {prefill.milliseconds_per_chunk:.2f} ms for one of "
            f"{prefill.chunk_ids}",
        ),
        ("first byte", f"after {case.first_byte_milliseconds.mean_and_deviation} ms"),
        (
            "decode",
            f"{decode.bytes_per_second.mean_and_deviation} bytes/s, "
            f"{decode.patches_per_second:,.1f} patches/s",
        ),
        ("patches", patches),
        ("ceiling", f"{case.ceiling_reached:.0%} reached"),
    ]
    if decode.speculation is not None:
        accepted, bytes_per_round = _speculation(case)
        guesses = f"{accepted} of {decode.speculation.drafted:,} guesses accepted"
        told = f"{guesses}, {bytes_per_round} bytes a round" if accepted else "nothing was guessed"
        fields.append(("drafts", f"{case.draft}: {told}"))
    peak, private = size(case.peak_resident_bytes), size(case.peak_private_bytes)
    fields.append(("memory", f"{peak} resident at peak, {private} of it in no file"))
    print_fields(fields)
    click.echo()
    _show_latencies(decode)
    click.echo()
    rows = []
    for name, share in decode.shares.items():
        cells = ("", "", "")
        if name in decode.stages:
            runs = decode.stages[name]
            milliseconds = f"{runs.milliseconds_per_call:.3f}"
            cells = (f"{runs.calls_per_byte:.3f}", f"{runs.rows_per_call:.2f}", milliseconds)
        rows.append((name, f"{prefill.shares.get(name, 0.0):.1%}", f"{share:.1%}", *cells))
    print_table(("time in", ">prefill", ">decode", ">runs/byte", ">rows/run", ">ms/run"), rows)


def _show_latencies(decode: Decode) -> None:
    names = ("min", "mean", "p50", "p90", "p95", "p99", "max")
    parts = {
        "every byte": decode.milliseconds_per_byte,
        "inside a patch": decode.inside_patch,
        "ending a patch": decode.ending_patch,
    }
    rows = [
        (what, f"{latency.count:,}", *(f"{getattr(latency, name):.3f}" for name in names))
        for what, latency in parts.items()
        if latency is not None
    ]
    print_table(("ms/byte", ">bytes", *(f">{name}" for name in names)), rows)
    if decode.shared_bytes:
        click.echo(
            f"{decode.shared_bytes:,} of {decode.milliseconds_per_byte.count:,} bytes came several at once, "
            "by drafts: each counts with an even share of their time"
        )


def _show_sweep(cases: Sequence[Case]) -> None:
    speeds: dict[str, Callable[[Case], str]] = {
        "prefill": lambda case: case.prefill.bytes_per_second.mean_and_deviation,
        "first": lambda case: case.first_byte_milliseconds.mean_and_deviation,
        "decode": lambda case: case.decode.bytes_per_second.mean_and_deviation,
        "p50": lambda case: f"{case.decode.milliseconds_per_byte.p50:.3f}",
        "p99": lambda case: f"{case.decode.milliseconds_per_byte.p99:.3f}",
        "ceiling": lambda case: f"{case.cost.ceiling_bytes_per_second:,.1f}",
        "reached": lambda case: f"{case.ceiling_reached:.0%}",
    }
    _print_cases(cases, speeds)
    click.echo("prefill, decode, ceiling: bytes/s; first byte, p50, p99: ms\n")
    # What is left comes last, whichever stages the first case has.
    stages = dict.fromkeys(name for case in cases for name in case.decode.shares)
    shares = {name: _share_of(name) for name in sorted(stages, key=lambda name: name == "other")}
    if any(case.decode.speculation for case in cases):
        shares["accepted"] = lambda case: _speculation(case)[0]
        shares["bytes/round"] = lambda case: _speculation(case)[1]
    _print_cases(cases, shares)
    click.echo("shares of the time of decoding\n")
    memory: dict[str, Callable[[Case], str]] = {
        "read": lambda case: size(case.cost.read_per_byte),
        "state": lambda case: size(case.state_bytes),
        "peak": lambda case: size(case.peak_resident_bytes),
        "private": lambda case: size(case.peak_private_bytes),
        "load": lambda case: f"{case.load_seconds:.2f} s",
    }
    _print_cases(cases, memory)
    click.echo("read by a byte; peak, private: most memory of the process since loading")


def _share_of(stage: str) -> Callable[[Case], str]:
    return lambda case: f"{case.decode.shares.get(stage, 0.0):.1%}"


def _print_cases(cases: Sequence[Case], columns: Mapping[str, Callable[[Case], str]]) -> None:
    rows = []
    for case in cases:
        threads = "" if case.threads is None else str(case.threads)
        cells = (cell(case) for cell in columns.values())
        rows.append((threads, case.draft, f"{case.prompt_bytes:,}", *cells))
    print_table(("threads", "draft", ">prompt", *(f">{name}" for name in columns)), rows)


def _speculation(case: Case) -> tuple[str, str]:
    speculation = case.decode.speculation
    if speculation is None or speculation.acceptance is None or speculation.bytes_per_round is None:
        return "", ""
    return f"{speculation.acceptance:.1%}", f"{speculation.bytes_per_round:.2f}"
