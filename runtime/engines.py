"""Engines of a bundle: what `blt-edge build` made of its graphs for one device, and which of them fits here.

An engine lies in `engines/TARGET-FINGERPRINT/` of the bundle, with an `engine.json` that says what it depends
on. ONNX Runtime's are stage graphs that it has optimized, with weights laid out for this processor and
attention fused; TensorRT's are plans, with the optimization profiles of `tensorrt_profiles`, which move
neither between versions nor between GPUs. An engine is a cache: the portable graphs give the same results, so
one that is missing, damaged, or made for something else is passed over, with the reason.
What this does not know: how engines are built and run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .backends.base import EngineLimits
from .backends.ort_session import import_onnxruntime, session_entries
from .backends.tensorrt import TensorRtModule
from .backends.tensorrt_profiles import Profiles, build_command, packed_plan_file, plan_file, read_limits
from .errors import BltError, BundleError
from .fields import Fields, parse_json, record
from .files import read_plain
from .host import describe_processor
from .integrity import Progress, check_records
from .manifest import FileRecord, Manifest
from .names import CACHES, MOST_ROWS, STAGES, graph_file, packed_graph_file, prefill_graph_file
from .narrow_cache import SCALES_NAME
from .self_test import NARROW_SELF_TEST_NAME, SELF_TEST_NAME

__all__ = [
    "ENGINE_NAME",
    "MOST_THREADS",
    "PORTABLE",
    "Engine",
    "best_threads",
    "cache_files",
    "caches_of",
    "check_engine_files",
    "data_file",
    "describe_engine",
    "describe_tensorrt",
    "engine_limits",
    "engine_path",
    "engine_profiles",
    "engines_of",
    "find_engine",
    "find_tensorrt_engine",
    "graph_file",
    "packed_graph_file",
    "prefill_files",
    "prefill_of",
    "read_description",
    "render_engine",
    "rows_of",
    "was_proven",
    "with_caches",
    "with_prefill",
    "with_rows",
    "with_threads",
]

ENGINE_NAME = "engine.json"
"""An engine's description, beside its files."""

MOST_THREADS = 1024
"""That can be asked for."""

# Under "blt_edge_form" in the description.
# ONNX Runtime, 3: a self-test beside the graphs.
_SCHEMA = 3
# TensorRT, 2: attention over joined keys and values, float16 where weights are not float32. 3: a self-test.
_TENSORRT_SCHEMA = 3
_WHAT = {
    "onnxruntime": "ONNX Runtime",
    "system": "system",
    "machine": "machine",
    "processor": "processor",
    "features": "processor features",
    "blt_edge_form": "layout",
}


@dataclass(frozen=True)
class Engine:
    """What a bundle runs from."""

    name: str
    """The engine's directory inside the bundle, or "portable graphs"."""
    reason: str | None = None
    """Why no engine is used; None when one is, or none was looked for."""
    directory: Path | None = None
    """The engine's directory; None = portable graphs."""
    device: str = "CPU"
    """What computes: "CPU", or a GPU's name and the library on it."""
    threads: int | None = None
    """CPU threads that it runs with; None on a GPU."""
    kernels: str | None = None
    """A GPU and what computes on it, printable; None on the CPU, whose kernels `kernel_family` names."""
    max_bytes: int | None = None
    """Longest text in ids, BOS included, that it was built for; None = as long as the model takes."""
    rows: tuple[int, ...] = ()
    """For how many texts at once it has packed graphs (`packed_graph_file`), or plans, ascending; () = for
    none."""
    caches: str = "float32"
    """What it keeps keys and values as while a text goes on, one of `CACHES`."""
    int8_prefill: tuple[str, ...] = ()
    """Stages that read chunks with products of integers (`graphs.prefill_products`)."""

    def __str__(self) -> str:
        where = self.name if self.device == "CPU" else f"{self.name} on {self.device}"
        if self.caches != "float32":
            where += f" with {self.caches} caches"
        if self.int8_prefill:
            where += f", int8 prefill of {' and '.join(self.int8_prefill)}"
        return where if self.reason is None else f"{where}: {self.reason}"

    @classmethod
    def at(cls, bundle: Path, path: Path) -> Engine:
        """The engine in a directory of the bundle."""
        name = path.relative_to(bundle).as_posix()
        return cls(
            name,
            directory=path,
            rows=rows_of(path),
            caches=caches_of(path),
            int8_prefill=prefill_of(path),
        )


PORTABLE = Engine("portable graphs")
"""No engine, and none was looked for."""


# 1. What an engine's directory holds.


def data_file(stage: str) -> str:
    """Name of a stage's weights in an engine for ONNX Runtime, which all of its graphs but one read."""
    return f"{graph_file(stage)}.data"


