"""`blt-edge validate`: a bundle compared with its reference; and what every verb needs that compares so.

Everything of `export` is imported when something is compared: on a device neither it nor torch is installed.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import click

from ...runtime.errors import (
    BltWarning,
    BundleError,
    FailedValidationWarning,
    NotValidatedHereWarning,
    requirement,
)
from ...runtime.host import available_memory
from ..output import Messages, echo, size, status
from ..tables import print_table
from .documents import validation_document, write_json
from .model_options import check_bundle_files
from .options import (
    DEFAULT_THREADS,
    STDIN,
    CheckpointSource,
    InputFile,
    bundle_argument,
    json_option,
    option,
    tolerance_options,
    verb,
)

if TYPE_CHECKING:
    from ...export.golden import Golden
    from ...export.reference import Reference
    from ...export.validate import BundleReference, ValidationReport
    from ...runtime.manifest import Manifest
    from ...runtime.model import BltModel
    from ...runtime.validation import ValidationRecord

# A parameter in transformers: float32, and what loading adds.
_PARAMETER_BYTES = 4 * 1.3
# A float32 bundle while it is loaded takes twice its graphs, one made of it at most as much again.
_BUNDLES_FACTOR = 3
_NO_ENGINE = f"ONNX Runtime, which would run bundles, is not installed (pip install {requirement('cpu')})"


@verb("validate", "demo-bundle", "bundle --reference path/to/checkpoint")
@bundle_argument
@option(
    "--reference",
    type=CheckpointSource(),
    metavar="CHECKPOINT",
    help="Compare with this checkpoint in transformers: a folder, a hub id, or demo.",
)
@option(
    "--golden", type=InputFile(), metavar="FILE", help="Compare with a golden file, without transformers."
)
@tolerance_options
@option("-t", "--threads", type=int, shown=DEFAULT_THREADS, help="CPU threads.")
@option("--verify", help="Check the sha256 of whole files first; without a reference, always.")
@json_option
def command(
    messages: Messages,
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
    (--reference) or with a golden file. The result goes into the bundle's manifest, beside those of other
    kinds of processor. A bundle of the packaged demo knows its reference; for any other one without
    --reference or --golden only the files' sha256 are checked.
    """
    check_tolerances(rtol, atol)
    if reference is not None and golden is not None:
        raise click.UsageError("--reference and --golden are both given; give one of them")
    if golden == STDIN:
        raise click.UsageError("--golden: can't be stdin; give a file")
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    if golden is not None:
        chosen = ReferenceChoice("golden", golden)
    elif reference is not None:
        chosen = _given_reference(manifest, reference, messages)
    else:
        chosen = _packaged_demo(manifest)
    if verify or chosen.kind == "nothing":
        check_bundle_files(messages, bundle, manifest, full=True)
    if chosen.kind == "nothing":
        files = len(manifest.files)
        line = f"{files} files have the right sha256; nothing else was checked: {chosen.reasons}"
        nothing = {"validation": None, "validated_on": None}
        write_json(json_file, {"bundle": str(bundle), "files": files, **nothing, "note": line})
        if json_file != STDIN:
            echo(line)
        return
    report, record = _compare(bundle, chosen, messages, rtol, atol, threads)
    write_json(json_file, {"bundle": str(bundle), **validation_document(record)})
    if json_file != STDIN:
        _show_report(report, record, sys.stdout)
    if not report.passed:
        raise click.ClickException(f"{bundle}: {_verdict(report)}")


@dataclass(frozen=True)
class ReferenceChoice:
    """What a bundle will be compared with."""

    kind: Literal["transformers", "golden", "bundle", "nothing"]
    """transformers on the checkpoint, or what it once computed, or the float32 bundle, or nothing."""
    path: Path
    """The checkpoint's folder, or the golden file, or the bundle."""
    why_not: tuple[str, ...] = ()
    """What spoke against the better ones."""

    @property
    def reasons(self) -> str:
        """`why_not` as one phrase."""
        return ", and ".join(self.why_not)


