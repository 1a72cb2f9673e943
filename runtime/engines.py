"""Device-specific forms of a bundle: stage graphs that an engine has optimized, with weights laid out for it
and attention fused (`export.fused_attention`).

A form lies in `engines/TARGET-FINGERPRINT/` of the bundle. It is a cache: the portable graphs give the same
results, so a form that is missing, damaged, or made for something else is passed over, with the reason.

TensorRT engines of a bundle: the range of every axis they are built for, and whether one fits here.

An engine form lies in `engines/TARGET-FINGERPRINT/` as other forms do (`engines`): a plan for each stage, all
with two optimization profiles, `PREFILL` and `DECODE`, over the ranges of `Profiles`. Engines move neither
between versions nor between GPUs: one that was made for something else is refused, with the reason.
What this does not know: how engines are built and run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backends.ort import import_onnxruntime, session_entries
from .backends.tensorrt_profiles import Profiles, _read_limits, plan_file
from .errors import BltError, BundleError
from .fields import Fields
from .files import open_plain
from .host import describe_processor
from .integrity import check_records
from .manifest import FileRecord, Manifest
from .self_test import SELF_TEST_NAME, Reach

if TYPE_CHECKING:
    from .backends.tensorrt import Flavour

__all__ = [
    "ENGINE_NAME",
    "PORTABLE",
    "Engine",
    "build_command",
    "check_form",
    "data_file",
    "describe_engine",
    "describe_tensorrt",
    "engine_profiles",
    "engine_reach",
    "find_engine",
    "find_tensorrt_engine",
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


_TENSORRT_SCHEMA = 3
"""2: attention over joined keys and values, float16 where the weights are not float32. 3: a self-test."""
_DAMAGED = 8


def describe_tensorrt(
    manifest: Manifest,
    flavour: Flavour,
    capabilities: tuple[str, ...],
    profiles: Profiles,
    *,
    workspace: int | None = None,
    optimization_level: int | None = None,
) -> dict[str, Any]:
    """Everything that an engine form depends on, as JSON.

    capabilities: compute capabilities that it runs on, such as ("8.7",). workspace (bytes) and
    optimization_level: what the builder was told; None left it to the engine.
    """
    return {
        "blt_edge_form": _TENSORRT_SCHEMA,
        "target": flavour.target,
        "version": flavour.version,
        "compute_capabilities": sorted(capabilities, key=float),
        "stages": {stage: _graph(manifest, stage) for stage in manifest.stages},
        "profiles": profiles.to_dict(),
        "options": {"workspace": workspace, "optimization_level": optimization_level},
    }


def _graph(manifest: Manifest, stage: str) -> dict[str, str]:
    spec = manifest.stages[stage]
    return {
        "precision": spec.precision,
        "graph_sha256": manifest.files[spec.file].sha256,
        "data_sha256": manifest.files[spec.data].sha256,
    }


def find_tensorrt_engine(
    directory: Path,
    manifest: Manifest,
    flavour: Flavour,
    compute_capability: str,
    *,
    prefill_chunk: int = 256,
    rollback: int = 64,
    full: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """The engines to run on a GPU of this compute capability; of several, those for the longest texts.

    prefill_chunk, rollback: what the model is loaded with; engines for less are refused. full and progress:
    as for `integrity.check_files`. Never raises for what is wrong with a form: `Engine.reason` says it.
    """
    build = build_command(directory, flavour.target)
    nearest = (0, f"{flavour.name} has no engines here; {build} makes them")
    for path, description in _largest_first(directory, flavour.target):
        found = _misfit(path, description, manifest, flavour, compute_capability, (prefill_chunk, rollback))
        if found is not None:
            nearest = max(nearest, (found[0], f"{path.name} {found[1]}; {build} makes one that fits"))
            continue
        try:
            names = {*(plan_file(stage) for stage in manifest.stages), SELF_TEST_NAME}
            check_form(path, description, names, f"{build} --force makes it again", full, progress)
        except BltError as error:
            nearest = (_DAMAGED, str(error))
        else:
            return Engine(path.relative_to(directory).as_posix(), directory=path)
    return Engine(PORTABLE.name, nearest[1])


def engine_profiles(engine: Engine, manifest: Manifest) -> Profiles:
    """The profiles of engines that `find_tensorrt_engine` found. Raises BundleError when they are damaged."""
    assert engine.directory is not None
    description = read_description(engine.directory / ENGINE_NAME) or {}
    return Profiles.from_dict(description.get("profiles"), manifest)


def build_command(directory: Path, target: str) -> str:
    """What a user types to build engines of a bundle."""
    return f"blt-edge build {directory} --target {target}"


def _largest_first(directory: Path, target: str) -> list[tuple[Path, dict[str, Any]]]:
    """A target's forms and their descriptions (empty for damaged ones), those for the longest texts first."""
    forms = [
        (path, read_description(path / ENGINE_NAME) or {})
        for path in forms_of(directory, target)
        if not path.is_symlink()
    ]
    return sorted(forms, key=lambda form: _reach(form[1]), reverse=True)


def _reach(description: dict[str, Any]) -> tuple[int, int]:
    try:
        limits = _read_limits(description.get("profiles"))
    except BltError:
        return 0, 0
    return limits.max_bytes, limits.max_patches


def _misfit(
    path: Path,
    description: dict[str, Any],
    manifest: Manifest,
    flavour: Flavour,
    capability: str,
    wanted: tuple[int, int],
) -> tuple[int, str] | None:
    """Why a form is not for this machine and bundle, and how near it is to being (more is nearer)."""
    capabilities = description.get("compute_capabilities")
    plain = isinstance(capabilities, list) and all(isinstance(value, str) for value in capabilities)
    if not plain or description.get("target") != flavour.target:
        return 1, f"has a damaged {ENGINE_NAME}"
    version = description.get("version")
    if version != flavour.version:
        return 2, f"was built by {flavour.name} {str(version)[:60]!r}, here it is {flavour.version!r}"
    assert isinstance(capabilities, list)
    if capability not in capabilities:
        theirs = " and ".join(capabilities)[:60]
        return 3, f"was built for compute capability {theirs}, here it is {capability}"
    if description.get("stages") != {stage: _graph(manifest, stage) for stage in manifest.stages}:
        return 4, "was built for other graphs"
    if description.get("blt_edge_form") != _TENSORRT_SCHEMA:
        return 5, "was built by another version of blt-edge"
    try:
        limits = Profiles.from_dict(description.get("profiles"), manifest).limits
    except BundleError as error:
        return 5, f"does not fit: {error}"
    for limit, value in zip(("prefill_chunk", "rollback"), wanted, strict=True):
        most = getattr(limits, limit)
        if most < value:
            return 6, f"was built for a {limit} of up to {most}, here it is {value}"
    if form_path(path.parent.parent, description) != path:
        return 7, f"has a damaged {ENGINE_NAME}"
    return None