def describe_engine(manifest: Manifest) -> dict[str, Any]:
    """Everything that ONNX Runtime's engine for this machine depends on, as JSON.

    Raises BackendError when ONNX Runtime is not installed.
    """
    return {
        "blt_edge_form": _SCHEMA,
        "target": "onnxruntime",
        "onnxruntime": import_onnxruntime().__version__,
        **describe_processor(),
        "stages": {
            stage: {**graph, "options": session_entries(graph["precision"])}
            for stage, graph in _graphs(manifest).items()
        },
    }


def describe_tensorrt(
    manifest: Manifest,
    trt: TensorRtModule,
    capabilities: tuple[str, ...],
    profiles: Profiles,
    *,
    workspace: int | None = None,
    optimization_level: int | None = None,
) -> dict[str, Any]:
    """Everything that TensorRT's engine depends on, as JSON.

    capabilities: compute capabilities that it runs on, such as ("8.7",). workspace (bytes) and
    optimization_level: what the builder was told; None left it to TensorRT.
    """
    return {
        "blt_edge_form": _TENSORRT_SCHEMA,
        "target": trt.target,
        "version": trt.version,
        "compute_capabilities": sorted(capabilities, key=float),
        "stages": _graphs(manifest),
        "profiles": profiles.to_dict(),
        "options": {"workspace": workspace, "optimization_level": optimization_level},
    }


def _graphs(manifest: Manifest) -> dict[str, dict[str, str]]:
    return {
        stage: {
            "precision": spec.precision,
            "graph_sha256": manifest.files[spec.file].sha256,
            "data_sha256": manifest.files[spec.data].sha256,
        }
        for stage, spec in manifest.stages.items()
    }


def engine_limits(manifest: Manifest) -> EngineLimits:
    """What an engine for ONNX Runtime takes: whatever the graphs do."""
    positions, axes = manifest.model.max_positions, manifest.axes
    longest = axes["patch_length"].max if "patch_length" in axes else positions
    return EngineLimits(positions, manifest.stages["latent"].max_positions, longest)


def render_engine(
    description: dict[str, Any],
    files: dict[str, FileRecord],
    *,
    proven: bool = True,
    rows: tuple[int, ...] = (),
) -> str:
    """The text of `engine.json`; proven: the engine was run, its self-test is what came out. rows: as for
    `Engine`."""
    records = {name: asdict(files[name]) for name in sorted(files)}
    return _text({"description": description, "proven": proven, "rows": list(rows), "files": records})


def with_threads(path: Path, best: int, cores: int) -> str:
    """The text of the `engine.json` in this directory, with how many threads were best on that many cores."""
    return _text({**_read(path), "threads": {"best": best, "cores": cores}})


def with_rows(path: Path, rows: tuple[int, ...], packed: dict[str, FileRecord]) -> str:
    """The text of the `engine.json` in this sound directory, with these packed graphs, or plans, instead of
    its own."""
    old = _packed_files(_read(path)["description"], rows_of(path), caches_of(path))
    return _exchanged(path, "rows", list(rows), old, packed)


def with_caches(path: Path, caches: str, narrow: dict[str, FileRecord]) -> str:
    """The same with these files for its caches, one of `CACHES`."""
    old = cache_files(_read(path)["description"]["stages"], rows_of(path), caches_of(path))
    return _exchanged(path, "caches", caches, old, narrow)


def with_prefill(path: Path, stages: tuple[str, ...], files: dict[str, FileRecord]) -> str:
    """The same with these files for `stages` that read chunks in int8."""
    return _exchanged(path, "int8_prefill", list(stages), prefill_files(prefill_of(path)), files)


def _exchanged(
    path: Path, key: str, value: str | list[int] | list[str], old: set[str], new: Mapping[str, FileRecord]
) -> str:
    payload = _read(path)
    kept = {name: each for name, each in payload["files"].items() if name not in old}
    files = dict(sorted({**kept, **{name: asdict(each) for name, each in new.items()}}.items()))
    return _text({**payload, key: value, "files": files})


def cache_files(stages: Iterable[str], rows: Iterable[int], caches: str) -> set[str]:
    """Files that an engine for ONNX Runtime has for its caches, beside those of a float32 engine."""
    if caches == "float32":
        return set()
    stages, rows = tuple(stages), tuple(rows)
    packed = {packed_graph_file(stage, count, caches) for stage in stages for count in rows}
    return {SCALES_NAME, NARROW_SELF_TEST_NAME, *(graph_file(stage, caches) for stage in stages), *packed}


