"""A profile as people read it: the cost card, then what was measured, then what to doubt.

`blt-edge profile`: what a byte costs, how long it takes, and how near that is to what memory allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.files import write_whole
from ...runtime.names import DEVICES, DRAFTS
from ..output import Session, print_fields, print_table, size, status
from .documents import check_plot, json_line, read_input, shown_name, write_json
from .options import STDIN, InputFile, OneOf, OutputFile, json_option, model_option, verb

if TYPE_CHECKING:
    from ..profile.measure import Case, Profile, ProfileOptions
    from ..profile.statistics import Figures

    NumbersType = click.ParamType[tuple[int, ...]]
    WordsType = click.ParamType[tuple[str, ...]]
else:  # generic from click 8.2 on
    NumbersType = WordsType = click.ParamType

__all__ = ["command", "show"]


def show(profile: Profile, doubts: Sequence[str]) -> None:
    """Print a profile on stdout."""
    _show_head(profile)
    click.echo()
    first = profile.cases[0]
    _show_cost(profile, first)
    click.echo()
    if len(profile.cases) == 1:
        _show_case(profile, first)
    else:
        _show_cases(profile)
    if doubts:
        click.echo()
    for doubt in doubts:
        click.echo(f"warning: {doubt}")


def _show_head(profile: Profile) -> None:
    machine, options = profile.machine, profile.options
    rounds = f"{options.repeat} round{'s' * (options.repeat != 1)}"
    warmup = f"{options.warmup} warm-up{'s' * (options.warmup != 1)}"
    print_fields(
        [
            ("bundle", f"{profile.path}, from {profile.manifest.source.name}"),
            (
                "machine",
                f"{machine['processor']}, {machine['cpus']} CPUs, {machine['system']}, "
                f"ONNX Runtime {machine['onnxruntime']}",
            ),
            *_board(profile),
            ("engine", profile.engine),
            ("measured", f"{rounds} of {options.new_bytes} greedy bytes after {warmup}"),
        ]
    )


def _board(profile: Profile) -> Iterator[tuple[str, str]]:
    jetson = profile.jetson
    if jetson is not None:
        memory = f", {size(jetson.memory)} shared by processors and GPU" if jetson.memory else ""
        clocks = {True: "fixed", False: "moving", None: "unknown"}[jetson.clocks_fixed]
        yield "board", f"{jetson.board}, JetPack {jetson.jetpack or 'unknown'}{memory}"
        yield "power", f"mode {jetson.power_mode or 'unknown'}, clocks {clocks}"


# 1. What a byte costs.


def _show_cost(profile: Profile, case: Case) -> None:
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
        for stage in cost.stages
    ]
    table = profile.manifest.embedding
    rows.append(
        ("tables", table.precision, f"{cost.table_rows} x {size(cost.row_bytes)}", "", "", size(cost.tables))
    )
    weights, cache = size(cost.weights_per_byte), size(cost.cache_per_byte)
    rows.append(("a byte", "", weights, cache, "", size(cost.per_byte)))
    print_table(("stage", "precision", ">weights", ">cache", ">runs/byte", ">read/byte"), rows, total=True)
    click.echo()
    fields = [
        ("bandwidth", f"{case.bandwidth.bytes_per_second / 1e9:.1f} GB/s: {case.bandwidth.method}"),
        ("ceiling", f"{cost.ceiling:,.1f} bytes/s of text, if memory were never idle"),
        ("state", f"{size(cost.state_bytes)} of caches and recent states"),
    ]
    print_fields([*fields, *_left_out(case)])


def _left_out(case: Case) -> Iterator[tuple[str, str]]:
    for stage in case.cost.stages:
        if stage.left_out:
            yield (
                "left out",
                f"the {stage.stage}'s byte embedding, {size(stage.left_out)}: one row of it is read",
            )


# 2. One case in full.


def _show_case(profile: Profile, case: Case) -> None:
    figures = case.figures
    chunks = f"{figures.prefill_chunks} chunk{'s' * (figures.prefill_chunks != 1)}"
    prefill = f"{figures.prefill.median:,.1f} bytes/s, {figures.prompt_bytes:,} bytes in {chunks}, "
    prefill += f"{1000 * figures.seconds_per_chunk:.2f} ms for one of {figures.chunk_ids}"
    speed = figures.decode
    decode = f"{speed.median:,.1f} bytes/s ({speed.low:,.1f} to {speed.high:,.1f}), "
    decode += f"{figures.patches_per_second:,.1f} patches/s"
    patch = figures.bytes_per_patch
    fields = [
        ("load", f"{case.load_seconds:.2f} s"),
        ("prefill", prefill),
        ("first byte", f"after {1000 * figures.first_byte.median:.2f} ms"),
        ("decode", decode),
        ("patches", f"{patch:.2f} bytes each" if patch else "none ended"),
        ("ceiling", f"{case.ceiling_reached:.0%} reached"),
    ]
    if figures.speculation is not None:
        fields.append(("drafts", _drafts(case)))
    peak, private = _size(case.peak_resident), _size(case.peak_private)
    fields.append(("memory", f"{peak} resident at peak, {private} of it in no file"))
    print_fields(fields)
    click.echo()
    _show_latencies(figures)
    if figures.shared_bytes:
        click.echo(
            f"{figures.shared_bytes:,} of {figures.byte_latency.count:,} bytes came several at once, by "
            "drafts: each counts with an even share of their time"
        )
    click.echo()
    _show_stages(case)


def _drafts(case: Case) -> str:
    speculation = case.figures.speculation
    assert speculation is not None
    accepted, bytes_per_round = _speculation(case)
    if not accepted:
        return f"{case.draft}: nothing was guessed"
    guesses = f"{accepted} of {speculation.drafted:,} guesses accepted"
    return f"{case.draft}: {guesses}, {bytes_per_round} bytes a round"


def _show_latencies(figures: Figures) -> None:
    names = ("min", "mean", "p50", "p90", "p95", "p99", "max")
    parts = {
        "every byte": figures.byte_latency,
        "inside a patch": figures.inside_patch,
        "ending a patch": figures.ending_patch,
    }
    rows = []
    for what, latency in parts.items():
        if latency is not None:
            values = latency.scaled(1000)
            rows.append((what, f"{latency.count:,}", *(f"{getattr(values, name):.3f}" for name in names)))
    print_table(("ms/byte", ">bytes", *(f">{name}" for name in names)), rows)


def _show_stages(case: Case) -> None:
    figures = case.figures
    rows = []
    for name, share in figures.decode_shares.items():
        stage = figures.stages.get(name)
        cells = ("", "", "")
        if stage is not None:
            milliseconds = 1000 * stage.seconds_per_call
            cells = (f"{stage.calls_per_byte:.3f}", f"{stage.rows_per_call:.2f}", f"{milliseconds:.3f}")
        rows.append((name, f"{figures.prefill_shares.get(name, 0.0):.1%}", f"{share:.1%}", *cells))
    print_table(("time in", ">prefill", ">decode", ">runs/byte", ">rows/run", ">ms/run"), rows)


# 3. A sweep.

_KEYS = ("threads", "draft", ">prompt")


def _show_cases(profile: Profile) -> None:
    _show_speeds(profile.cases)
    click.echo("prefill, decode, ceiling: bytes/s; first byte, p50, p99: ms")
    click.echo()
    _show_parts(profile.cases)
    click.echo("shares of the time of decoding")
    click.echo()
    _show_memory(profile.cases)
    click.echo("read by a byte; peak, private: most memory of the process since loading")


def _show_speeds(cases: Sequence[Case]) -> None:
    names = ("prefill", "first", "decode", "p50", "p99", "ceiling", "reached")
    rows = [
        (
            *_keys(case),
            f"{case.figures.prefill.median:,.0f}",
            f"{1000 * case.figures.first_byte.median:,.1f}",
            f"{case.figures.decode.median:,.1f}",
            f"{1000 * case.figures.byte_latency.p50:.3f}",
            f"{1000 * case.figures.byte_latency.p99:.3f}",
            f"{case.cost.ceiling:,.1f}",
            f"{case.ceiling_reached:.0%}",
        )
        for case in cases
    ]
    print_table((*_KEYS, *(f">{name}" for name in names)), rows)


def _show_parts(cases: Sequence[Case]) -> None:
    shares = list(dict.fromkeys(name for case in cases for name in case.figures.decode_shares))
    # What is left comes last, whichever stages the first case has.
    shares.sort(key=lambda name: name == "other")
    drafting = any(case.figures.speculation for case in cases)
    names = [*shares, *(("accepted", "bytes/round") if drafting else ())]
    rows = [
        (
            *_keys(case),
            *(f"{case.figures.decode_shares.get(name, 0.0):.1%}" for name in shares),
            *(_speculation(case) if drafting else ()),
        )
        for case in cases
    ]
    print_table((*_KEYS, *(f">{name}" for name in names)), rows)


def _show_memory(cases: Sequence[Case]) -> None:
    rows = [
        (
            *_keys(case),
            size(case.cost.per_byte),
            size(case.figures.state_bytes),
            _size(case.peak_resident),
            _size(case.peak_private),
            f"{case.load_seconds:.2f} s",
        )
        for case in cases
    ]
    print_table((*_KEYS, ">read", ">state", ">peak", ">private", ">load"), rows)


def _keys(case: Case) -> tuple[str, str, str]:
    return _threads(case.threads), case.draft, f"{case.figures.prompt_bytes:,}"


def _threads(threads: int | None) -> str:
    return "default" if threads is None else str(threads)


def _speculation(case: Case) -> tuple[str, str]:
    speculation = case.figures.speculation
    if speculation is None or speculation.acceptance is None or speculation.bytes_per_round is None:
        return "", ""
    return f"{speculation.acceptance:.1%}", f"{speculation.bytes_per_round:.2f}"


def _size(bytes_: int | None) -> str:
    return "unknown" if bytes_ is None else size(bytes_)


class Numbers(NumbersType):
    """Whole numbers, with commas between."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"got {value!r}; give a whole number, or several with commas between", param, ctx)


