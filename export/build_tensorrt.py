"""Building TensorRT engines of a bundle: a plan for each stage, all of them or nothing.

Where it is asked for, a stage has plans for several texts at once, too (`graphs.packing`). Each holds the
stage's weights once more: plans share none. Engines that are there get those that they lack.

Before they are published they compute what the portable graphs compute (`proof`), where a GPU of theirs is
at hand; where none is, they keep what they should give, and prove themselves when they are loaded.

`tensorrt_profiles` says what engines are built for, `runtime.engines` where they lie, and `tensorrt_worker`
builds one stage. Full TensorRT builds for this machine's GPU, TensorRT-RTX also for GPUs that are not here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..graphs.attention import half_attention, join_attention
from ..runtime.backends.base import EngineLimits, StageBackend
from ..runtime.backends.cuda import device_compute_capability
from ..runtime.backends.signatures import check_signature, stage_signature
from ..runtime.backends.tensorrt import TENSORRT_TARGETS, TensorRtModule, load_tensorrt
from ..runtime.backends.tensorrt_profiles import Profiles, packed_plan_file, plan_file
from ..runtime.backends.tensorrt_stage import TensorRtStage
from ..runtime.devices import open_gpu
from ..runtime.engines import (
    ENGINE_NAME,
    Engine,
    check_engine_files,
    describe_tensorrt,
    engine_path,
    rows_of,
    was_proven,
    with_rows,
)
from ..runtime.errors import BackendError, BltError, BundleError, OptionError
from ..runtime.fields import checked_int
from ..runtime.integrity import check_files, file_record
from ..runtime.manifest import Manifest, load_manifest
from ..runtime.self_test import SELF_TEST_NAME
from .build_ort import new_engine, seal_engine
from .bundle import load_stage
from .packed import check_rows
from .proof import prove_engine
from .tensorrt_worker import Moment, PlanFacts, PlanOptions, build_in_child

__all__ = ["BuildPlan", "Part", "TensorRtBuild", "TensorRtOptions", "build_engines", "plan_tensorrt"]

Watch = Callable[["Part", Moment | None], None]
"""watch(plan, what is being done): None as it begins, then some times a second."""

# Measured with TensorRT-RTX at 1B in fp16 and int4: kernels of a layer, and the builder's memory for the
# program itself, for a layer, and for each byte of weights, which it holds several times over.
_PLAN_GROWTH = 1.02
_LAYER_KERNELS = 3_000_000
_TEXT_KERNELS = 600_000  # of a layer, for each text of several: attention
_PROGRAM_MEMORY = 450_000_000
_LAYER_MEMORY = 20_000_000
_WEIGHT_MEMORY = {"fp32": 3.0, "fp16": 3.0}
_INTEGER_MEMORY = 5.0


@dataclass(frozen=True)
class TensorRtOptions:
    """What to build engines for. A limit of None is the default of `Profiles.of`."""

    target: str = "tensorrt"
    """"tensorrt" or "tensorrt-rtx"."""
    compute_capability: tuple[str, ...] = ()
    """Compute capabilities such as ("8.6",), for TensorRT-RTX only; empty = this machine's GPU."""
    max_bytes: int | None = None
    """Longest text in ids, BOS included."""
    max_patches: int | None = None
    """Most patches of a text."""
    max_patch_length: int | None = None
    """Longest patch in bytes."""
    max_batch: int = 1
    """Texts at a time."""
    prefill_chunk: int = 256
    """Bytes that one pass takes at most."""
    rollback: int = 64
    """Bytes that can be taken back without computing them again."""
    workspace: int | None = None
    """Most bytes of GPU memory that a layer may use to work in; None = all there is."""
    optimization_level: int | None = None
    """How hard TensorRT tries, 0 to 5; None = its own default."""
    rows: tuple[int, ...] | None = None
    """For how many texts at once to build plans, too, each 2 to MOST_ROWS; () = none; None = as in the engine
    that is there, none in a new one."""


