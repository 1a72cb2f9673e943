"""`blt-edge export`: checkpoint to bundle, and the bundle compared with the checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ...runtime.names import STAGES
from ..output import Messages, count, echo, printable, progress_bar, size, status
from ..tables import print_table
from .documents import blocks_told, finish_written, write_json
from .options import (
    STDIN,
    CheckpointSource,
    OneOf,
    Rows,
    TemplateFile,
    expanded,
    json_option,
    needed,
    option,
    tolerance_options,
    verb,
)
from .quantize import precision_option, quantization, quantization_options
from .validate import ReferenceChoice, check_tolerances, checkpoint_reference, validate_written

if TYPE_CHECKING:
    from ...export import ExportPlan
    from ...export.quantize import QuantizationOptions


@verb("export", "demo -o demo-bundle", "path/to/checkpoint -o bundle --precision int4")
@click.argument("source", type=CheckpointSource(), metavar="MODEL")
@needed(option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Bundle to write."))
@option(
    "--revision",
    type=str,
    metavar="REV",
    shown="the hub's main branch",
    help="Branch, tag or commit of a hub id, as in owner/name@REV.",
)
@precision_option("fp32, fp16, int8, int8w or int4")
@option(
    "--tables",
    type=OneOf(("auto", "fp32", "fp16", "int8", "int4")),
    default="auto",
    help="Precision of the embedding tables; auto is int8 where a stage becomes integers, else fp16 unless "
    "the checkpoint's own are float32.",
)
@option(
    "--context",
    type=int,
    shown="what the config says",
    help="Length in ids that the model was trained on; `score` takes windows of it.",
)
@quantization_options
@option(
    "--rows",
    type=Rows(),
    metavar="N,N,...",
    shown="none",
    help="Write packed graphs, too, for so many texts at once, each 2 to 64. An engine has its own (build).",
)
@option(
    "--chat-template",
    type=TemplateFile(),
    metavar="FILE",
    shown="the checkpoint's own, if any",
    help="Keep this jinja2 template in the bundle, with which `serve` answers chats; none keeps none.",
)
@option("--force", help="Replace a bundle that is there already.")
@option("--no-validate", help="Don't compare the bundle with the checkpoint.")
@tolerance_options
@option("--dry-run", help="Print what would be written and needed, and write nothing.")
@json_option
def command(
    messages: Messages,
    source: str,
    output: Path | None,
    revision: str | None,
    precision: str,
    tables: str,
    context: int | None,
    rows: tuple[int, ...] | None,
    chat_template: str | None,
    force: bool,
    no_validate: bool,
    rtol: float | None,
    atol: float | None,
    json_file: Path | None,
    dry_run: bool,
    **quantizing: Any,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs, and check it.

    MODEL is a folder in the Hugging Face or Meta's layout, a hub id owner/name or owner/name@REV, or `demo`,
    the small checkpoint that comes with this package. The bundle appears whole or not at all.

    Afterwards the bundle is compared with the checkpoint in transformers where that is installed, else with
    golden.safetensors beside the checkpoint. If it differs, the exit code is 1; the bundle is kept, and its
    manifest says so. stdout carries the bundle's path.
    """
    check_tolerances(rtol, atol)
    if revision is not None:
        source = _with_revision(source, revision)
    from ...export import export_checkpoint
    from ...export.bundle import check_output

    # What is wrong shows before a checkpoint of gigabytes is fetched.
    if not dry_run:
        if output is None:
            raise click.UsageError("--output is missing; give the name of a new directory")
        check_output(output, force)
    how = quantization(quantizing, precision, STAGES, messages)
    plan = _plan(messages, source, precision, tables, how, chat_template)
    if dry_run:
        write_json(json_file, _document(plan))
        if json_file != STDIN:
            _show_plan(plan, output, sys.stdout)
            _show_comparison(_reference(plan), sys.stdout)
        return
    assert output is not None
    if not messages.quiet and sys.stderr is not None:
        _show_plan(plan, output, sys.stderr)
    if plan.generation.left_out:
        messages.note(f"generation settings without effect here: {', '.join(plan.generation.left_out)}")
    with progress_bar(messages) as progress:
        path = export_checkpoint(
            source,
            output,
            precision=precision,
            tables=tables,
            context=context,
            quantization=how,
            rows=rows or (),
            chat_template=chat_template,
            force=force,
            progress=progress,
        )
    written = sum(file.stat().st_size for file in path.iterdir())
    messages.say(f"wrote {path}, {size(written)}")
    check = partial(validate_written, path, _reference(plan), messages, rtol, atol)
    finish_written(messages, path, json_file, None if no_validate else check)


def _with_revision(source: str, revision: str) -> str:
    if source == "demo" or expanded(source).is_dir():
        raise click.UsageError(f"--revision is of a hub id; {source} is none")
    if "@" in source:
        raise click.UsageError(f"--revision: {source} names one already; give only one of them")
    return f"{source}@{revision}"


def _plan(
    messages: Messages,
    source: str,
    precision: str,
    tables: str,
    how: QuantizationOptions,
    chat_template: str | None,
) -> ExportPlan:
    from ...export import plan_export

    plan = partial(
        plan_export,
        source,
        precision=precision,
        tables=tables,
        quantization=how,
        chat_template=chat_template,
    )
    if source == "demo" or expanded(source).is_dir():
        with status(messages, f"reading {source}"):
            return plan()
    # The hub's client draws its own progress.
    if messages.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    messages.say(f"fetching {source}")
    return plan()


def _document(plan: ExportPlan) -> dict[str, Any]:
    precisions = {**plan.precisions, "tables": plan.tables}
    sizes = {**plan.graph_bytes, "tables": plan.table_bytes}
    return {
        "source": plan.name,
        "layout": plan.layout,
        "bytes": plan.total_bytes,
        "parts": {
            part: {"precision": precisions[part], "parameters": plan.parameters[part], "bytes": bytes_}
            for part, bytes_ in sizes.items()
        },
        "peak_memory_bytes": plan.peak_memory,
        "chat_template": plan.chat and {"file": plan.chat.origin, "eos": plan.chat.spec.eos},
    }


def _show_plan(plan: ExportPlan, output: Path | None, file: IO[str]) -> None:
    rows = [
        (f"{stage} graph", count(plan.parameters[stage]), plan.precisions[stage], size(bytes_))
        for stage, bytes_ in plan.graph_bytes.items()
    ]
    rows.append(("embedding tables", count(plan.parameters["tables"]), plan.tables, size(plan.table_bytes)))
    rows.append(("bundle", count(sum(plan.parameters.values())), "", size(plan.total_bytes)))
    echo(f"{plan.name} ({plan.layout} layout)", file)
    print_table(("part", ">parameters", "precision", ">size"), rows, file, total=True)
    spec = plan.quantization
    blocks = spec and blocks_told(spec.block_size, spec.block_sizes)
    if blocks:
        echo(blocks, file)
    if plan.chat is not None:
        echo(printable(f"chat template: {plan.chat.origin}; {plan.chat.eos}"), file)
    folder = Path.cwd() if output is None else output.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    echo(f"peak memory about {size(plan.peak_memory)}; {size(free)} of disk are free", file)


def _reference(plan: ExportPlan) -> ReferenceChoice:
    return checkpoint_reference(plan.folder, plan.layout, sum(plan.parameters.values()))


def _show_comparison(chosen: ReferenceChoice, file: IO[str]) -> None:
    what = chosen.path.name if chosen.kind == "golden" else chosen.kind
    why = f": {chosen.reasons}" if chosen.why_not else ""
    echo(f"would be compared with {what}{why}", file)
