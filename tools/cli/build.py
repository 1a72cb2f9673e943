"""`blt-edge build`: a bundle's form for this device, or TensorRT engines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .display import print_table, progress_bar, size
from .documents import write_json
from .options import STDIN, MemorySize, OneOf, bundle_argument, json_option, verb
from .session import Session

if TYPE_CHECKING:
    from ...runtime.manifest import Manifest

__all__ = ["command"]

TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")

F = TypeVar("F", bound=Callable[..., Any])


def _tensorrt_options(function: F) -> F:
    """What engines are built for; None is what `TensorRtOptions` takes."""
    options = [
        click.option(
            "--compute-capability",
            multiple=True,
            metavar="X.Y",
            show_default="this machine's GPU",
            help="TensorRT-RTX: build for a GPU that need not be here, such as 8.6; repeat it for several.",
        ),
        click.option(
            "--max-bytes",
            type=int,
            metavar="N",
            show_default="all the model has",
            help="TensorRT: longest text.",
        ),
        click.option(
            "--max-patches",
            type=int,
            metavar="N",
            show_default="all the model was made for",
            help="TensorRT: most patches of a text; fewer take less GPU memory.",
        ),
        click.option(
            "--max-patch-length",
            type=int,
            metavar="N",
            show_default="the patching rule's, else 512",
            help="TensorRT: longest patch in bytes.",
        ),
        click.option(
            "--max-batch", type=int, metavar="N", show_default="1", help="TensorRT: texts at a time."
        ),
        click.option(
            "--prefill-chunk",
            type=int,
            metavar="N",
            show_default="256",
            help="TensorRT: bytes that one pass takes at most.",
        ),
        click.option(
            "--workspace",
            type=MemorySize(),
            metavar="SIZE",
            show_default="no limit",
            help="TensorRT: GPU memory that a layer may use to work in, such as 512MB.",
        ),
        click.option(
            "--optimization-level",
            type=int,
            metavar="N",
            show_default="TensorRT's own",
            help="TensorRT: how hard it tries, 0 to 5.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@verb("build")
@bundle_argument
@click.option(
    "--target",
    type=OneOf(TARGETS),
    default="onnxruntime",
    show_default=True,
    help="Engine to prepare the graphs for.",
)
@click.option("--force", is_flag=True, help="Build again what is there already.")
@click.option("--dry-run", is_flag=True, help="Print what would be written and needed, and write nothing.")
@_tensorrt_options
@json_option
def command(
    session: Session,
    bundle: Path,
    target: str,
    force: bool,
    dry_run: bool,
    json_file: Path | None,
    **tensorrt: Any,
) -> None:
    """Prepare a bundle for a device: runs and loads faster, takes less memory.

    Writes BUNDLE/engines/TARGET-FINGERPRINT. For onnxruntime: the stages optimized, attention fused, weights
    as this processor's kernels want them. It is used from then on, on machines like this one with the same
    version of the engine; elsewhere the portable graphs are, with the same results.

    For tensorrt and tensorrt-rtx: an engine for each stage, with a profile for prompts and one for decoding.
    They run on GPUs of the compute capability and with the version that they were built for. tensorrt builds
    on the device itself; tensorrt-rtx also where there is no GPU. Building takes minutes and 3 to 5 times the
    largest stage's weights in memory.

    Before the form is published its stages run beside the portable graphs; one that computes something else
    is not kept. The form appears whole or not at all. stdout carries its path.
    """
    given = {name: value for name, value in tensorrt.items() if value not in (None, ())}
    if target == "onnxruntime" and given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise click.UsageError(f"{flag} is for --target tensorrt and tensorrt-rtx; leave it out")
    if dry_run and json_file is not None:
        raise click.UsageError("--json is for what was built; leave it or --dry-run out")
    if dry_run:
        _show_plan(session, bundle, target, given)
        return
    if target == "onnxruntime":
        form = _build(session, bundle, force)
    else:
        from .build_tensorrt import build

        form = build(session, bundle, target, given, force)
    from ...runtime.engines import forms_of

    others = [other.name for other in forms_of(bundle, target) if other.name != form.name]
    if others:
        session.say(f"forms for other machines, versions or limits, to remove by hand: {', '.join(others)}")
    if json_file is not None:
        write_json(json_file, _document(form, target))
    if json_file != STDIN:
        click.echo(form)


def _document(form: Path, target: str) -> dict[str, Any]:
    from ...runtime.engines import ENGINE_NAME, read_description, was_proven

    files = {path.name: path.stat().st_size for path in sorted(form.iterdir()) if path.name != ENGINE_NAME}
    return {
        "form": str(form),
        "target": target,
        "bytes": sum(files.values()),
        "proven": was_proven(form),
        "files": files,
        "built_for": read_description(form / ENGINE_NAME),
    }


def _build(session: Session, bundle: Path, force: bool) -> Path:
    from ...export.engines import build_engine
    from ...runtime.engines import data_file, graph_file
    from ...runtime.manifest import load_manifest

    with progress_bar(session) as progress:
        engine = build_engine(bundle, force=force, progress=progress)
    assert engine.directory is not None
    if not session.quiet and sys.stderr is not None:
        manifest = load_manifest(bundle)
        rows = []
        for stage, spec in manifest.stages.items():
            own = sum((engine.directory / file(stage)).stat().st_size for file in (graph_file, data_file))
            rows.append((f"{stage} graph", spec.precision, size(_portable(manifest, stage)), size(own)))
        print_table(("part", "precision", ">portable", ">this form"), rows, sys.stderr)
    return engine.directory


def _portable(manifest: Manifest, stage: str) -> int:
    spec = manifest.stages[stage]
    return sum(manifest.files[file].bytes for file in (spec.file, spec.data))


def _show_plan(session: Session, bundle: Path, target: str, given: Mapping[str, Any]) -> None:
    if target == "onnxruntime":
        form, needed = _show_form(bundle)
    else:
        from .build_tensorrt import show_plan

        form, needed = show_plan(session, bundle, target, given)
    free = size(shutil.disk_usage(bundle).free)
    there = " again, with --force (it is there already)" if form.is_dir() else ""
    click.echo(f"would write {form}{there}: {needed}; {free} of disk are free")


def _show_form(bundle: Path) -> tuple[Path, str]:
    from ...export.engines import form_bytes
    from ...export.operator_probes import check_version
    from ...runtime.engines import describe_engine, form_path
    from ...runtime.manifest import load_manifest

    check_version("building an engine")
    manifest = load_manifest(bundle)
    rows = [
        (f"{stage} graph", spec.precision, size(_portable(manifest, stage)))
        for stage, spec in manifest.stages.items()
    ]
    print_table(("part", "precision", ">portable"), rows, sys.stdout)
    return form_path(bundle, describe_engine(manifest)), f"at most {size(form_bytes(manifest))}"