@dataclass(frozen=True)
class Part:
    """One plan of several."""

    stage: str
    rows: int = 1
    """Texts at once."""

    def __str__(self) -> str:
        return f"{self.stage} graph" + (f", {self.rows} texts" if self.rows > 1 else "")

    @property
    def file(self) -> str:
        """Its name in the engine's directory."""
        return plan_file(self.stage) if self.rows == 1 else packed_plan_file(self.stage, self.rows)


@dataclass(frozen=True)
class PartEstimate:
    """What a plan will take, before it is built. Bytes."""

    precision: str
    """The stage's own."""
    weights: int
    """In the bundle."""
    plan: int
    """On disk, about."""
    peak_memory: int
    """Of the process that builds it, about."""

    @classmethod
    def of(cls, manifest: Manifest, part: Part) -> PartEstimate:
        """Estimated from the stage's weights and layers."""
        spec = manifest.stages[part.stage]
        weights, layers = manifest.files[spec.data].bytes, spec.layers + 1  # one for what is around them
        attention = _TEXT_KERNELS * spec.layers * (part.rows - 1)
        growth = _WEIGHT_MEMORY.get(spec.precision, _INTEGER_MEMORY)
        return cls(
            precision=spec.precision,
            weights=weights,
            plan=int(_PLAN_GROWTH * weights) + _LAYER_KERNELS * layers + attention,
            peak_memory=_PROGRAM_MEMORY + _LAYER_MEMORY * layers + int(growth * weights),
        )


@dataclass(frozen=True)
class BuildPlan:
    """What building will do."""

    trt: TensorRtModule
    """Who builds."""
    capabilities: tuple[str, ...]
    """Compute capabilities that the engines will run on."""
    profiles: Profiles
    """Sizes of every axis."""
    parts: dict[Part, PartEstimate]
    """All plans that there are to be, in the order in which they are built."""
    rows: tuple[int, ...]
    """For how many texts at once there are to be plans, ascending."""
    description: dict[str, Any]
    """What the engines depend on."""
    directory: Path
    """The directory that will hold the plans."""
    there: bool
    """Whether it does already, and is sound; what it has for several texts may be other than `rows`."""
    missing: tuple[Part, ...]
    """What it lacks."""
    timing_cache: Path | None
    """File of kernel times that is used and added to; None = none."""

    @property
    def plan_bytes(self) -> int:
        """Disk that all plans will take."""
        return sum(part.plan for part in self.parts.values())

    @property
    def peak_memory(self) -> int:
        """Memory that the largest plan will take while it is built; they are built one by one."""
        return max(part.peak_memory for part in self.parts.values())


@dataclass(frozen=True)
class TensorRtBuild:
    """What was built."""

    engine: Engine
    facts: dict[Part, PlanFacts]
    """Of all that was built; empty when sound engines were there already."""
    proven: bool
    """Whether they ran here, beside the portable graphs."""


def plan_tensorrt(bundle: str | Path, options: TensorRtOptions) -> BuildPlan:
    """What `build_engines` will do; nothing is written.

    Raises OptionError (a value out of range), BundleError (a damaged bundle, or graphs of another making),
    BackendError (TensorRT is not installed, or there is no GPU to build for).
    """
    directory = Path(bundle)
    if options.target not in TENSORRT_TARGETS:
        raise OptionError(f"target: got {options.target!r}, it is one of {', '.join(TENSORRT_TARGETS)}")
    manifest = load_manifest(directory)
    limits = {limit.name: getattr(options, limit.name) for limit in fields(EngineLimits)}
    ranges = Profiles.of(manifest, **limits)
    asked = None if options.rows is None else check_rows(options.rows)
    if options.workspace is not None:
        checked_int("workspace", options.workspace, 1)
    if options.optimization_level is not None:
        checked_int("optimization_level", options.optimization_level, 0, 5)
    trt = load_tensorrt(options.target)
    capabilities = _capabilities(trt, options.compute_capability)
    check_files(directory, manifest)
    for stage in manifest.stages:
        _check_graph(directory, manifest, stage)
    description = describe_tensorrt(
        manifest,
        trt,
        capabilities,
        ranges,
        workspace=options.workspace,
        optimization_level=options.optimization_level,
    )
    engine = engine_path(directory, description)
    there = _is_sound(engine, description)
    known = rows_of(engine) if there else ()
    rows = known if asked is None else asked
    parts = [Part(stage, count) for count in (1, *rows) for stage in manifest.stages]
    return BuildPlan(
        trt=trt,
        capabilities=capabilities,
        profiles=ranges,
        parts={part: PartEstimate.of(manifest, part) for part in parts},
        rows=rows,
        description=description,
        directory=engine,
        there=there,
        missing=tuple(part for part in parts if not there or part.rows not in (1, *known)),
        timing_cache=trt.timing_cache_path(capabilities[0]),
    )


