"""Where a model runs: the stages of a bundle on the device that was asked for, or the best there is.

| device             | stages                                        | needs                           |
|--------------------|-----------------------------------------------|---------------------------------|
| `cpu`              | ONNX Runtime, with the engine `build` made    | onnxruntime                     |
| `tensorrt`         | engines that `build --target tensorrt` made   | tensorrt, cuda-bindings         |
| `tensorrt-rtx`     | engines of `build --target tensorrt-rtx`      | tensorrt-rtx, cuda-bindings     |
| `cuda`             | ONNX Runtime's CUDA provider                  | onnxruntime-gpu, cuda-bindings  |
| `ort-tensorrt`     | ONNX Runtime's TensorRT provider              | TensorRT 10's libraries as well |
| `ort-tensorrt-rtx` | ONNX Runtime's TensorRT-RTX provider          | an ONNX Runtime that has it     |

A device that was asked for by name is the device used, or an error says why not. `auto` takes engines for
this GPU where the bundle has any, else `cuda`, else `cpu`; `Engine.reason` says what was in the way. What
fails later, while it runs, is replaced in the same way: by the portable graphs on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .backends.base import EngineLimits, StageBackend
from .backends.cuda import CudaDriver
from .backends.gpu import Gpu
from .backends.ort import NarrowGraph, OrtStage
from .backends.ort_gpu import PROVIDERS, OrtGpuStage, check_available
from .backends.ort_session import import_onnxruntime
from .backends.tensorrt import TENSORRT_TARGETS, load_tensorrt
from .backends.tensorrt_profiles import Profiles, packed_plan_file, plan_file
from .backends.tensorrt_stage import TensorRtStage
from .embedding import EmbeddingTable
from .engines import (
    MOST_THREADS,
    PORTABLE,
    Engine,
    best_threads,
    engine_limits,
    engine_profiles,
    engines_of,
    find_engine,
    find_tensorrt_engine,
    graph_file,
    packed_graph_file,
    was_proven,
)
from .errors import BackendError, BltError, OptionError
from .fields import plain_text, shown
from .host import MOST_NAME
from .integrity import Progress, check_files
from .manifest import Manifest
from .names import DEVICES, prefill_graph_file
from .narrow_cache import SCALES_NAME, read_scales
from .processors import free_cores
from .self_test import check_engine

__all__ = ["LoadRequest", "narrow_graphs", "open_device", "open_gpu", "portable_stages"]

# Where a byte reads less than this, a second thread gains nothing while bytes are added one by one: its part
# of a product is done before the threads have met (docs/results.md, "Beside other work").
_ONE_THREAD = 24e6
_PATCH_BYTES = 4.5

Stages = dict[str, StageBackend]

Probe = Callable[[Stages, Engine], None]
"""Runs every stage once. Raises BackendError when that does not work."""


@dataclass(frozen=True)
class LoadRequest:
    """A bundle and its opened parts, and how its stages are to be loaded."""

    directory: Path
    manifest: Manifest
    device: str
    """One of `DEVICES`."""
    threads: int | None
    """CPU threads; None takes what is free and best for the bundle."""
    prefill_chunk: int
    rollback: int
    provider_options: Mapping[str, str]
    """Options of ONNX Runtime's GPU providers, in the place of ours of the same name."""
    portable: bool
    """On the CPU: pass over engines."""
    table: EmbeddingTable
    probe: bool
    """Whether an engine has to repeat what it gave when it was built."""
    full: bool
    """Compare whole files of an engine with their sha256."""
    progress: Progress | None
    """Told of that."""


def open_device(request: LoadRequest, probe: Probe) -> tuple[Stages, Engine]:
    """Every stage's backend on the device, and what they run from. A GPU has to pass `probe`.

    Raises OptionError for options that the device does not have, BackendError when it can't be used,
    BundleError when the bundle's graphs are not what its manifest says.
    """
    device = request.device
    if not isinstance(device, str) or device not in DEVICES:
        raise OptionError(f"device: got {shown(device)}, allowed are {', '.join(DEVICES)}")
    if request.provider_options and device not in PROVIDERS:
        raise OptionError(
            f"provider_options: device {device!r} has none; the devices that do are {', '.join(PROVIDERS)}"
        )
    if device not in ("auto", "cpu") and request.threads is not None:
        raise OptionError(
            f"threads: got {request.threads!r}, device {device!r} computes on the GPU; leave it out"
        )
    if device == "cpu":
        return _open_cpu(request)
    if device == "auto":
        return _open_best(request, probe)
    return _open_on_gpu(request, device, probe)


