"""ONNX Runtime's GPU providers: CUDA, and its own TensorRT and TensorRT-RTX, everything resident on the GPU.

Sessions compute on the stream that copies and caches use, and do not wait at a run's end. Calls of few
positions run as CUDA graphs, each under an id for its shapes and addresses: ONNX Runtime does not notice when
those of an id change, and gives a captured graph back with the session only. No provider falls back to the
CPU in silence: where a session really runs is looked at when it is opened. A graph that ONNX Runtime can't
capture as a whole, because some nodes are on the CPU, runs without CUDA graphs; `graphs_refused` says so.
Packed graphs of a bundle run in sessions of their own, without CUDA graphs.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import StageCache
from ..errors import BackendError, engine_error, requirement
from ..manifest import Manifest
from ..names import packed_graph_file
from ..packed_check import check_packed
from ..paths import native_path
from .base import CacheLimits, PackedStage
from .gpu import DeviceRingCache, Gpu, GpuCall, drop
from .gpu_packed import GpuPackedStage, Loaded, Place
from .ort_session import import_onnxruntime, session_signature
from .signatures import (
    ROWS,
    Shapes,
    check_signature,
    check_weights_file,
    input_type,
    packed_signature,
    stage_signature,
)
from .tensorrt_profiles import PROFILED_PADDING, ProfileAxes, Profiles

__all__ = ["PROVIDERS", "OrtGpuStage", "Provider", "check_available", "preload_libraries"]

# A run over more positions is one of prefill, whose shapes seldom come back.
_GRAPH_POSITIONS = 32
# Of one session: freed memory comes back at the same addresses, so that a long run needs few; should it not,
# graphs may not fill the memory.
_MOST_GRAPHS = 1024
_NO_GRAPH = -1


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime."""

    name: str
    """ONNX Runtime's name."""
    install: str
    """How to get it."""
    graph_option: str = "enable_cuda_graph"
    """Its option that turns CUDA graphs on."""
    switch: tuple[str, str] = ("0", "1")
    """(off, on), as its options spell it."""
    caches: Mapping[str, str] = field(default_factory=dict)
    """Its options for keeping what it compiles; values are formatted with the directory."""
    profile_option: str | None = None
    """Its options for ranges of shapes, to be formatted with min, opt or max; None = it needs none."""
    exact: Mapping[str, str] = field(default_factory=dict)
    """Its options for float32 products in float32; without them a product keeps ten bits (TF32)."""


PROVIDERS = {
    "cuda": Provider("CUDAExecutionProvider", f"pip install {requirement('gpu')}", exact={"use_tf32": "0"}),
    "ort-tensorrt": Provider(
        "TensorrtExecutionProvider",
        f"pip install {requirement('gpu')} and TensorRT 10's libraries (libnvinfer.so.10)",
        graph_option="trt_cuda_graph_enable",
        switch=("False", "True"),
        caches={
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": "{directory}",
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": "{directory}",
        },
        profile_option="trt_profile_{}_shapes",
    ),
    "ort-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "install an ONNX Runtime built with the TensorRT-RTX provider",
        caches={"nv_runtime_cache_path": "{directory}"},
        profile_option="nv_profile_{}_shapes",
    ),
}
"""Devices of ONNX Runtime, and what runs them."""


def check_available(device: str) -> Any:
    """The onnxruntime module, when it has the provider of a device. Raises BackendError."""
    ort = import_onnxruntime()
    provider = PROVIDERS[device]
    there = ort.get_available_providers()
    if provider.name not in there:
        raise BackendError(
            f"device {device!r} needs ONNX Runtime's {provider.name}; version {ort.__version__} here has "
            f"{', '.join(there)}; {provider.install}, and uninstall onnxruntime, which hides it"
        )
    preload_libraries(ort)
    return ort