def build_engines(
    bundle: str | Path,
    options: TensorRtOptions,
    *,
    force: bool = False,
    watch: Watch | None = None,
) -> TensorRtBuild:
    """Write engines of `bundle` into `engines/TARGET-FINGERPRINT/`, one process for each plan.

    Sound engines that are there already for the same options stay, unless `force`, and get or lose plans for
    several texts as asked for; all others stay. However this ends before they are complete, the bundle is as
    it was.

    Raises as `plan_tensorrt`, BackendError (TensorRT refuses a graph, crashes, or runs out of memory),
    WrongEngineError (an engine computes something else than its portable graph), WriteError (disk full).
    """
    directory = Path(bundle)
    plan = plan_tensorrt(directory, options)
    manifest = load_manifest(directory)
    engine = replace(Engine.at(directory, plan.directory), rows=plan.rows)
    builder = _Builder(directory, manifest, plan, options, watch)
    if plan.there and not force:
        facts = _with_rows(builder)
        return TensorRtBuild(engine, facts, was_proven(plan.directory))
    with new_engine(plan.directory, needed=plan.plan_bytes) as temporary:
        facts = {part: builder.build(part, temporary / part.file) for part in plan.parts}
        proven = _prove(directory, manifest, plan, temporary)
        if proven:
            _prove_packed(directory, manifest, plan, temporary, plan.rows)
        seal_engine(temporary, plan.description, proven=proven, rows=plan.rows)
    return TensorRtBuild(engine, facts, proven)


@dataclass(frozen=True)
class _Builder:
    """Builds one plan after another."""

    bundle: Path
    manifest: Manifest
    plan: BuildPlan
    options: TensorRtOptions
    watch: Watch | None

    def build(self, part: Part, file: Path) -> PlanFacts:
        plan, spec = self.plan, self.manifest.stages[part.stage]
        if self.watch is not None:
            self.watch(part, None)
        profiles = plan.profiles.stages[part.stage]
        axes = profiles if part.rows == 1 else (plan.profiles.packed(part.stage, part.rows),)
        how = PlanOptions(
            plan.capabilities if plan.trt.ahead_of_time else (),
            self.options.workspace,
            self.options.optimization_level,
            plan.timing_cache,
            half_attention=half_attention(spec),
            rows=part.rows,
        )
        return build_in_child(
            self.options.target,
            self.bundle / spec.file,
            tuple({name: (axis.min, axis.opt, axis.max) for name, axis in each.items()} for each in axes),
            file,
            how,
            partial(self.watch, part) if self.watch else None,
        )


def _with_rows(builder: _Builder) -> dict[Part, PlanFacts]:
    """Put sound engines anew, with the plans for several texts that are asked for instead of their own."""
    plan = builder.plan
    path, facts = plan.directory, {}
    if plan.rows == rows_of(path):
        return {}
    needed = sum(plan.parts[part].plan for part in plan.missing)
    with new_engine(path, needed=needed) as temporary:
        for part in plan.parts:
            if part in plan.missing:
                facts[part] = builder.build(part, temporary / part.file)
            else:
                _link(path / part.file, temporary / part.file)
        _link(path / SELF_TEST_NAME, temporary / SELF_TEST_NAME)
        if was_proven(path):
            new_rows = tuple(sorted({part.rows for part in facts}))
            _prove_packed(builder.bundle, builder.manifest, plan, temporary, new_rows)
        # What stays keeps its records: nobody has read it now.
        new = {
            part.file: file_record((temporary if part in facts else path) / part.file)
            for part in plan.parts
            if part.rows > 1
        }
        text = with_rows(path, plan.rows, new)
        (temporary / ENGINE_NAME).write_text(text, encoding="ascii")
    return facts


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # not every file system has links
        shutil.copyfile(file, target)