def portable_stages(request: LoadRequest, engine: Engine) -> Callable[[], tuple[Stages, Engine]] | None:
    """What opens the portable graphs on the CPU in place of an engine that fails while it runs.

    None where nothing else may run: those graphs run already, or the device was asked for by name. The call
    raises BundleError when the bundle is not any longer what was loaded, BackendError.
    """
    if engine.directory is None and engine.device == PORTABLE.device:
        return None
    if request.device not in ("auto", "cpu"):
        return None

    def opened() -> tuple[Stages, Engine]:
        check_files(request.directory, request.manifest)
        threads = _threads(request, None)
        return _open_portable(request, threads), replace(PORTABLE, threads=threads)

    return opened


def open_gpu() -> Gpu:
    """This machine's GPU. Raises BackendError where there is none, or no driver for it."""
    return Gpu(CudaDriver())


# 1. The best there is.


def _open_best(request: LoadRequest, probe: Probe) -> tuple[Stages, Engine]:
    devices = [target for target in TENSORRT_TARGETS if engines_of(request.directory, target)]
    with suppress(BackendError):
        if PROVIDERS["cuda"].name in import_onnxruntime().get_available_providers():
            devices.append("cuda")
    refusals = []
    for device in devices:
        try:
            return _open_on_gpu(request, device, probe)
        except BackendError as error:
            refusals.append(str(error))
    stages, engine = _open_cpu(request)
    if refusals:
        reasons = [*refusals, *([engine.reason] if engine.reason else [])]
        engine = replace(engine, reason="; ".join(dict.fromkeys(reasons)))
    return stages, engine


# 2. One device.


def _open_on_gpu(request: LoadRequest, device: str, probe: Probe) -> tuple[Stages, Engine]:
    opened = (_open_provider if device in PROVIDERS else _open_tensorrt)(request, device)
    probe(*opened)
    return opened


def _open_cpu(request: LoadRequest) -> tuple[Stages, Engine]:
    directory, manifest, engine = request.directory, request.manifest, PORTABLE
    if not request.portable:
        engine = find_engine(directory, manifest, full=request.full, progress=request.progress)
    threads = _threads(request, engine.directory)
    if engine.directory is not None:
        try:
            narrow = narrow_graphs(manifest, engine)
            stages: Stages = {
                stage: OrtStage(
                    directory,
                    manifest,
                    stage,
                    threads,
                    optimized=engine.directory / graph_file(stage),
                    packed={
                        rows: engine.directory / packed_graph_file(stage, rows, engine.caches)
                        for rows in engine.rows
                    },
                    narrow=narrow.get(stage),
                    prefill=engine.directory / prefill_graph_file(stage)
                    if stage in engine.int8_prefill
                    else None,
                )
                for stage in manifest.stages
            }
            _check(request, stages, engine.directory, engine_limits(manifest), narrow)
            return stages, replace(engine, threads=threads)
        except BltError as error:  # an engine that is refused, or computes something else, is passed over
            engine = Engine(PORTABLE.name, f"{engine.name}: {error}")
    return _open_portable(request, threads), replace(engine, threads=threads)


def narrow_graphs(manifest: Manifest, engine: Engine) -> dict[str, NarrowGraph]:
    """What an engine for ONNX Runtime has for caches in 8 bits, by stage; {} when it has float32 ones.

    Raises BundleError when their scales are damaged.
    """
    if engine.directory is None or engine.caches == "float32":
        return {}
    path = engine.directory
    scales = read_scales(path / SCALES_NAME, manifest)
    return {
        stage: NarrowGraph(path / graph_file(stage, engine.caches), each) for stage, each in scales.items()
    }


