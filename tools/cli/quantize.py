"""`blt-edge quantize`: a float32 bundle at lower precision."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import Session, print_table, progress_bar, size
from .documents import finish_written
from .options import BundleDirectory, OneOf, SeveralFilesCommand, json_option, tolerance_options, verbosity
from .quantize_options import Integers, integer_options, note_unused
from .reference import check_tolerances, original, validate_written

if TYPE_CHECKING:
    from ...runtime.manifest import Manifest

__all__ = ["command"]


@verbosity
@click.command("quantize", cls=SeveralFilesCommand)
@click.argument("bundle", type=BundleDirectory(), metavar="BUNDLE")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Bundle to write.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    metavar="WORD|LIST",
    help="fp16, int8, int8w or int4, a mix over the stages each; or stages by name, such as "
    "patcher=fp32,encoder=int8,latent=int4,decoder=int8; or both: int4,decoder=int8w.",
)
@click.option(
    "--tables",
    type=OneOf(["auto", "keep", "fp32", "fp16", "int8", "int4"]),
    default="auto",
    show_default=True,
    help="Precision of the embedding tables; auto is int8 where a stage becomes integers, else keep.",
)
@integer_options
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@click.option("--no-validate", is_flag=True, help="Don't compare the new bundle with BUNDLE.")
@tolerance_options
@json_option
@click.pass_obj
def command(
    session: Session,
    /,
    bundle: Path,
    output: Path | None,
    precision: str,
    tables: str,
    force: bool,
    no_validate: bool,
    rtol: float | None,
    atol: float | None,
    json_file: Path | None,
    **integers: Any,
) -> None:
    """Write a bundle at lower precision: FP16, INT8, INT4, smaller tables.

    BUNDLE is a float32 one. Norms, softmax, caches, entropies and logits stay float32. Weights stream one by
    one. int8 is for weights and activations, whose ranges are collected on --calibration; int8w and int4 are
    for weights in blocks. The new bundle appears whole or not at all; `blt-edge compare` tells what it costs.

    Afterwards it is compared with BUNDLE on a short text. If they differ by more than this precision may, the
    exit code is 1; the new bundle is kept, and its manifest says so. stdout carries its path.
    """
    check_tolerances(rtol, atol)
    if output is None:
        raise click.UsageError("--output is missing; give the name of a new directory")
    options = Integers(**integers).options()
    from ...export.quantize import quantize_bundle
    from ...graphs.precision import parse_precision
    from ...runtime.manifest import load_manifest

    before = load_manifest(bundle)
    note_unused(session, parse_precision(precision, list(before.stages)))
    with progress_bar(session) as progress:
        path = quantize_bundle(
            bundle,
            output,
            precision=precision,
            tables=_tables(tables, precision, before),
            quantization=options,
            force=force,
            progress=progress,
        )
    if not session.quiet and sys.stderr is not None:
        _show(before, load_manifest(path))
    session.say(f"wrote {path}; blt-edge compare {bundle} {path} --text FILE measures the loss")
    check = partial(validate_written, path, original(bundle, before), session, rtol, atol)
    finish_written(session, path, json_file, None if no_validate else check)


def _tables(word: str, precision: str, manifest: Manifest) -> str | None:
    if word not in ("auto", "keep"):
        return word
    from ...graphs.precision import parse_precision

    found = set(parse_precision(precision, list(manifest.stages)).values())
    integers = bool(found - {"fp32", "fp16"}) and manifest.embedding.precision in ("fp32", "fp16")
    return "int8" if word == "auto" and integers else None


def _show(before: Manifest, after: Manifest) -> None:
    rows = []
    for name, stage in after.stages.items():
        old = before.stages[name]
        sizes = [
            sum(manifest.files[file].bytes for file in (spec.file, spec.data))
            for manifest, spec in ((before, old), (after, stage))
        ]
        rows.append((f"{name} graph", stage.precision, *map(size, sizes)))
    rows.append(
        (
            "embedding tables",
            after.embedding.precision,
            size(before.embedding.bytes),
            size(after.embedding.bytes),
        )
    )
    totals = [sum(file.bytes for file in manifest.files.values()) for manifest in (before, after)]
    rows.append(("bundle", "", *map(size, totals)))
    print_table(("part", "precision", ">before", ">after"), rows, sys.stderr, total=True)