class Words(WordsType):
    """Some of a few words, with commas between."""

    name = "words"

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._one = OneOf(allowed)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The words."""
        if isinstance(value, tuple):
            return value
        return tuple(self._one.convert(part.strip(), param, ctx) for part in str(value).split(","))


@verb("profile")
@model_option
@click.option("--device", type=OneOf(DEVICES), default="auto", show_default=True, help="Where to run.")
@click.option(
    "--threads",
    type=Numbers(),
    multiple=True,
    metavar="N,...",
    show_default="as many as the engine likes",
    help="CPU threads; several values are a sweep, here and below.",
)
@click.option(
    "--prompt-bytes",
    type=Numbers(),
    multiple=True,
    default=["512"],
    metavar="N,...",
    show_default=True,
    help="Bytes of the prompt.",
)
@click.option(
    "--new-bytes",
    type=int,
    default=128,
    show_default=True,
    metavar="N",
    help="Bytes to generate after it, greedily.",
)
@click.option(
    "--draft",
    "drafts",
    type=Words(DRAFTS),
    multiple=True,
    default=["none"],
    metavar="SOURCE,...",
    show_default=True,
    help=f"Where guesses at the next bytes come from: {', '.join(DRAFTS)}.",
)
@click.option(
    "--draft-length",
    type=int,
    metavar="N",
    show_default="as many as pay",
    help="Guesses at a time, 1 to 32.",
)
@click.option(
    "--warmup", type=int, default=1, show_default=True, metavar="N", help="Rounds before those that count."
)
@click.option("--repeat", type=int, default=5, show_default=True, metavar="N", help="Rounds that count.")
@click.option(
    "--text",
    type=InputFile(),
    metavar="FILE",
    show_default="English prose that comes with the package",
    help="Prompts are the beginning of FILE; - is stdin.",
)
@json_option
@click.option(
    "--plot",
    type=OutputFile(),
    metavar="FILE",
    show_default="no picture",
    help="Draw latencies and shares, or speeds of a sweep, into FILE (.png, .svg or .pdf).",
)
@click.option(
    "--trace",
    type=OutputFile(),
    metavar="FILE",
    show_default="no trace",
    help="Write a timeline of the last round for chrome://tracing or Perfetto.",
)
def command(
    session: Session,
    model: Path,
    text: Path | None,
    json_file: Path | None,
    plot: Path | None,
    trace: Path | None,
    **settings: Any,
) -> None:
    """Measure where time goes, and how near it is to what memory allows.

    First what a byte of text must read from memory, and the bytes/s that this machine's read bandwidth,
    measured here and now, allows at most; then prefill, decoding, latencies and time by stage as they were.
    The bundle generates as `generate` does, so sampling and everything on the host counts. The last line of
    stdout is always one JSON document; with --json - it is the only one.
    """
    _check_outputs(json_file, plot, trace)
    options = _options(**settings)
    data = _text(text, session)
    from ..profile.measure import profile
    from ..profile.warnings import doubts

    with status(session) as say:
        measured = profile(model, data, options, say)
    reasons = doubts(measured)
    document = {**measured.to_dict(), "warnings": reasons}
    if json_file is not None and json_file != STDIN:
        write_json(json_file, document)
    if plot is not None:
        _draw(measured, plot)
    if trace is not None:
        from ..profile.trace import chrome_trace

        write_json(trace, chrome_trace(measured))
    if json_file == STDIN:
        for reason in reasons:
            session.say(f"warning: {reason}")
    else:
        show(measured, reasons)
        click.echo()
    click.echo(json_line(document))


def _check_outputs(json_file: Path | None, plot: Path | None, trace: Path | None) -> None:
    """Refuse what can't be written before minutes of measuring."""
    if trace == STDIN:
        raise click.UsageError("--trace: got -; give a file, stdout carries the figures")
    files = [path for path in (json_file, plot, trace) if path not in (None, STDIN)]
    if len(set(files)) < len(files):
        raise click.UsageError("--json, --plot and --trace: a file is given twice; give each its own")
    check_plot(plot)


def _options(
    *,
    threads: tuple[tuple[int, ...], ...],
    prompt_bytes: tuple[tuple[int, ...], ...],
    drafts: tuple[tuple[str, ...], ...],
    **single: Any,
) -> ProfileOptions:
    from ..profile.measure import ProfileOptions

    return ProfileOptions(
        threads=_flat(threads) or (None,),
        prompt_bytes=_flat(prompt_bytes),
        drafts=_flat(drafts),
        **single,
    )


def _flat(values: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """All values once, in the order given."""
    return tuple(dict.fromkeys(value for several in values for value in several))


def _text(path: Path | None, session: Session) -> bytes:
    if path is None:
        from ...calibration.data import bundled_texts

        return bundled_texts()[0].path.read_bytes()
    data = read_input(path, session, "the text")
    if not data:
        raise click.UsageError(f"--text: {shown_name(path)} is empty; there is nothing to take prompts from")
    return data


def _draw(measured: Profile, target: Path) -> None:
    from ..profile.plot import draw_profile

    kind = target.suffix.lower().lstrip(".")
    write_whole(target, lambda path: draw_profile(measured, path, kind))