def prefill_files(stages: Iterable[str]) -> set[str]:
    """Files that an engine for ONNX Runtime has for stages that read chunks in int8."""
    return {f"{prefill_graph_file(stage)}{end}" for stage in stages for end in ("", ".data")}


def _text(payload: dict[str, Any]) -> str:
    return json.dumps(payload, indent=1) + "\n"


def rows_of(path: Path) -> tuple[int, ...]:
    """For how many texts an engine's directory has packed graphs, or plans, ascending; () where that is
    damaged."""
    rows = _read(path).get("rows", [])
    if not isinstance(rows, list) or not all(
        type(count) is int and 2 <= count <= MOST_ROWS for count in rows
    ):
        return ()
    return tuple(rows) if sorted(set(rows)) == rows else ()


def caches_of(path: Path) -> str:
    """What an engine's directory keeps keys and values as; float32 where that is damaged."""
    caches = _read(path).get("caches")
    return str(caches) if caches in CACHES else CACHES[0]


def prefill_of(path: Path) -> tuple[str, ...]:
    """Stages that read chunks in int8 from an engine's directory; () where that is damaged."""
    stages = _read(path).get("int8_prefill", [])
    named = isinstance(stages, list) and all(isinstance(stage, str) for stage in stages)
    return tuple(stage for stage in STAGES if stage in stages) if named else ()


def read_description(path: Path) -> dict[str, Any] | None:
    """What the engine in this directory was made for; None when its `engine.json` is damaged."""
    description = _read(path).get("description")
    return description if isinstance(description, dict) else None


def was_proven(path: Path) -> bool:
    """Whether the engine in this directory was run before it was published, and gave its self-test."""
    return bool(_read(path).get("proven"))


def best_threads(path: Path) -> int | None:
    """With how many threads the engine in this directory was fastest when it was built, `MOST_THREADS` where
    it was all cores that the builder had; None if that was not measured.
    """
    measured = _read(path).get("threads")
    try:
        fields = Fields(measured)
        best, cores = (fields.whole(name, 1, MOST_THREADS) for name in ("best", "cores"))
    except BundleError:
        return None
    return best if best < cores else MOST_THREADS


def _read(path: Path) -> dict[str, Any]:
    """An engine's `engine.json`; empty when it is damaged."""
    try:
        payload = parse_json(read_plain(path / ENGINE_NAME))
    except (BltError, OSError, ValueError):
        return {}
    return payload if isinstance(payload, dict) else {}


def check_engine_files(
    path: Path, description: dict[str, Any], again: str, full: bool = False, progress: Progress | None = None
) -> None:
    """Compare an engine's directory with this description, and its files with their records.

    again: the remedy, for the error. full and progress: as for `integrity.check_files`. Raises BundleError.
    """
    payload = _read(path)
    makes = (plan_file,) if "profiles" in description else (graph_file, data_file)
    names = {SELF_TEST_NAME, *(make(stage) for stage in description["stages"] for make in makes)}
    names |= _packed_files(description, rows_of(path))
    if "profiles" not in description:
        names |= cache_files(description["stages"], rows_of(path), caches_of(path))
        names |= prefill_files(prefill_of(path))
    try:
        files = Fields(payload, "").parts("files", lambda name, _: str(name), record(FileRecord))
    except BundleError:
        files = {}
    if payload.get("description") != description or set(files) != names:
        raise BundleError(f"{path.name}: its {ENGINE_NAME} is damaged; {again}")
    for name in sorted(names):
        if not os.path.lexists(path / name):
            raise BundleError(f"{path.name}: {name} is missing; {again}")
    check_records(path, files, full=full, progress=progress, remedy=again)


def _packed_files(description: dict[str, Any], rows: tuple[int, ...], caches: str = "float32") -> set[str]:
    make = packed_plan_file if "profiles" in description else packed_graph_file
    names = {make(stage, count) for stage in description["stages"] for count in rows}
    if caches != "float32":
        names |= {
            packed_graph_file(stage, count, caches) for stage in description["stages"] for count in rows
        }
    return names


# 2. Where they are.


