"""ONNX Runtime on the CPU: sessions over mapped or prepacked weights, and calls through IO binding."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cache import StageCache
from ..errors import BackendError, BundleError, engine_error, requirement
from ..host import describe_processor
from ..manifest import Manifest
from ..paths import native_path
from .base import HOST, CacheLimits, Done, PackedStage, ordered_cache, ring_cache
from .signatures import Signature, check_signature, check_weights_file, output_shapes, stage_signature

__all__ = [
    "OrtCall",
    "OrtStage",
    "import_onnxruntime",
    "input_types",
    "new_session",
    "save_optimized",
    "session_entries",
    "session_options",
    "session_signature",
]

Array = npt.NDArray[Any]

SPIN_MICROSECONDS = "50"
"""How long a worker waits for its next part by computing. Beside other work that takes the processor from
whoever has the part: unbounded, two threads gave a quarter to a tenth of one thread's speed. Bounded by less
than a product takes, nothing is lost on an idle machine (docs/results.md, "Beside other work")."""

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
}


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises BackendError when it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"device 'cpu' needs ONNX Runtime, which is not installed; pip install {requirement('cpu')}"
        ) from error
    # As for a session's: what no session logs, such as a size beyond all memory, is raised, too.
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def session_entries(precision: str) -> dict[str, str]:
    """Configuration of a session over a stage of this precision, whatever the threads."""
    # Four sessions share the cores: a worker that spins after its run takes one from the next stage.
    entries = {"session.force_spinning_stop": "1"}
    if precision in ("fp32", "fp16"):
        # Weights stay in the mapped file: prepacking would copy every matrix into private memory,
        # and float32 products run at full read bandwidth without it.
        entries["session.disable_prepacking"] = "1"
    # Integer products need prepacking: without it a block product is some fifty times slower.
    if precision in ("int4", "int8w"):
        # Inputs are rounded to int8 block by block, each row by itself: five times the speed.
        entries["session.qdq_matmulnbits_accuracy_level"] = "4"
    if precision == "int8" and int8_saturates():
        entries["session.x64quantprecision"] = "1"
    return entries


def session_options(ort: Any, precision: str, threads: int | None) -> Any:
    """Options for a session over a stage of this precision; `ort` is the onnxruntime module.

    threads None leaves the choice to ONNX Runtime.
    """
    options = ort.SessionOptions()
    # Its errors are raised, too; its log would show names inside a graph to the terminal as they are.
    options.log_severity_level = 4
    options.inter_op_num_threads = 1
    # An arena keeps what the largest chunk of a prompt took, four times over, for steps that need next to
    # nothing; without it a step takes as long.
    options.enable_cpu_mem_arena = False
    if threads is not None:
        options.intra_op_num_threads = threads
    # Not among `session_entries`: it changes no engine.
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    for name, value in session_entries(precision).items():
        options.add_session_config_entry(name, value)
    return options


def save_optimized(
    model: bytes, weights: Path, precision: str, graph: Path, *, prepacked: bool = True
) -> None:
    """Write a stage as ONNX Runtime runs it here: optimized, weights in its kernels' layout beside it.

    model: the stage's graph, serialized; weights: the directory of its external data; graph: the file to
    write, whose weights go to its name with ".data", from where they are mapped. prepacked: keep them as
    kernels want them, too; else that is done at each load. Raises BackendError when ONNX Runtime is missing,
    refuses the graph, or cannot write.
    """
    ort = import_onnxruntime()
    options = session_options(ort, precision, threads=None)
    data = graph.with_name(graph.name + ".data")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
    if prepacked:
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    with native_path(graph) as name:
        options.optimized_model_filepath = name
        new_session(ort, graph.name, model, options, weights)
    data.touch()  # a graph of few weights keeps them inside


def new_session(ort: Any, name: str, model: bytes | Path, options: Any, weights: Path | None = None) -> Any:
    """A session on the CPU over a graph's file, or over a graph whose external data lie in `weights`.

    Raises BackendError when it is refused.
    """
    with native_path(model if isinstance(model, Path) else weights or Path()) as path:
        if weights is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", path)
        graph = path if isinstance(model, Path) else model
        try:
            return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many kinds, all with the reason in their text
            raise engine_error(f"{name}: ONNX Runtime {ort.__version__} refused it", error) from error


def session_signature(session: Any) -> Signature:
    """Inputs and outputs of a session's graph, as it declares them."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    return (
        {value.name: tuple(value.shape) for value in inputs},
        {value.name: tuple(value.shape) for value in outputs},
    )