@cache
def preload_libraries(ort: Any) -> None:
    """Load CUDA's libraries where pip put them: no provider looks there by itself."""
    preload = getattr(ort, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # a provider that lacks one says so itself
            preload()


class OrtGpuStage:
    """A portable stage graph in a session on the GPU: a `StageBackend`."""

    def __init__(
        self,
        gpu: Gpu,
        directory: Path,
        manifest: Manifest,
        stage: str,
        device: str,
        options: Mapping[str, str],
        *,
        ranges: Profiles,
        caches: Path | None = None,
    ) -> None:
        """device: one of `PROVIDERS`; options: of the provider, over ours; ranges: of the axes, for prefill
        and decode steps; caches: a directory for what the provider compiles. Packed graphs of the bundle are
        used where the provider needs no ranges for them.

        Raises BackendError when ONNX Runtime refuses the graph or runs it elsewhere, BundleError when the
        graph is not what the manifest says.
        """
        self.memory = gpu
        self._directory, self._manifest, self._stage, self._ranges = directory, manifest, stage, ranges
        self._spec, self._provider = manifest.stages[stage], PROVIDERS[device]
        self._file, self._signature = self._spec.file, stage_signature(manifest, stage)
        ort = check_available(device)
        provider, kept = self._provider, {}
        if caches is not None and provider.caches:
            caches.mkdir(parents=True, exist_ok=True)
            kept = {name: value.format(directory=caches) for name, value in provider.caches.items()}
        settings = {
            "device_id": "0",
            # Not has_user_compute_stream: it follows from this, and TensorRT's provider does not know it.
            "user_compute_stream": str(gpu.driver.stream),
            provider.graph_option: provider.switch[1],
            **provider.exact,
            **kept,
            **_ranges(provider, self._signature[0], ranges.stages[stage]),
            **options,
        }
        plain = {**settings, provider.graph_option: provider.switch[0]}
        self._packed = Loaded(
            manifest.rows if provider.profile_option is None else (), partial(self._load_packed, ort, plain)
        )
        self.graphs_refused = False
        """Whether ONNX Runtime could not capture this graph."""
        self._graphs = settings[provider.graph_option] not in ("0", "false", "False")
        self._graph_ids: dict[object, int] = {}
        check_weights_file(directory / self._file, self._spec.data)
        self._session = self._open_session(ort, directory / self._file, settings)
        gpu.release_with(self, drop, self._session)
        self._run_options = ort.RunOptions
        check_signature(self._file, self._signature, session_signature(self._session))

    @property
    def rows(self) -> tuple[int, ...]:
        return self._packed.rows

    @property
    def padding(self) -> int:
        return PROFILED_PADDING

    @property
    def packed_positions(self) -> int:
        return self._ranges.packed_positions(self._stage)

    def packed(self, texts: int) -> PackedStage:
        return self._packed.for_texts(texts)

    def _load_packed(self, ort: Any, settings: dict[str, str], rows: int) -> PackedStage:
        path = self._directory / packed_graph_file(self._stage, rows)
        check_weights_file(path, self._spec.data)
        session = self._open(ort, path, settings)
        self.memory.release_with(self, drop, session)
        expected = packed_signature(self._manifest, self._stage, rows)
        check_signature(path.name, expected, session_signature(session))
        options = _run_options(ort.RunOptions, _NO_GRAPH)
        packed = OrtGpuPackedStage(self.memory, self._manifest, self._stage, rows, session, options)
        check_packed(self._manifest, self._stage, self, packed, rows, self._ranges.limits)
        return packed

    def _open_session(self, ort: Any, path: Path, settings: dict[str, str]) -> Any:
        try:
            return self._open(ort, path, settings)
        except BackendError as error:
            if not self._graphs or "graph capture" not in str(error):
                raise
            self._graphs, self.graphs_refused = False, True
            return self._open(ort, path, {**settings, self._provider.graph_option: self._provider.switch[0]})

    def _open(self, ort: Any, path: Path, settings: Mapping[str, str]) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # its errors are raised, too, and names made visible then
        name = self._provider.name
        try:
            # Its own way to fall back prints to stdout and hides the reason.
            with native_path(path) as file:
                session = ort.InferenceSession(
                    file, options, providers=[(name, dict(settings))], enable_fallback=False
                )
        except Exception as error:  # of many kinds, all with the reason in their text
            raise engine_error(f"{path.name}: {name} refused it", error) from error
        ran = session.get_providers()
        if not ran or ran[0] != name:
            raise BackendError(
                f"{path.name}: {name} was asked for, but ONNX Runtime {ort.__version__} would run it on "
                f"{', '.join(ran) or 'nothing'}; its libraries are missing or too old: see blt-edge doctor"
            )
        return session

    def new_cache(self, limits: CacheLimits) -> StageCache:
        return DeviceRingCache(self.memory, self._spec, limits)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Any]
    ) -> GpuCall:
        call = GpuCall(self.memory, self._signature, shapes, cache, shared)
        binding = self._session.io_binding()
        for name, shape in call.input_shapes.items():
            binding.bind_input(name, "cuda", 0, input_type(name), shape, call.addresses[name])
        for name, shape in call.output_shapes.items():
            binding.bind_output(name, "cuda", 0, np.float32, shape, call.addresses[name])
        graph = self._graph_id(call.input_shapes, call.addresses)
        run_options = _run_options(self._run_options, graph)
        # ONNX Runtime captures by itself.
        call.connect(partial(self._run, binding, run_options, graph != _NO_GRAPH), capturable=False)
        return call

    def _run(self, binding: Any, run_options: Any, as_graph: bool) -> None:
        try:
            self._session.run_with_iobinding(binding, run_options)
        except Exception as error:  # likewise
            option = f"{self._provider.graph_option}={self._provider.switch[0]}"
            advice = f"--provider-option {option} does without CUDA graphs" if as_graph else ""
            raise engine_error(f"{self._file}: ONNX Runtime could not run it", error, advice) from error

    def _graph_id(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> int:
        """The CUDA graph for a call of these shapes and addresses, `_NO_GRAPH` for a call without one."""
        if not self._graphs or shapes["positions"][1] > _GRAPH_POSITIONS:
            return _NO_GRAPH
        with self.memory.lock:
            key = (tuple(shapes.items()), tuple(addresses.items()))
            if key not in self._graph_ids and len(self._graph_ids) == _MOST_GRAPHS:
                return _NO_GRAPH
            return self._graph_ids.setdefault(key, len(self._graph_ids) + 1)


class OrtGpuPackedStage(GpuPackedStage):
    """A stage's graph for up to `rows` texts, in a session of its own, which holds the weights once more."""

    def __init__(
        self, gpu: Gpu, manifest: Manifest, stage: str, rows: int, session: Any, run_options: Any
    ) -> None:
        super().__init__(gpu, manifest, stage, rows)
        self._file = packed_graph_file(stage, rows)
        self._session, self._run_options = session, run_options
        self._binding = session.io_binding()

    def _bind(self, name: str, place: Place, before: Place | None) -> bool:
        address, shape = place
        if name in self._taken:
            device = "cpu" if name == ROWS else "cuda"
            self._binding.bind_input(name, device, 0, input_type(name), shape, address)
        else:
            self._binding.bind_output(name, "cuda", 0, np.float32, shape, address)
        return True

    def _bound(self, done: bool) -> None:
        """Shapes are looked at when it runs."""

    def _execute(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._run_options)
        except Exception as error:  # of many kinds, all with the reason in their text
            raise engine_error(f"{self._file}: ONNX Runtime could not run it", error) from error


def _run_options(new: Any, graph: int) -> Any:
    """Options of a run that is waited for by others; graph: the CUDA graph that it is, or `_NO_GRAPH`."""
    options = new()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _ranges(provider: Provider, inputs: Shapes, ranges: tuple[ProfileAxes, ProfileAxes]) -> dict[str, str]:
    """One profile that covers both, tuned for decode steps; without it the provider would compile an engine
    anew for every longer shape it meets."""
    if provider.profile_option is None:
        return {}
    prefill, decode = ranges

    def size(axis: int | str, bound: str) -> int:
        if not isinstance(axis, str):
            return axis
        both = [getattr(axes[axis], bound) for axes in (prefill, decode)]
        return int({"min": min(both), "opt": both[1], "max": max(both)}[bound])

    return {
        provider.profile_option.format(bound): ",".join(
            f"{name}:{'x'.join(str(size(axis, bound)) for axis in axes)}" for name, axes in inputs.items()
        )
        for bound in ("min", "opt", "max")
    }
