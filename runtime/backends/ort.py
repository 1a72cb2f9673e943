"""ONNX Runtime on the CPU: stages in sessions over mapped or prepacked weights, called through IO binding."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..buffers import zeros
from ..cache import StageCache
from ..errors import BackendError, BundleError
from ..manifest import Manifest
from ..names import CHUNK_POSITIONS
from ..narrow_cache import STEP_POSITIONS
from .base import HOST, PADDING, CacheLimits, Done, PackedStage, narrow_cache, ordered_cache, ring_cache
from .ort_packed import OrtPackedStage
from .ort_session import import_onnxruntime, input_types, new_session, session_options, session_signature
from .signatures import check_signature, check_weights_file, output_shapes, stage_signature

__all__ = ["NarrowGraph", "OrtCall", "OrtStage"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class NarrowGraph:
    """What an engine has beside a stage's graph to keep its cache in 8 bits."""

    path: Path
    """The graph that reads such a cache, over the same weights."""
    scales: npt.NDArray[np.float32]
    """Of the cache's numbers, [2 * layers, Hkv, head_dim]."""


class OrtStage:
    """A stage graph in an ONNX Runtime session: a `StageBackend`."""

    memory = HOST
    padding = PADDING

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        stage: str,
        threads: int | None,
        *,
        optimized: Path | None = None,
        packed: Mapping[int, Path] | None = None,
        narrow: NarrowGraph | None = None,
        prefill: Path | None = None,
    ) -> None:
        """Load a stage of the bundle in `directory`; threads None leaves the choice to ONNX Runtime.

        optimized: a graph that `save_optimized` wrote from it, to load instead; with fused attention it reads
        an ordered cache. packed: the same graph's forms for several texts, by how many. narrow: its form for
        caches in 8 bits, which runs steps; `packed` are then made of that one. prefill: its form for chunks,
        which is loaded when the first one comes.

        Raises BackendError when ONNX Runtime is missing or refuses the graph, BundleError when the graph is
        not what the manifest says.
        """
        path = directory / manifest.stages[stage].file if optimized is None else optimized
        check_weights_file(path, manifest.stages[stage].data if optimized is None else f"{path.name}.data")
        session = self._open(path, manifest.stages[stage].precision, threads, optimized=optimized is not None)
        self._spec, self._signature = manifest.stages[stage], session_signature(session)
        self._fused = optimized is not None and "past_length" in self._signature[0]
        wanted = stage_signature(manifest, stage, fused=self._fused)
        check_signature(path.name, wanted, self._signature)
        self._input_types = input_types(path.name, session)
        self._sessions: dict[np.dtype[Any], Any] = {np.dtype(np.float32): session}
        self._narrow = narrow
        if narrow is not None:
            check_weights_file(narrow.path, f"{path.name}.data")
            session = self._open(narrow.path, self._spec.precision, threads, optimized=True)
            check_signature(narrow.path.name, wanted, session_signature(session))
            self._sessions[np.dtype(np.int8)] = session
        self._prefill, self._prefill_session = prefill, None
        self._files = dict(sorted((packed or {}).items()))
        self._packed: dict[int, PackedStage] = {}
        self._loading = threading.Lock()
        self._manifest, self._stage, self._threads = manifest, stage, threads
        self._optimized = optimized is not None

    @staticmethod
    def _open(path: Path, precision: str, threads: int | None, *, optimized: bool) -> Any:
        ort = import_onnxruntime()
        options = session_options(ort, precision, threads)
        if optimized:
            # Nothing is left to do, and whatever was folded again would leave the mapped file.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return new_session(ort, path.name, path, options)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(self._files)

    @property
    def packed_positions(self) -> int | None:
        # More may be a chunk, whose cache is not what packed graphs read, or which has a graph of its own.
        if self._narrow is not None:
            return STEP_POSITIONS
        return None if self._prefill is None else CHUNK_POSITIONS - 1

    def packed(self, texts: int) -> PackedStage:
        rows = next(rows for rows in self._files if rows >= texts)
        with self._loading:
            if rows not in self._packed:
                self._packed[rows] = OrtPackedStage(
                    self._manifest,
                    self._stage,
                    self._threads,
                    self._files[rows],
                    rows,
                    self.new_cache,
                    optimized=self._optimized,
                    fused=self._fused,
                )
        return self._packed[rows]

    def new_cache(self, limits: CacheLimits) -> StageCache:
        if self._narrow is not None:
            return narrow_cache(self._spec, limits, self._narrow.scales)
        return ordered_cache(self._spec, limits) if self._fused else ring_cache(self._spec, limits)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Array]
    ) -> OrtCall:
        if self._fused:
            shapes = {**shapes, "past_length": (1,), "total_length": ()}
        inputs = {name: zeros(shape, self._input_types[name]) for name, shape in shapes.items()}
        given, made = self._signature
        own = {name: axes for name, axes in made.items() if not name.startswith("present.")}
        shaped = output_shapes((given, own), shapes)
        outputs = {name: zeros(shape) for name, shape in shaped.items()}
        return OrtCall(self._session(cache, shapes["positions"][1]), cache, shared, inputs, outputs)

    def _session(self, cache: StageCache, positions: int) -> Any:
        """What runs so many new positions over a cache as it is now."""
        if self._prefill is None or positions < CHUNK_POSITIONS or cache.buffer.dtype != np.float32:
            return self._sessions[cache.buffer.dtype]
        with self._loading:
            if self._prefill_session is None:
                self._prefill_session = self._open_prefill(self._prefill)
        return self._prefill_session

    def _open_prefill(self, path: Path) -> Any:
        try:
            check_weights_file(path, f"{path.name}.data")
            # Nothing is laid out anew when it is loaded, as of float32 weights: `export.operators` has why.
            session = self._open(path, "fp32", self._threads, optimized=True)
            wanted = stage_signature(self._manifest, self._stage, fused=self._fused)
            check_signature(path.name, wanted, session_signature(session))
        except BundleError as error:  # the engine was there when it was loaded: now it has failed
            raise BackendError(str(error)) from error
        return session


