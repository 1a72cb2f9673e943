"""`blt-edge export`: checkpoint to bundle, and the bundle compared with the checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..output import Session, count, print_table, progress_bar, size, status
from .documents import finish_written, write_json
from .options import STDIN, CheckpointSource, OneOf, SeveralFilesCommand, json_option, tolerance_options, verb
from .quantize_options import Integers, integer_options, note_unused
from .reference import Yardstick, check_tolerances, checkpoint_folder, choose, validate_written

if TYPE_CHECKING:
    from ...export import ExportPlan
    from ...export.quantize import QuantizationOptions

__all__ = ["command"]


@verb("export", SeveralFilesCommand)
@click.argument("source", type=CheckpointSource(), metavar="MODEL")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Bundle to write.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    metavar="WORD|LIST",
    help="fp32, fp16, int8, int8w or int4, a mix over the stages each; or stages by name, such as "
    "patcher=fp32,encoder=int8,latent=int4,decoder=int8; or both: int4,decoder=int8w.",
)
@click.option(
    "--tables",
    type=OneOf(["auto", "fp32", "fp16", "int8", "int4"]),
    default="auto",
    show_default=True,
    help="Precision of the embedding tables; auto is int8 where a stage becomes integers, else fp16 unless "
    "the checkpoint's own are float32.",
)
@click.option(
    "--context",
    type=int,
    metavar="N",
    show_default="what the config says",
    help="Length in ids that the model was trained on; `score` takes windows of it.",
)
@integer_options
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@click.option("--no-validate", is_flag=True, help="Don't compare the bundle with the checkpoint.")
@tolerance_options
@click.option("--dry-run", is_flag=True, help="Print what would be written and needed, and write nothing.")
@json_option
def command(
    session: Session,
    source: str,
    output: Path | None,
    precision: str,
    tables: str,
    context: int | None,
    force: bool,
    no_validate: bool,
    rtol: float | None,
    atol: float | None,
    json_file: Path | None,
    dry_run: bool,
    **integers: Any,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs, and check it.

    MODEL is a folder in the Hugging Face or Meta's layout, a hub id owner/name, or `demo`, the small
    checkpoint that comes with this package. The bundle appears whole or not at all.

    Afterwards the bundle is compared with the checkpoint in transformers where that is installed, else with
    golden.safetensors beside the checkpoint. If it differs, the exit code is 1; the bundle is kept, and its
    manifest says so. stdout carries the bundle's path.
    """
    check_tolerances(rtol, atol)
    options = Integers(**integers).options()
    if not dry_run:
        _check_output(output, force)
    from ...export import export_checkpoint
    from ...graphs.precision import parse_precision
    from ...runtime.names import STAGES

    # A wrong word shows before the checkpoint is opened.
    note_unused(session, parse_precision(precision, STAGES))
    plan = _plan(session, source, precision, tables, options)
    if dry_run:
        if json_file is not None:
            write_json(json_file, _planned(plan))
        if json_file != STDIN:
            _show_plan(plan, output, sys.stdout)
            _show_comparison(plan, source, sys.stdout)
        return
    assert output is not None
    if not session.quiet and sys.stderr is not None:
        _show_plan(plan, output, sys.stderr)
    with progress_bar(session) as progress:
        path = export_checkpoint(
            source,
            output,
            precision=precision,
            tables=tables,
            context=context,
            quantization=options,
            force=force,
            progress=progress,
        )
    written = sum(file.stat().st_size for file in path.iterdir())
    session.say(f"wrote {path}, {size(written)}")
    check = partial(validate_written, path, _yardstick(plan, source), session, rtol, atol)
    finish_written(session, path, json_file, None if no_validate else check)


def _check_output(output: Path | None, force: bool) -> None:
    """Refuse an output before a checkpoint of gigabytes is fetched for it; the export checks it again."""
    if output is None:
        raise click.UsageError("--output is missing; give the name of a new directory")
    if os.path.lexists(output) and not force:
        raise click.UsageError(
            f"--output {output} exists; give a new name, or --force to replace a bundle that is there"
        )
    parent = Path(os.path.abspath(output)).parent  # noqa: PTH100 - resolve() would follow a link at the output
    if not parent.is_dir():
        raise click.UsageError(f"--output {output}: the directory {parent} does not exist; create it first")


# 1. What will be written.


def _plan(
    session: Session, source: str, precision: str, tables: str, options: QuantizationOptions
) -> ExportPlan:
    from ...export import plan_export

    if source == "demo" or Path(source).expanduser().is_dir():
        with status(session, f"reading {source}"):
            return plan_export(source, precision=precision, tables=tables, quantization=options)
    # The hub's client draws its own progress.
    if session.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    session.say(f"fetching {source}")
    return plan_export(source, precision=precision, tables=tables, quantization=options)


def _planned(plan: ExportPlan) -> dict[str, Any]:
    parts = {
        stage: {
            "precision": plan.precisions[stage],
            "parameters": plan.parameters[stage],
            "bytes": bytes_,
        }
        for stage, bytes_ in plan.graph_bytes.items()
    }
    tables = {"precision": plan.tables, "parameters": plan.parameters["tables"], "bytes": plan.table_bytes}
    return {
        "source": plan.name,
        "layout": plan.layout,
        "bytes": plan.total_bytes,
        "parts": {**parts, "tables": tables},
        "peak_memory_bytes": plan.peak_memory,
    }


def _show_plan(plan: ExportPlan, output: Path | None, file: IO[str]) -> None:
    rows = [
        (f"{stage} graph", count(plan.parameters[stage]), plan.precisions[stage], size(bytes_))
        for stage, bytes_ in plan.graph_bytes.items()
    ]
    rows.append(("embedding tables", count(plan.parameters["tables"]), plan.tables, size(plan.table_bytes)))
    rows.append(("bundle", count(sum(plan.parameters.values())), "", size(plan.total_bytes)))
    file.write(f"{plan.name} ({plan.layout} layout)\n")
    print_table(("part", ">parameters", "precision", ">size"), rows, file, total=True)
    free = shutil.disk_usage(_existing_parent(output)).free
    file.write(f"peak memory about {size(plan.peak_memory)}; {size(free)} of disk are free\n")


def _existing_parent(output: Path | None) -> Path:
    path = Path.cwd() if output is None else output.absolute().parent
    while not path.is_dir():
        path = path.parent
    return path


def _show_comparison(plan: ExportPlan, source: str, file: IO[str]) -> None:
    yardstick = _yardstick(plan, source)
    what = {"transformers": "transformers", "golden": yardstick.path.name, "nothing": "nothing"}[
        yardstick.kind
    ]
    why = f": {yardstick.reasons}" if yardstick.why_not else ""
    file.write(f"would be compared with {what}{why}\n")


# 2. What was written, compared.


def _yardstick(plan: ExportPlan, source: str) -> Yardstick:
    return choose(checkpoint_folder(source), plan.layout, sum(plan.parameters.values()))