def _prove(directory: Path, manifest: Manifest, plan: BuildPlan, engine: Path) -> bool:
    """Compare engines with the portable graphs, if they run here at all; see `proof.prove_engine`."""
    here = device_compute_capability() in plan.capabilities
    gpu = open_gpu() if here else None

    def open_stage(stage: str) -> StageBackend:
        assert gpu is not None
        file = engine / plan_file(stage)
        return TensorRtStage(gpu, plan.trt, manifest, stage, file, plan.profiles, directory)

    prove_engine(
        directory,
        manifest,
        open_stage if here else None,
        plan.profiles.limits,
        engine / SELF_TEST_NAME,
        name=f"{plan.trt.name} {plan.trt.version}",
        alike=False,
    )
    return here


def _prove_packed(
    directory: Path, manifest: Manifest, plan: BuildPlan, engine: Path, rows: tuple[int, ...]
) -> None:
    """Compare plans for several texts with those for one, if they run here: loading them does."""
    if not rows or device_compute_capability() not in plan.capabilities:
        return
    gpu = open_gpu()
    for stage in manifest.stages:
        packed = {count: engine / packed_plan_file(stage, count) for count in rows}
        loaded = TensorRtStage(
            gpu, plan.trt, manifest, stage, engine / plan_file(stage), plan.profiles, directory, packed=packed
        )
        for count in rows:
            loaded.packed(count)


def _capabilities(trt: TensorRtModule, wanted: tuple[str, ...]) -> tuple[str, ...]:
    known = trt.compute_capabilities
    builder = f"{trt.name} {trt.version} builds for {', '.join(known)}"
    if wanted and not trt.ahead_of_time:
        raise OptionError(
            f"compute_capability: {trt.name} builds only for the GPU that it runs on; leave the option "
            "out, or take --target tensorrt-rtx"
        )
    for value in wanted:
        if value not in known:
            raise OptionError(
                f"compute_capability: got {value!r}, {builder}; engines for other GPUs are built on them, "
                "with --target tensorrt"
            )
    if wanted:
        return tuple(sorted(set(wanted), key=float))
    own = device_compute_capability()
    if own is None:
        name_one = f"name one with --compute-capability: {', '.join(known)}"
        instead = name_one if known else "build on the device"
        raise BackendError(f"this machine has no GPU (or no driver for it) to build for; {instead}")
    if known and own not in known:
        raise BackendError(f"this machine's GPU has compute capability {own}, {builder}")
    return (own,)


def _check_graph(directory: Path, manifest: Manifest, stage: str) -> None:
    """TensorRT would read whatever file a graph names, and build whatever it is: look first."""
    spec = manifest.stages[stage]
    model = load_stage(directory, spec)
    layers = join_attention(model, spec.file, half=half_attention(spec))
    if layers != spec.layers:
        raise BundleError(f"{spec.file}: {layers} attention layers found, the manifest has {spec.layers}")
    found = _axes_of(model.graph.inputs), _axes_of(model.graph.outputs)
    check_signature(spec.file, stage_signature(manifest, stage), found)


def _axes_of(values: Sequence[ir.Value]) -> dict[str, tuple[int | str, ...]]:
    return {
        str(value.name): tuple(
            axis if isinstance(axis, int) else str(axis.value) for axis in value.shape or ()
        )
        for value in values
    }


def _is_sound(engine: Path, description: dict[str, Any]) -> bool:
    if not engine.is_dir():
        return False
    try:
        check_engine_files(engine, description, again="")
    except BltError:
        return False
    return True
