"""Device-specific forms of a bundle: stage graphs that an engine has optimized, with weights laid out for it
and attention fused (`export.fused_attention`).

A form lies in `engines/TARGET-FINGERPRINT/` of the bundle. It is a cache: the portable graphs give the same
results, so a form that is missing, damaged, or made for something else is passed over, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ._fields import Fields
from .backends.ort import import_onnxruntime, session_entries
from .errors import BltError, BundleError
from .files import open_plain
from .integrity import check_records
from .manifest import FileRecord, Manifest
from .processor import describe_processor
from .self_test import SELF_TEST_NAME, Reach

__all__ = [
    "ENGINE_NAME",
    "PORTABLE",
    "Engine",
    "check_form",
    "data_file",
    "describe_engine",
    "engine_reach",
    "find_engine",
    "form_path",
    "forms_of",
    "graph_file",
    "read_description",
    "render_engine",
    "was_proven",
]

ENGINE_NAME = "engine.json"
"""The form's description, beside its files."""

_SCHEMA = 3
"""3: a self-test beside the graphs."""
_MAX_BYTES = 1 << 20
_WHAT = {
    "onnxruntime": "ONNX Runtime",
    "system": "system",
    "machine": "machine",
    "processor": "processor",
    "features": "processor features",
    "blt_edge_form": "layout",
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Engine:
    """What a bundle runs from."""

    name: str
    """The form's directory inside the bundle, or "portable graphs"."""
    reason: str | None = None
    """Why no form is used; None when one is, or none was looked for."""
    directory: Path | None = None
    """The form's directory; None = portable graphs."""
    device: str = "CPU"
    """What computes: "CPU", or a GPU's name and the engine on it."""
    max_bytes: int | None = None
    """Longest text in ids, BOS included, that the form was built for; None = as long as the model takes."""

    def __str__(self) -> str:
        """One line for people."""
        where = self.name if self.device == "CPU" else f"{self.name} on {self.device}"
        return where if self.reason is None else f"{where}: {self.reason}"


PORTABLE = Engine("portable graphs")
"""No form, and none was looked for."""


def graph_file(stage: str) -> str:
    """Name of a stage's graph in a form."""
    return f"{stage}.onnx"


def data_file(stage: str) -> str:
    """Name of a stage's weights in a form."""
    return f"{stage}.onnx.data"


def describe_engine(manifest: Manifest) -> dict[str, Any]:
    """Everything that a form for this machine depends on, as JSON. Raises BackendError (no engine)."""
    ort = import_onnxruntime()
    stages = {
        stage: {
            "precision": manifest.stages[stage].precision,
            "graph_sha256": manifest.files[manifest.stages[stage].file].sha256,
            "data_sha256": manifest.files[manifest.stages[stage].data].sha256,
            "options": session_entries(manifest.stages[stage].precision),
        }
        for stage in manifest.stages
    }
    return {
        "blt_edge_form": _SCHEMA,
        "target": "onnxruntime",
        "onnxruntime": ort.__version__,
        **describe_processor(),
        "stages": stages,
    }


def engine_reach(manifest: Manifest) -> Reach:
    """What an engine for ONNX Runtime takes: whatever the graphs do."""
    model, latent = manifest.model, manifest.stages["latent"]
    longest = manifest.axes["patch_length"].max if "patch_length" in manifest.axes else model.max_positions
    return Reach(model.max_positions, latent.max_positions, longest)


def form_path(directory: Path, description: dict[str, Any]) -> Path:
    """Where in the bundle the form of this description belongs."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    return directory / "engines" / f"{description['target']}-{fingerprint}"


def forms_of(directory: Path, target: str) -> list[Path]:
    """Every form of a bundle for a target, whatever it was made for, by name."""
    # Not those of another target whose name begins alike.
    forms = (directory / "engines").glob(f"{target}-*")
    return sorted(form for form in forms if form.name.rpartition("-")[0] == target)


def render_engine(description: dict[str, Any], files: dict[str, FileRecord], *, proven: bool = True) -> str:
    """The text of `engine.json`; proven: the engine was run, its self-test is what came out."""
    records = {name: asdict(files[name]) for name in sorted(files)}
    return json.dumps({"description": description, "proven": proven, "files": records}, indent=1) + "\n"


def find_engine(
    directory: Path, manifest: Manifest, *, full: bool = False, progress: Progress | None = None
) -> Engine:
    """The form to run from on this machine: there, made for these graphs, and its files as recorded.

    full and progress: as for `integrity.check_files`. Never raises for what is wrong with a form.
    """
    try:
        description = describe_engine(manifest)
        path = form_path(directory, description)
        if not os.path.lexists(path):
            return Engine(PORTABLE.name, _missing(directory, description))
        names = {name for stage in manifest.stages for name in (graph_file(stage), data_file(stage))}
        names.add(SELF_TEST_NAME)
        again = f"blt-edge build --force {directory} makes it again"
        check_form(path, description, names, again, full, progress)
    except BltError as error:
        return Engine(PORTABLE.name, str(error))
    return Engine(path.relative_to(directory).as_posix(), directory=path)


def check_form(
    path: Path,
    description: dict[str, Any],
    names: set[str],
    again: str,
    full: bool = False,
    progress: Progress | None = None,
) -> None:
    """Compare a form with its description and its files with their records.

    names: the files it must have; again: the remedy, for the error. full and progress: as for
    `integrity.check_files`. Raises BundleError.
    """
    payload = _payload(path / ENGINE_NAME)
    if payload is None or payload.get("description") != description:
        raise BundleError(f"{path.name}: its {ENGINE_NAME} is damaged; {again}")
    try:
        files = Fields(payload, "").parts("files", _name, _record)
    except BundleError:
        files = {}
    if set(files) != names:
        raise BundleError(f"{path.name}: its {ENGINE_NAME} is damaged; {again}")
    for name in sorted(names):
        if not os.path.lexists(path / name):
            raise BundleError(f"{path.name}: {name} is missing; {again}")
    check_records(path, files, full=full, progress=progress, remedy=again)


def read_description(path: Path) -> dict[str, Any] | None:
    """What an `engine.json` says its form was made for; None when it is damaged."""
    payload = _payload(path)
    description = payload.get("description") if payload else None
    return description if isinstance(description, dict) else None


def was_proven(path: Path) -> bool:
    """Whether the engine in this directory was run before it was published, and gave its self-test."""
    return bool((_payload(path / ENGINE_NAME) or {}).get("proven"))


def _payload(path: Path) -> dict[str, Any] | None:
    try:
        with open_plain(path) as file:
            payload = json.loads(file.read(_MAX_BYTES))
    except (BltError, OSError, ValueError, RecursionError):
        return None
    return payload if isinstance(payload, dict) else None


def _name(value: object, where: str) -> str:
    return str(value)


def _record(fields: Fields) -> FileRecord:
    return FileRecord(
        bytes=fields.whole("bytes", 0, 2**63 - 1),
        sha256=fields.digest("sha256"),
        sample_sha256=fields.digest("sample_sha256"),
    )


def _missing(directory: Path, description: dict[str, Any]) -> str:
    """Why there is no form: none was built, or those that are there are for something else."""
    remedy = f"blt-edge build {directory} makes one, which is faster and takes less memory"
    for other in forms_of(directory, description["target"]):
        theirs = read_description(other / ENGINE_NAME)
        if theirs is not None:
            return f"{other.name} was built {_difference(theirs, description)}; {remedy}"
    return f"no form was built for this device; {remedy}"


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key, name in _WHAT.items():
        if theirs.get(key) != ours[key]:
            if key == "features":
                return "for a processor with other instructions"
            return f"for {name} {str(theirs.get(key))[:60]!r}, here it is {str(ours[key])!r}"
    return "for other graphs or options"
