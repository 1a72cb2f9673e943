"""Comparing a bundle with what it was exported from: what there is to compare with, and the result on show.

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

from ...runtime.host import available_memory
from ..output import Session, print_table, size, status

if TYPE_CHECKING:
    from ...export.golden import Golden
    from ...export.quality import Tolerances
    from ...export.reference import Reference
    from ...export.validate import BundleReference, ValidationReport
    from ...runtime.manifest import Manifest

__all__ = [
    "Yardstick",
    "check_tolerances",
    "checkpoint_folder",
    "choose",
    "compare",
    "note_reasons",
    "original",
    "reference_memory",
    "show_report",
    "validate_written",
    "verdict",
]

_LOADING_FACTOR = 1.3
# A float32 bundle while it is loaded takes twice its graphs, one made of it at most as much again.
_BUNDLES_FACTOR = 3


@dataclass(frozen=True)
class Yardstick:
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


def checkpoint_folder(source: str) -> Path:
    """The folder of a checkpoint that was opened before: the packaged demo, a folder, a hub id's snapshot."""
    if source == "demo":
        from importlib import resources

        return Path(str(resources.files("blt_edge.export"))) / "demo"
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(source, local_files_only=True))


def reference_memory(parameters: int) -> int:
    """Memory that a model in transformers takes in float32, in bytes: weights, and what loading adds."""
    return round(4 * _LOADING_FACTOR * parameters)


def choose(folder: Path, layout: str, parameters: int) -> Yardstick:
    """The best thing there is to compare an export of the checkpoint in `folder` with; nothing is loaded."""
    from ...export.golden import GOLDEN_NAME

    if importlib.util.find_spec("onnxruntime") is None:
        why = "ONNX Runtime, which would run the bundle, is not installed (pip install 'blt-edge[cpu]')"
        return Yardstick("nothing", folder, (why,))
    against = _against_transformers(layout, parameters)
    if against is None:
        return Yardstick("transformers", folder)
    golden = folder / GOLDEN_NAME
    if golden.is_file():
        return Yardstick("golden", golden, (against,))
    return Yardstick("nothing", folder, (against, f"there is no {GOLDEN_NAME} beside the checkpoint"))


def _against_transformers(layout: str, parameters: int) -> str | None:
    """Why transformers can't be the reference; None when it can."""
    from ...export.reference import reference_available

    if not reference_available():
        return "torch and transformers 5.23 or newer are not installed"
    if layout != "huggingface":
        return "transformers does not read Meta's layout"
    needed, free = reference_memory(parameters), available_memory()
    if free is not None and needed > free:
        return f"transformers would need about {size(needed)} of memory in float32, {size(free)} are free"
    return None


def original(bundle: Path, manifest: Manifest) -> Yardstick:
    """The float32 bundle, for those made from it; nothing where it can't be loaded."""
    if importlib.util.find_spec("onnxruntime") is None:
        why = "ONNX Runtime, which would run the bundles, is not installed (pip install 'blt-edge[cpu]')"
        return Yardstick("nothing", bundle, (why,))
    weights = sum(manifest.files[stage.data].bytes for stage in manifest.stages.values())
    needed, free = round(_BUNDLES_FACTOR * weights), available_memory()
    if free is not None and needed > free:
        why = f"both bundles would need about {size(needed)} of memory, {size(free)} are free"
        return Yardstick("nothing", bundle, (why,))
    return Yardstick("bundle", bundle)


def load(yardstick: Yardstick) -> Reference | Golden | BundleReference:
    """Load what to compare with. Raises ReferenceModelError, GoldenError or what loading a bundle raises."""
    if yardstick.kind == "bundle":
        from ...export.validate import BundleReference

        return BundleReference.load(yardstick.path)
    if yardstick.kind == "golden":
        from ...export.golden import read_golden

        return read_golden(yardstick.path)
    assert yardstick.kind == "transformers"
    from ...export.reference import Reference

    return Reference.load(yardstick.path)