def _given_reference(manifest: Manifest, source: str, messages: Messages) -> ReferenceChoice:
    from ...export import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        folder, layout, sha256 = checkpoint.folder, checkpoint.layout, checkpoint.sha256()
    if layout != "huggingface":
        raise click.UsageError(
            f"--reference: {source} is in Meta's layout, which transformers does not read; give it in "
            "the Hugging Face layout, or --golden"
        )
    lacking = _lacking_memory("transformers", _PARAMETER_BYTES * sum(manifest.model.parameters.values()))
    if lacking:
        raise click.ClickException(f"{lacking}; compare on a larger machine, or with --golden")
    if sha256 != manifest.source.sha256:
        messages.note(
            f"note: the bundle was exported from other files than those of {source} (their sha256 differ)"
        )
    return ReferenceChoice("transformers", folder)


def _packaged_demo(manifest: Manifest) -> ReferenceChoice:
    """The packaged demo, for a bundle that was made from it; else nothing."""
    unknown = ReferenceChoice("nothing", Path(), ("neither --reference nor --golden was given",))
    if manifest.source.name != "demo":
        return unknown
    try:
        from ...export import CheckpointError, open_checkpoint
    except ModuleNotFoundError as error:
        missing = (
            f"the package {error.name}, which could, is not installed (pip install {requirement('export')})"
        )
        return replace(unknown, why_not=(*unknown.why_not, missing))
    try:
        with open_checkpoint("demo") as checkpoint:
            folder, sha256 = checkpoint.folder, checkpoint.sha256()
    except CheckpointError:
        return unknown
    if sha256 != manifest.source.sha256:
        reason = "the bundle was made from another version of the demo than the packaged one"
        return replace(unknown, why_not=(reason, *unknown.why_not))
    return checkpoint_reference(folder, manifest.source.layout, sum(manifest.model.parameters.values()))


def checkpoint_reference(folder: Path, layout: str, parameters: int) -> ReferenceChoice:
    """The best thing there is to compare an export of the checkpoint in `folder` with; nothing is loaded."""
    from ...export.golden import GOLDEN_NAME
    from ...export.reference import reference_available

    if importlib.util.find_spec("onnxruntime") is None:
        return ReferenceChoice("nothing", folder, (_NO_ENGINE,))
    if not reference_available():
        against = "torch and transformers 5.23 or newer are not installed"
    elif layout != "huggingface":
        against = "transformers does not read Meta's layout"
    else:
        against = _lacking_memory("transformers", _PARAMETER_BYTES * parameters)
    if not against:
        return ReferenceChoice("transformers", folder)
    golden = folder / GOLDEN_NAME
    if golden.is_file():
        return ReferenceChoice("golden", golden, (against,))
    return ReferenceChoice("nothing", folder, (against, f"there is no {GOLDEN_NAME} beside the checkpoint"))


def bundle_reference(bundle: Path, manifest: Manifest) -> ReferenceChoice:
    """The float32 bundle, for those made from it; nothing where it can't be loaded."""
    weights = sum(manifest.files[stage.data].bytes for stage in manifest.stages.values())
    without_engine = importlib.util.find_spec("onnxruntime") is None
    against = _NO_ENGINE if without_engine else _lacking_memory("both bundles", _BUNDLES_FACTOR * weights)
    return ReferenceChoice("nothing", bundle, (against,)) if against else ReferenceChoice("bundle", bundle)


def _lacking_memory(what: str, needed: float) -> str:
    """Why `what` can't be loaded here; empty when it can, as far as is known."""
    free = available_memory()
    if free is None or needed <= free:
        return ""
    return f"{what} would need about {size(needed)} of memory, {size(free)} are free"


def check_tolerances(rtol: float | None, atol: float | None) -> None:
    """Refuse what is no tolerance before any work."""
    for name, value in (("--rtol", rtol), ("--atol", atol)):
        if value is not None and not 0 <= value < float("inf"):
            raise click.UsageError(f"{name} is {value}; allowed is a finite number >= 0")