def input_types(file: str, session: Any) -> dict[str, type[np.generic]]:
    """What a session's inputs hold. Raises BundleError naming `file` for what no stage takes."""
    values = session.get_inputs()
    for value in values:
        if value.type not in _DTYPES:
            raise BundleError(f"{file}: {value.name[:60]!r} is {value.type}; export the checkpoint again")
    return {value.name: _DTYPES[value.type] for value in values}


@cache
def int8_saturates() -> bool:
    """Whether this processor's fast int8 products may overflow 16 bits: x86 without VNNI instructions.

    Where it cannot be told, the answer is yes: slower and right.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    return "vnni" not in describe_processor()["features"]


class OrtStage:
    """A stage graph in an ONNX Runtime session: a `StageBackend`."""

    memory = HOST

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        stage: str,
        threads: int | None,
        *,
        optimized: Path | None = None,
        packed: Mapping[int, Path] | None = None,
    ) -> None:
        """Load a stage of the bundle in `directory`; threads None leaves the choice to ONNX Runtime.

        optimized: a graph that `save_optimized` wrote from it, to load instead; with fused attention it reads
        an ordered cache. packed: the same graph's forms for several texts, by how many.

        Raises BackendError when ONNX Runtime is missing or refuses the graph, BundleError when the graph is
        not what the manifest says.
        """
        path = directory / manifest.stages[stage].file if optimized is None else optimized
        check_weights_file(path, manifest.stages[stage].data if optimized is None else f"{path.name}.data")
        ort = import_onnxruntime()
        options = session_options(ort, manifest.stages[stage].precision, threads)
        if optimized is not None:
            # Nothing is left to do, and whatever was folded again would leave the mapped file.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = new_session(ort, path.name, path, options)
        self._spec, self._signature = manifest.stages[stage], session_signature(self._session)
        self._fused = optimized is not None and "past_length" in self._signature[0]
        check_signature(path.name, stage_signature(manifest, stage, fused=self._fused), self._signature)
        self._input_types = input_types(path.name, self._session)
        self._files = dict(sorted((packed or {}).items()))
        self._packed: dict[int, PackedStage] = {}
        self._manifest, self._stage, self._threads = manifest, stage, threads
        self._optimized = optimized is not None

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(self._files)

    def packed(self, texts: int) -> PackedStage:
        rows = next(rows for rows in self._files if rows >= texts)
        if rows not in self._packed:
            from .ort_packed import OrtPackedStage  # which builds on this module

            self._packed[rows] = OrtPackedStage(
                self._manifest,
                self._stage,
                self._threads,
                self._files[rows],
                rows,
                optimized=self._optimized,
                fused=self._fused,
            )
        return self._packed[rows]

    def new_cache(self, limits: CacheLimits) -> StageCache:
        return ordered_cache(self._spec, limits) if self._fused else ring_cache(self._spec, limits)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Array]
    ) -> OrtCall:
        if self._fused:
            shapes = {**shapes, "past_length": (1,), "total_length": ()}
        inputs = {name: np.zeros(shape, self._input_types[name]) for name, shape in shapes.items()}
        given, made = self._signature
        own = {name: axes for name, axes in made.items() if not name.startswith("present.")}
        shaped = output_shapes((given, own), shapes)
        outputs = {name: np.zeros(shape, np.float32) for name, shape in shaped.items()}
        return OrtCall(self._session, cache, shared, inputs, outputs)


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
        if not isinstance(binding, _Binding):  # one that runs among others only needs none
            binding = self._cache.binding = _Binding(self._session, self._cache, self._shared)
        if binding.bound is not self.inputs:
            binding.bind(self.inputs, self.outputs)
        binding.run()
        done(time.perf_counter() - started)


class _Binding:
    """One cache's buffers bound to a session, and the buffers of whichever call runs."""

    def __init__(self, session: Any, cache: StageCache, shared: Mapping[str, Array]) -> None:
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