def compare(
    bundle: Path,
    yardstick: Yardstick,
    session: Session,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    threads: int | None = None,
) -> ValidationReport:
    """Load both sides, compare them, and write the result into the bundle's manifest.

    Raises BltError when either side can't be loaded. A breach is in the report.
    """
    from ...export.validate import validate_bundle
    from ...runtime import BltModel
    from ...runtime.manifest import write_manifest

    if not session.verbose and not sys.warnoptions:
        warnings.simplefilter("ignore")
    with status(session, "loading the bundle") as say:
        model = BltModel.load(bundle, threads=threads)
        limits = _tolerances(model.manifest, rtol, atol)
        say("loading the reference")
        expected = load(yardstick)
        report = validate_bundle(
            model, expected, tolerances=limits, progress=lambda what: say(f"comparing: {what}")
        )
        try:
            write_manifest(bundle, model.manifest.with_validation(report.to_dict()))
        except OSError as error:
            session.note(f"the result could not be written into the manifest: {error.strerror}")
    return report


def _tolerances(manifest: Manifest, rtol: float | None, atol: float | None) -> Tolerances | None:
    if rtol is None and atol is None:
        return None
    from ...export.quality import tolerances_of

    limits = tolerances_of(manifest)
    if rtol is not None:
        limits = replace(limits, stage=rtol, logits=rtol, logits_mean=rtol / 10)
    return limits if atol is None else replace(limits, entropy=atol)


def check_tolerances(rtol: float | None, atol: float | None) -> None:
    """Refuse what is no tolerance before any work."""
    for name, value in (("--rtol", rtol), ("--atol", atol)):
        if value is not None and not 0 <= value < float("inf"):
            raise click.UsageError(f"{name} is {value}; allowed is a finite number >= 0")


def validate_written(
    path: Path, yardstick: Yardstick, session: Session, rtol: float | None, atol: float | None
) -> None:
    """Compare a bundle that was just written, and show the result. Raises ClickException for a breach."""
    if yardstick.kind == "nothing":
        session.note(f"not validated, nothing was compared: {yardstick.reasons}")
        return
    note_reasons(yardstick, session)
    try:
        report = compare(path, yardstick, session, rtol=rtol, atol=atol)
    except BaseException:
        session.note(f"{path} was written, but its validation did not end; blt-edge validate does it again")
        raise
    if not session.quiet and sys.stderr is not None:
        show_report(report, sys.stderr)
    if not report.passed:
        failed = ", ".join(row.check for row in report.breaches)
        raise click.ClickException(
            f"{path} differs from {report.against} ({failed}); it is kept, and its manifest says so"
        )


# What people see of a report.


def show_report(report: ValidationReport, file: IO[str] | None = None) -> None:
    """Print a report as a table, then notes on what went wrong, then the verdict."""
    target = sys.stdout if file is None else file
    rows = [
        (
            _short(row.check),
            _number(row.measured),
            f"{row.rule} {_number(row.allowed)}",
            "ok" if row.ok else "FAIL",
        )
        for row in report.rows
    ]
    print_table(("check", ">measured", ">allowed", ""), rows, target)
    if target is not None:
        notes = [f"  {row.check}: {row.note}\n" for row in report.rows if row.note]
        target.writelines([*notes, "\n", verdict(report) + "\n"])


def verdict(report: ValidationReport) -> str:
    """A report in one line."""
    failed = len(report.breaches)
    what = f"{report.against}, {report.data_bytes} bytes of text"
    if failed:
        return f"FAILED: {failed} of {len(report.rows)} checks against {what}"
    return f"passed: {len(report.rows)} checks against {what}"


def _short(check: str) -> str:
    # The table fits 80 columns.
    return check.replace("largest difference / scale", "max difference/scale")


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}" if value < 0.9 else f"{value:.7g}"


def note_reasons(yardstick: Yardstick, session: Session) -> None:
    """Say why something better was not compared with, if there was a reason."""
    if yardstick.kind != "nothing" and yardstick.why_not:
        session.say(f"comparing with {yardstick.path.name}: {yardstick.reasons}")