def validate_written(
    path: Path, chosen: ReferenceChoice, messages: Messages, rtol: float | None, atol: float | None
) -> None:
    """Compare a bundle that was just written, and show the result. Raises ClickException for a breach."""
    if chosen.kind == "nothing":
        messages.note(f"not validated, nothing was compared: {chosen.reasons}")
        return
    try:
        report, record = _compare(path, chosen, messages, rtol, atol)
    except BaseException:
        messages.note(f"{path} was written, but its validation did not end; blt-edge validate does it again")
        raise
    if not messages.quiet and sys.stderr is not None:
        _show_report(report, record, sys.stderr)
    if not report.passed:
        from ...export.remedy import next_step
        from ...runtime.manifest import load_manifest

        failed = ", ".join(row.check for row in report.breaches)
        step = next_step(load_manifest(path), report)
        raise click.ClickException(
            f"{path} differs from {report.against} ({failed}); it is kept, and its manifest says so"
            + (f"; try {step}" if step else "")
        )


def _compare(
    bundle: Path,
    chosen: ReferenceChoice,
    messages: Messages,
    rtol: float | None,
    atol: float | None,
    threads: int | None = None,
) -> tuple[ValidationReport, ValidationRecord]:
    """Load both sides, compare them, and write the result into the bundle's manifest. Raises BltError."""
    from ...export.quality import tolerances_of
    from ...export.validate import validate_bundle
    from ...runtime import BltModel

    if chosen.why_not:
        messages.say(f"comparing with {chosen.path.name}: {chosen.reasons}")
    if not messages.verbose and not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", BltWarning)
    for category in (FailedValidationWarning, NotValidatedHereWarning):  # this is what finds out
        warnings.simplefilter("ignore", category)
    with status(messages, "loading the bundle") as say:
        model = BltModel.load(bundle, threads=threads)
        limits = tolerances_of(model.manifest)
        if rtol is not None:
            limits = replace(limits, stage=rtol, logits=rtol, logits_mean=rtol / 10)
        if atol is not None:
            limits = replace(limits, entropy=atol)
        say("loading the reference")
        report = validate_bundle(
            model, _load(chosen), tolerances=limits, progress=lambda what: say(f"comparing: {what}")
        )
        record = report.record(model)
        try:
            _write_record(bundle, model, record)
        except (OSError, BundleError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            messages.note(f"the result could not be written into the manifest: {reason}")
    return report, record


def _write_record(bundle: Path, model: BltModel, record: ValidationRecord) -> None:
    """Add the record to those that are in the manifest now: a comparison takes minutes, in which others may
    have added theirs. Raises OSError, and BundleError where it is another bundle by now."""
    from ...runtime.manifest import load_manifest, write_manifest

    manifest = load_manifest(bundle)
    if manifest.files != model.manifest.files:
        raise BundleError("the bundle was written anew meanwhile; blt-edge validate compares it again")
    write_manifest(bundle, manifest.with_validation(record))


def _load(chosen: ReferenceChoice) -> Reference | Golden | BundleReference:
    if chosen.kind == "bundle":
        from ...export.validate import BundleReference

        return BundleReference.load(chosen.path)
    if chosen.kind == "golden":
        from ...export.golden import read_golden

        return read_golden(chosen.path)
    assert chosen.kind == "transformers"
    from ...export.reference import Reference

    return Reference.load(chosen.path)


def _show_report(report: ValidationReport, record: ValidationRecord, file: IO[str] | None) -> None:
    rows = [
        (
            # The table fits 80 columns.
            row.check.replace("largest difference / scale", "max difference/scale"),
            _number(row.measured),
            f"{row.rule} {_number(row.allowed)}",
            "ok" if row.ok else "FAIL",
        )
        for row in report.rows
    ]
    print_table(("check", ">measured", ">allowed", ""), rows, file)
    notes = [f"  {row.check}: {row.note}" for row in report.rows if row.note]
    for line in (*notes, "", _verdict(report), f"on {record.name}"):
        echo(line, file)


def _verdict(report: ValidationReport) -> str:
    checks = f"checks against {report.against}, {report.data_bytes} bytes of text"
    failed = f"FAILED: {len(report.breaches)} of" if report.breaches else "passed:"
    return f"{failed} {len(report.rows)} {checks}"


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}" if value < 0.9 else f"{value:.7g}"