class OrtCall:
    """A `StageCall`: every buffer is a numpy array that ONNX Runtime reads and writes in place."""

    def __init__(
        self,
        session: Any,
        cache: StageCache,
        shared: Mapping[str, Array],
        inputs: dict[str, Array],
        outputs: dict[str, Array],
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._session, self._cache, self._shared = session, cache, shared

    def begin(self) -> None:
        """Nothing to wait for: a run is over when it returns."""

    def run(self, done: Done) -> None:
        started = time.perf_counter()
        binding = self._cache.binding
        # There is none before the first run, and another's where the last pass ran on the other graph.
        if not isinstance(binding, _Binding) or binding.session is not self._session:
            binding = self._cache.binding = _Binding(self._session, self._cache, self._shared)
        if binding.bound is not self.inputs:
            binding.bind(self.inputs, self.outputs)
        binding.run()
        done(time.perf_counter() - started)


class _Binding:
    """One cache's buffers bound to a session, and the buffers of whichever call runs."""

    def __init__(self, session: Any, cache: StageCache, shared: Mapping[str, Array]) -> None:
        self.session = session
        self._native = session.io_binding()
        # The binding holds plain addresses: keep every array alive as long as it is.
        self._kept: list[Array] = [*cache.inputs().values(), *shared.values()]
        self._inputs({**shared, **cache.inputs()})
        self._outputs(cache.outputs())
        self.bound: dict[str, Array] | None = None
        """The inputs of the call that is bound. Not the call, which knows this: a cycle would keep the cache
        until Python looks for cycles, which a loop over numpy arrays hardly ever makes it do."""
        self._bound_outputs: dict[str, Array] | None = None
        self.run = partial(session.run_with_iobinding, self._native)

    def bind(self, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        """Let the next run read and write a call's own buffers: a few microseconds, whatever the layers."""
        self.bound = None  # until all of them are bound
        self._inputs(inputs)
        self._outputs(outputs)
        self.bound, self._bound_outputs = inputs, outputs

    def _inputs(self, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            assert array.flags.c_contiguous, name
            self._native.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _outputs(self, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            self._native.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
