"""`blt-edge validate`: a bundle compared with its reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.host import available_memory
from ..output import Session, size
from .documents import write_json
from .model_options import check_bundle_files
from .options import STDIN, CheckpointSource, InputFile, bundle_argument, json_option, tolerance_options, verb
from .reference import (
    Yardstick,
    check_tolerances,
    checkpoint_folder,
    choose,
    compare,
    note_reasons,
    reference_memory,
    show_report,
    verdict,
)

if TYPE_CHECKING:
    from ...export.validate import ValidationReport
    from ...runtime.manifest import Manifest

__all__ = ["command"]


@verb("validate")
@bundle_argument
@click.option(
    "--reference",
    type=CheckpointSource(),
    metavar="CHECKPOINT",
    help="Compare with this checkpoint in transformers: a folder, a hub id, or demo.",
)
@click.option(
    "--golden", type=InputFile(), metavar="FILE", help="Compare with a golden file, without transformers."
)
@tolerance_options
@click.option(
    "--threads", type=int, metavar="N", show_default="as many as the engine likes", help="CPU threads."
)
@click.option(
    "--verify", is_flag=True, help="Check the sha256 of whole files first; without a reference, always."
)
@json_option
def command(
    session: Session,
    bundle: Path,
    reference: str | None,
    golden: Path | None,
    rtol: float | None,
    atol: float | None,
    threads: int | None,
    verify: bool,
    json_file: Path | None,
) -> None:
    """Compare a bundle with its reference; the exit code is the verdict.

    Every stage's output, the patch boundaries, the logits and 200 greedy bytes are compared with transformers
    (--reference) or with a golden file. The result goes into the bundle's manifest. A bundle of the packaged
    demo knows its reference; for any other one without --reference or --golden only the files' sha256 are
    checked.
    """
    check_tolerances(rtol, atol)
    if reference is not None and golden is not None:
        raise click.UsageError("--reference and --golden are both given; give one of them")
    if golden == STDIN:
        raise click.UsageError("--golden: can't be stdin; give a file")
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    yardstick = _yardstick(manifest, reference, golden, session)
    if verify or yardstick.kind == "nothing":
        check_bundle_files(session, bundle, manifest, full=True)
    if yardstick.kind == "nothing":
        _only_hashes(bundle, manifest, yardstick, json_file)
        return
    note_reasons(yardstick, session)
    report = compare(bundle, yardstick, session, rtol=rtol, atol=atol, threads=threads)
    _show(bundle, report, json_file)
    if not report.passed:
        raise click.ClickException(f"{bundle}: {verdict(report)}")


# 1. What to compare with.


def _yardstick(manifest: Manifest, reference: str | None, golden: Path | None, session: Session) -> Yardstick:
    if golden is not None:
        return Yardstick("golden", golden)
    if reference is not None:
        return _given_reference(manifest, reference, session)
    return _packaged(manifest)


def _given_reference(manifest: Manifest, source: str, session: Session) -> Yardstick:
    from ...export import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        layout, sha256 = checkpoint.layout, checkpoint.sha256()
    if layout != "huggingface":
        raise click.UsageError(
            f"--reference: {source} is in Meta's layout, which transformers does not read; give it in "
            "the Hugging Face layout, or --golden"
        )
    needed, free = reference_memory(sum(manifest.model.parameters.values())), available_memory()
    if free is not None and needed > free:
        raise click.ClickException(
            f"transformers would need about {size(needed)} of memory in float32, {size(free)} are free; "
            "compare on a larger machine, or with --golden"
        )
    if sha256 != manifest.source.sha256:
        session.note(
            f"note: the bundle was exported from other files than those of {source} (their sha256 differ)"
        )
    return Yardstick("transformers", checkpoint_folder(source))


def _packaged(manifest: Manifest) -> Yardstick:
    """The packaged demo, for a bundle that was made from it; else nothing."""
    unknown = Yardstick("nothing", Path(), ("neither --reference nor --golden was given",))
    if manifest.source.name != "demo":
        return unknown
    try:
        from ...export import CheckpointError, open_checkpoint
    except ModuleNotFoundError as error:
        missing = f"the package {error.name}, which could, is not installed (pip install 'blt-edge[export]')"
        return replace(unknown, why_not=(*unknown.why_not, missing))
    try:
        with open_checkpoint("demo") as checkpoint:
            sha256 = checkpoint.sha256()
    except CheckpointError:
        return unknown
    if sha256 != manifest.source.sha256:
        reason = "the bundle was made from another version of the demo than the packaged one"
        return replace(unknown, why_not=(reason, *unknown.why_not))
    return choose(checkpoint_folder("demo"), manifest.source.layout, sum(manifest.model.parameters.values()))


# 2. Results.


def _only_hashes(bundle: Path, manifest: Manifest, yardstick: Yardstick, json_file: Path | None) -> None:
    files = len(manifest.files)
    line = f"{files} files have the right sha256; nothing else was checked: {yardstick.reasons}"
    if json_file is not None:
        document: dict[str, Any] = {"bundle": str(bundle), "files": files, "validation": None, "note": line}
        write_json(json_file, document)
    if json_file != STDIN:
        click.echo(line)


def _show(bundle: Path, report: ValidationReport, json_file: Path | None) -> None:
    if json_file is not None:
        write_json(json_file, {"bundle": str(bundle), "validation": report.to_dict()})
    if json_file != STDIN:
        show_report(report)
