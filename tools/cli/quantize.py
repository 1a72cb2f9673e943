"""`blt-edge quantize`: a float32 bundle at lower precision; and the options that it shares with export."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ...runtime.names import BLOCK_PRECISIONS, CALIBRATION_METHODS, SEARCHES
from ..memory import running_memory
from ..output import Messages, echo, progress_bar, size
from ..tables import GrowingTable, print_table
from .documents import blocks_told, finish_written, mix_told
from .options import (
    STDIN,
    BlockSize,
    F,
    MemorySize,
    OneOf,
    TextSource,
    bundle_argument,
    json_option,
    needed,
    option,
    options,
    tolerance_options,
    verb,
)
from .validate import bundle_reference, check_tolerances, validate_written

if TYPE_CHECKING:
    from ...export.patcher_mix import MixFigures
    from ...export.quantize import QuantizationOptions
    from ...runtime.manifest import Manifest

_MIX_HELP = (
    "a mix over the stages each; or stages by name, such as latent=int4,decoder=int8; or both: "
    "int4,decoder=int8w."
)

_SHRINKING = ("int8w", "int4")
"""What is taken where no precision is given, best first: on the demo int8w costs 0.0001 bits per byte, is as
fast as int4, and needs no calibration."""

_FOR = {
    "block_size": BLOCK_PRECISIONS,
    "search": ("int8", *BLOCK_PRECISIONS),
    **dict.fromkeys(("texts", "method", "windows", "smooth", "seed"), ("int8",)),
}
"""Fields of `QuantizationOptions` by option, and the precisions of a stage for which each says something."""

_SEARCHED = ("texts", "windows", "seed")
"""Those that a search for --target-boundaries reads."""

quantization_options = options(
    option(
        "--block-size",
        type=BlockSize(),
        metavar="N|auto",
        shown="auto",
        help="Weights that share a scale in int8w and int4 stages: 32, 64 or 128. auto takes for "
        "matrices of 524,288 weights or more the most that divide their inputs, else 32.",
    ),
    option(
        "--search",
        type=OneOf(SEARCHES),
        default="mse",
        help="How weight scales are found: by squared error, or rounding to nearest.",
    ),
    option(
        "--calibration",
        "texts",
        type=TextSource(),
        multiple=True,
        metavar="FILE...",
        shown="English and multilingual text that comes with the package",
        help="Texts, and folders of them, that ranges of int8 activations are collected on.",
    ),
    option(
        "--calibration-method",
        "method",
        type=OneOf(CALIBRATION_METHODS),
        default="mse",
        help="How a range is chosen from what was seen.",
    ),
    option(
        "--windows",
        type=int,
        shown="enough for every language of the bundled text",
        help="Windows of the calibration texts that are read.",
    ),
    option(
        "--smooth",
        type=float,
        shown="off",
        help="Move the ranges of int8 activations into the weights before, 0 to 1 (SmoothQuant's alpha).",
    ),
    option("--seed", type=int, default=0, help="What chooses the windows."),
    title="Quantization",
)
"""Passed by the names of `QuantizationOptions`' fields."""


def precision_option(words: str, default: str | None = "fp32", shown: str = "") -> Callable[[F], F]:
    """--precision, for a verb that takes `words`; shown: what a default of None means."""
    text = f"{words}, {_MIX_HELP}"
    return option("--precision", type=str, metavar="WORD|LIST", default=default, shown=shown, help=text)


def quantization(
    given: Mapping[str, Any], precision: str, stages: Sequence[str], messages: Messages
) -> QuantizationOptions:
    """What was given, as the library takes it. Says which options change nothing at this precision."""
    if STDIN in given["texts"]:
        raise click.UsageError("--calibration: stdin can't be read in windows; give files")
    from ...export.quantize import QuantizationOptions
    from ...graphs.precision import parse_precision

    found = QuantizationOptions(**{name: value for name, value in given.items() if value not in (None, ())})
    precisions = set(parse_precision(precision, stages).values())
    context, searching = click.get_current_context(), found.target_boundaries is not None
    for one in context.command.params:
        needed = () if searching and one.name in _SEARCHED else _FOR.get(str(one.name), ())
        typed = context.get_parameter_source(str(one.name)) is ParameterSource.COMMANDLINE
        if typed and needed and not set(needed) & precisions:
            messages.note(f"note: {one.opts[0]} changes nothing: no stage is {' or '.join(needed)}")
    return found


