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
from .backends.base import StageBackend
from .backends.ort import OrtStage, import_onnxruntime, session_entries
from .errors import BltError, BundleError
from .files import open_plain
from .integrity import check_records
from .manifest import FileRecord, Manifest
from .processor import describe_processor

__all__ = [
    "ENGINE_NAME",
    "PORTABLE",
    "TARGETS",
    "Engine",
    "data_file",
    "describe_engine",
    "find_engine",
    "form_path",
    "graph_file",
    "open_stages",
    "render_engine",
]

TARGETS = ("onnxruntime",)
"""What forms can be built for."""
ENGINE_NAME = "engine.json"
"""The form's description, beside its files."""

_SCHEMA = 2
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

    def __str__(self) -> str:
        """One line for people."""
        return self.name if self.reason is None else f"{self.name}: {self.reason}"


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


def form_path(directory: Path, description: dict[str, Any]) -> Path:
    """Where in the bundle the form of this description belongs."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    return directory / "engines" / f"{description['target']}-{fingerprint}"


def render_engine(description: dict[str, Any], files: dict[str, FileRecord]) -> str:
    """The text of `engine.json`."""
    records = {name: asdict(files[name]) for name in sorted(files)}
    return json.dumps({"description": description, "files": records}, indent=1) + "\n"


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
        _check_form(path, description, full, progress)
    except BltError as error:
        return Engine(PORTABLE.name, str(error))
    return Engine(path.relative_to(directory).as_posix(), directory=path)


def open_stages(
    directory: Path, manifest: Manifest, threads: int | None, engine: Engine
) -> tuple[dict[str, StageBackend], Engine]:
    """Every stage's backend, and what they run from in the end.

    A form that the engine refuses is passed over as a whole. Raises as `OrtStage` for portable graphs.
    """
    if engine.directory is not None:
        form = engine.directory
        try:
            return {
                stage: OrtStage(directory, manifest, stage, threads, optimized=form / graph_file(stage))
                for stage in manifest.stages
            }, engine
        except BltError as error:
            engine = Engine(PORTABLE.name, f"{engine.name}: {error}")
    return {stage: OrtStage(directory, manifest, stage, threads) for stage in manifest.stages}, engine


def _check_form(path: Path, description: dict[str, Any], full: bool, progress: Progress | None) -> None:
    again = f"blt-edge build --force {path.parent.parent} makes it again"
    payload = _payload(path / ENGINE_NAME)
    if payload is None or payload.get("description") != description:
        raise BundleError(f"{path.name}: its {ENGINE_NAME} is damaged; {again}")
    expected = {name for stage in description["stages"] for name in (graph_file(stage), data_file(stage))}
    try:
        files = Fields(payload, "").parts("files", _name, _record)
    except BundleError:
        files = {}
    if set(files) != expected:
        raise BundleError(f"{path.name}: its {ENGINE_NAME} is damaged; {again}")
    check_records(path, files, full=full, progress=progress, remedy=again)


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
    others = sorted(form_path(directory, description).parent.glob(f"{description['target']}-*"))
    for other in others:
        payload = _payload(other / ENGINE_NAME)
        theirs = payload.get("description") if payload else None
        if isinstance(theirs, dict):
            return f"{other.name} was built {_difference(theirs, description)}; {remedy}"
    return f"no form was built for this device; {remedy}"


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key, name in _WHAT.items():
        if theirs.get(key) != ours[key]:
            if key == "features":
                return "for a processor with other instructions"
            return f"for {name} {str(theirs.get(key))[:60]!r}, here it is {str(ours[key])!r}"
    return "for other graphs or options"