def _open_portable(request: LoadRequest, threads: int) -> Stages:
    directory, manifest = request.directory, request.manifest
    return {
        stage: OrtStage(
            directory,
            manifest,
            stage,
            threads,
            packed={rows: directory / packed_graph_file(stage, rows) for rows in manifest.rows},
        )
        for stage in manifest.stages
    }


def _threads(request: LoadRequest, engine: Path | None) -> int:
    """CPU threads as they were asked for, else as many as are free, and as pay for this bundle."""
    if request.threads is not None:
        return request.threads
    best = None if engine is None else best_threads(engine)
    if best is None and _bytes_read(request.manifest) < _ONE_THREAD:
        best = 1
    # Whether one core is free need not be looked at.
    return 1 if best == 1 else min(free_cores(), best or MOST_THREADS)


def _bytes_read(manifest: Manifest) -> float:
    """About how many bytes of weights a byte of text reads; the latent stage runs once a patch."""
    shares = {"latent": 1 / _PATCH_BYTES}
    return sum(manifest.stage_bytes(name) * shares.get(name, 1.0) for name in manifest.stages)


def _check(
    request: LoadRequest,
    stages: Stages,
    path: Path,
    limits: EngineLimits,
    narrow: Mapping[str, NarrowGraph] | None = None,
) -> None:
    """Raise BackendError when the engine in `path` does not compute what it did when it was built.

    narrow: what its stages have for caches in 8 bits, which are then in use.
    """
    if not request.probe:
        return
    scales = {stage: graph.scales for stage, graph in (narrow or {}).items()}
    try:
        check_engine(request.manifest, stages, request.table, path, limits, scales, alike=was_proven(path))
    except BltError as error:
        raise BackendError(f"{error}; build it again") from error


def _open_tensorrt(request: LoadRequest, target: str) -> tuple[Stages, Engine]:
    directory, manifest, trt = request.directory, request.manifest, load_tensorrt(target)
    gpu = open_gpu()
    found = find_tensorrt_engine(
        directory,
        manifest,
        trt,
        ".".join(map(str, gpu.driver.compute_capability)),
        prefill_chunk=request.prefill_chunk,
        rollback=request.rollback,
        full=request.full,
        progress=request.progress,
    )
    path = found.directory
    if path is None:
        raise BackendError(str(found.reason))
    ranges = engine_profiles(found, manifest)
    stages: Stages = {
        stage: TensorRtStage(
            gpu,
            trt,
            manifest,
            stage,
            path / plan_file(stage),
            ranges,
            directory,
            packed={rows: path / packed_plan_file(stage, rows) for rows in found.rows},
        )
        for stage in manifest.stages
    }
    _check(request, stages, path, ranges.limits)
    told = f"{gpu.driver.name}, {trt.name} {trt.version}"
    kernels = plain_text(f"{trt.name} on {gpu.driver.name}", MOST_NAME)
    return stages, replace(found, device=told, kernels=kernels, max_bytes=ranges.limits.max_bytes)


def _open_provider(request: LoadRequest, device: str) -> tuple[Stages, Engine]:
    directory, manifest = request.directory, request.manifest
    version = check_available(device).__version__
    gpu = open_gpu()
    ranges = Profiles.of(manifest, prefill_chunk=request.prefill_chunk, rollback=request.rollback)
    caches = directory / "engines" / f"{device}-cache"
    # A bundle may be on a medium that can't be written; then engines are compiled at each start.
    writable = os.access(caches if caches.is_dir() else directory, os.W_OK)
    stages = {
        stage: OrtGpuStage(
            gpu,
            directory,
            manifest,
            stage,
            device,
            request.provider_options,
            ranges=ranges,
            caches=caches if writable else None,
        )
        for stage in manifest.stages
    }
    told = f"{gpu.driver.name}, {PROVIDERS[device].name} of ONNX Runtime {version}"
    plain = [name for name, stage in stages.items() if stage.graphs_refused]
    if plain:
        told += f", without CUDA graphs for {', '.join(plain)}"
    kernels = plain_text(f"{PROVIDERS[device].name} on {gpu.driver.name}", MOST_NAME)
    return dict(stages), replace(PORTABLE, device=told, kernels=kernels)