@verb("quantize", "bundle -o small --precision int4", "bundle -o small --precision int8 --calibration texts/")
@bundle_argument
@needed(option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Bundle to write."))
@precision_option("fp16, int8, int8w or int4", None, "int8w; with --tables, only these are changed")
@option(
    "--tables",
    type=OneOf(("auto", "keep", "fp32", "fp16", "int8", "int4")),
    default="auto",
    help="Precision of the embedding tables; auto is int8 where a stage becomes integers, else keep.",
)
@option(
    "--max-memory",
    type=MemorySize(),
    metavar="SIZE",
    shown="no limit",
    help=f"In place of --precision: the first of {' and '.join(_SHRINKING)} that runs within SIZE by the "
    "estimate, such as 800MB; the memory-mapped tables are not counted.",
)
@quantization_options
@option(
    "--target-boundaries",
    type=float,
    shown="off",
    help="Search for the most of an int8w or int4 patcher that can be in 4 bits while this share of patch "
    "boundaries, 0 to 1, stays where float32 has them, on --calibration.",
)
@option("--force", help="Replace a bundle that is there already.")
@option("--no-validate", help="Don't compare the new bundle with BUNDLE.")
@tolerance_options
@json_option
def command(
    messages: Messages,
    bundle: Path,
    output: Path | None,
    precision: str | None,
    tables: str,
    max_memory: int | None,
    force: bool,
    no_validate: bool,
    rtol: float | None,
    atol: float | None,
    json_file: Path | None,
    **quantizing: Any,
) -> None:
    """Write a bundle at lower precision: FP16, INT8, INT4, smaller tables.

    BUNDLE is a float32 one. Norms, softmax, caches, entropies and logits stay float32. Weights stream one by
    one. int8 is for weights and activations, whose ranges are collected on --calibration; int8w and int4 are
    for weights in blocks. The new bundle appears whole or not at all; `blt-edge compare` tells what it costs.

    Afterwards it is compared with BUNDLE on some 6 KB of English. If they differ by more than this precision
    may, the exit code is 1, and the line says what to try; the new bundle is kept, and its manifest says so.
    stdout carries its path.
    """
    check_tolerances(rtol, atol)
    if output is None:
        raise click.UsageError("--output is missing; give the name of a new directory")
    from ...export.quantize import quantize_bundle
    from ...runtime.manifest import load_manifest

    before = load_manifest(bundle)
    if precision is not None and max_memory is not None:
        raise click.UsageError("--precision and --max-memory are both given; give one of them")
    why = None
    if max_memory is not None:
        precision, why = _fitting(bundle, before, max_memory)
    elif precision is None:
        precision = _SHRINKING[0] if tables in ("auto", "keep") else "fp32"
        if precision != "fp32":
            why = "it loses least of those that shrink; int4 is smaller"
    how = quantization(quantizing, precision, tuple(before.stages), messages)
    with progress_bar(messages) as progress:
        path = quantize_bundle(
            bundle,
            output,
            precision=precision,
            tables=_tables(tables, precision, before),
            quantization=how,
            force=force,
            progress=progress,
            tell=None if messages.quiet or sys.stderr is None else _MixTable().row,
        )
    if why is not None:  # said when it is true: the bundle or the output might have been refused
        messages.say(f"took --precision {precision}: {why}")
    if not messages.quiet and sys.stderr is not None:
        _show(before, load_manifest(path))
    messages.say(f"wrote {path}; blt-edge compare {bundle} {path} --text FILE measures the loss")
    check = partial(validate_written, path, bundle_reference(bundle, before), messages, rtol, atol)
    finish_written(messages, path, json_file, None if no_validate else check)


class _MixTable:
    """What a search for a mix measures, row by row."""

    def __init__(self) -> None:
        columns = ("4-bit matrices", ">patcher", ">boundaries kept", ">confirmed", ">its bits per byte")
        self._table = GrowingTable(
            columns, ("100 of 100", "100.0 MB", "99.99 %", "99.99 %", "0.0000"), err=True
        )

    def row(self, figures: MixFigures) -> None:
        """Show one candidate."""
        confirmed = "" if figures.confirmed is None else f"{figures.confirmed:.2%}"
        self._table.row(
            (
                f"{figures.narrow} of {figures.matrices}",
                size(figures.bytes),
                f"{figures.boundaries:.2%}",
                confirmed,
                f"{figures.bits_per_byte:.4f}",
            )
        )


def _fitting(bundle: Path, manifest: Manifest, limit: int) -> tuple[str, str]:
    """The first precision of `_SHRINKING` that runs within so many bytes, and what it takes."""
    for precision in _SHRINKING:
        needed = planned_memory(bundle, manifest, precision)
        if needed <= limit:
            return precision, f"about {size(needed)} while it runs"
    raise click.UsageError(
        f"--max-memory: even {precision} takes about {size(needed)}, {size(limit)} are allowed; take a "
        "smaller model"
    )


def planned_memory(bundle: Path, manifest: Manifest, precision: str) -> int:
    """Bytes that a float32 bundle at this precision will take while it runs a text of the trained length."""
    from ...export.bundle import bundle_stage
    from ...export.quantize import QuantizationOptions, plan_stages
    from ...graphs.precision import parse_precision

    words = parse_precision(precision, list(manifest.stages))
    planned = plan_stages(
        words, QuantizationOptions(), lambda stage: bundle_stage(bundle, manifest.stages[stage])
    )
    files = dict(manifest.files)
    for stage, plan in planned.items():
        data = manifest.stages[stage].data
        files[data] = replace(files[data], bytes=plan.bytes)
    stages = {name: replace(spec, precision=words[name]) for name, spec in manifest.stages.items()}
    changed = replace(manifest, stages=stages, files=files)
    return sum(running_memory(changed, prepared=False, positions=manifest.model.trained_context).values())


def _tables(word: str, precision: str, manifest: Manifest) -> str | None:
    if word not in ("auto", "keep"):
        return word
    from ...graphs.precision import parse_precision

    found = set(parse_precision(precision, list(manifest.stages)).values())
    integers = bool(found - {"fp32", "fp16"}) and manifest.embedding.precision in ("fp32", "fp16")
    return "int8" if word == "auto" and integers else None


def _show(before: Manifest, after: Manifest) -> None:
    pair = (before, after)
    rows = [
        (f"{name} graph", "+".join(after.precisions_of(name)), *(size(one.stage_bytes(name)) for one in pair))
        for name in after.stages
    ]
    tables = (size(one.embedding.bytes) for one in pair)
    rows.append(("embedding tables", after.embedding.precision, *tables))
    rows.append(("bundle", "", *(size(one.total_bytes) for one in pair)))
    print_table(("part", "precision", ">before", ">after"), rows, sys.stderr, total=True)
    how = after.quantization
    blocks = how and blocks_told(how.block_size, how.block_sizes)
    if blocks:
        echo(blocks, sys.stderr)
    if how and how.mix:
        echo(mix_told(how.mix), sys.stderr)