def engine_path(directory: Path, description: dict[str, Any]) -> Path:
    """Where in the bundle the engine of this description belongs."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    return directory / "engines" / f"{description['target']}-{fingerprint}"


def engines_of(directory: Path, target: str) -> list[Path]:
    """Every engine of a bundle for a target, whatever it was made for, by name."""
    # Not those of another target whose name begins alike.
    engines = (directory / "engines").glob(f"{target}-*")
    return sorted(engine for engine in engines if engine.name.rpartition("-")[0] == target)


def find_engine(
    directory: Path, manifest: Manifest, *, full: bool = False, progress: Progress | None = None
) -> Engine:
    """ONNX Runtime's engine for this machine: there, made for these graphs, and its files as recorded.

    full and progress: as for `integrity.check_files`. Never raises for what is wrong with an engine.
    """
    try:
        description = describe_engine(manifest)
        path = engine_path(directory, description)
        if not os.path.lexists(path):
            return Engine(PORTABLE.name, _missing(directory, description))
        check_engine_files(
            path, description, f"blt-edge build --force {directory} makes it again", full, progress
        )
    except BltError as error:
        return Engine(PORTABLE.name, str(error))
    return Engine.at(directory, path)


def _missing(directory: Path, description: dict[str, Any]) -> str:
    """Why there is no engine: none was built, or those that are there are for something else."""
    remedy = f"blt-edge build {directory} makes one, which is faster and takes less memory"
    for other in engines_of(directory, description["target"]):
        theirs = read_description(other)
        if theirs is not None:
            return f"{other.name} was built {_difference(theirs, description)}; {remedy}"
    return f"no engine was built for this device; {remedy}"


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key, name in _WHAT.items():
        if theirs.get(key) != ours[key]:
            if key == "features":
                return "for a processor with other instructions"
            return f"for {name} {str(theirs.get(key))[:60]!r}, here it is {str(ours[key])!r}"
    return "for other graphs or options"


def find_tensorrt_engine(
    directory: Path,
    manifest: Manifest,
    trt: TensorRtModule,
    compute_capability: str,
    *,
    prefill_chunk: int = 256,
    rollback: int = 64,
    full: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """The engine to run on a GPU of this compute capability; of several, that for the longest texts.

    prefill_chunk, rollback: what the model is loaded with; engines for less are refused. full and progress:
    as for `integrity.check_files`. Never raises for what is wrong with an engine: `Engine.reason` says it.
    """
    build = build_command(directory, trt.target)
    wanted = {"prefill_chunk": prefill_chunk, "rollback": rollback}
    engines = [path for path in engines_of(directory, trt.target) if not path.is_symlink()]
    descriptions = [(path, read_description(path) or {}) for path in engines]
    reasons = []
    for path, description in sorted(descriptions, key=lambda each: _longest(each[1]), reverse=True):
        misfit = _misfit(path, description, manifest, trt, compute_capability, wanted)
        if misfit is not None:
            reasons.append(f"{path.name} {misfit}; {build} makes one that fits")
            continue
        try:
            check_engine_files(path, description, f"{build} --force makes it again", full, progress)
        except BltError as error:
            reasons.append(str(error))
        else:
            return Engine.at(directory, path)
    return Engine(PORTABLE.name, [*reasons, f"{trt.name} has no engines here; {build} makes them"][0])


def _longest(description: dict[str, Any]) -> tuple[int, int]:
    try:
        limits = read_limits(description.get("profiles"))
    except BltError:
        return 0, 0
    return limits.max_bytes, limits.max_patches


def _misfit(
    path: Path,
    theirs: dict[str, Any],
    manifest: Manifest,
    trt: TensorRtModule,
    capability: str,
    wanted: dict[str, int],
) -> str | None:
    """Why an engine of TensorRT is not for this machine and bundle; None when it is."""
    damaged = f"has a damaged {ENGINE_NAME}"
    version, capabilities = theirs.get("version"), theirs.get("compute_capabilities")
    if theirs.get("target") != trt.target or not isinstance(capabilities, list):
        return damaged
    if not all(isinstance(value, str) and value.isprintable() for value in capabilities):
        return damaged
    if version != trt.version:
        return f"was built by {trt.name} {str(version)[:60]!r}, here it is {trt.version!r}"
    if capability not in capabilities:
        built_for = " and ".join(capabilities)[:60]
        return f"was built for compute capability {built_for}, here it is {capability}"
    if theirs.get("stages") != _graphs(manifest):
        return "was built for other graphs"
    if theirs.get("blt_edge_form") != _TENSORRT_SCHEMA:
        return "was built by another version of blt-edge"
    try:
        limits = Profiles.from_dict(theirs.get("profiles"), manifest).limits
    except BundleError as error:
        return f"does not fit: {error}"
    for limit, value in wanted.items():
        most = getattr(limits, limit)
        if most < value:
            return f"was built for a {limit} of up to {most}, here it is {value}"
    return None if engine_path(path.parent.parent, theirs) == path else damaged


def engine_profiles(engine: Engine, manifest: Manifest) -> Profiles:
    """The profiles of what `find_tensorrt_engine` found. Raises BundleError when they are damaged."""
    assert engine.directory is not None
    return Profiles.from_dict((read_description(engine.directory) or {}).get("profiles"), manifest)
