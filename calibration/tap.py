"""A stage of a float32 bundle that shows what enters its weight products while it runs.

The graph file is read, the first input of every product with a stored matrix becomes an output too, and the
result runs from memory over the bundle's own mapped weights: nothing in the bundle is touched or copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..runtime.backends.base import CacheLimits, Done, ring_cache
from ..runtime.backends.contract import check_contract, stage_inputs, stage_outputs
from ..runtime.backends.memory import HOST
from ..runtime.cache import RingCache, StageCache
from ..runtime.errors import BackendError, first_line
from ..runtime.manifest import Manifest
from .rewrite import linear_products

__all__ = ["TappedCall", "TappedStage", "WeightProduct", "weight_products"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Rows beyond a patch's length are padding: no product's real input.
_PADDED_AXIS = "patch_length"


@dataclass(frozen=True)
class WeightProduct:
    """One MatMul of an activation with a stored matrix."""

    weight: str
    """Name of the matrix's initializer, [K, N]."""
    activation: str
    """Name of the value that enters, [..., K]."""
    inputs: int
    """K."""
    padded: bool
    """Whether the value is [B, P, L, K] with rows that only pad patches to one length."""


def weight_products(model: ir.Model) -> list[WeightProduct]:
    """The products of a float32 stage graph that a change of precision rewrites, in graph order."""
    found = []
    for node in linear_products(model.graph):
        value, weight = node.inputs
        assert value is not None
        assert weight is not None
        assert weight.shape is not None
        axes = [] if value.shape is None else [str(axis) for axis in value.shape]
        inputs = int(weight.shape.numpy()[0])
        found.append(WeightProduct(str(weight.name), str(value.name), inputs, _PADDED_AXIS in axes))
    return found


Watch = Callable[[WeightProduct, Floats], None]
"""Called with what enters a product, float32 [rows, K], padding left out; copy what must outlive the call."""


class TappedStage:
    """A StageBackend that calls `watch` for every weight product of every run."""

    memory = HOST

    def __init__(
        self, directory: Path, manifest: Manifest, stage: str, watch: Watch, threads: int | None = None
    ) -> None:
        """Load a stage of the float32 bundle in `directory`; threads None leaves it to ONNX Runtime.

        Raises BackendError when ONNX Runtime refuses the graph, BundleError when it is not what the
        manifest says.
        """
        path = directory / manifest.stages[stage].file
        try:
            model = ir.load(path)
        except Exception as error:  # protobuf and onnx_ir raise many kinds
            raise BackendError(f"{path.name} is no ONNX graph; export the checkpoint again") from error
        self.products = weight_products(model)
        self._session = _session(path, _with_taps(model, self.products), threads)
        types = {value.name: value.type for value in self._session.get_inputs()}
        shapes = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        check_contract(path.name, "input", stage_inputs(manifest, stage), shapes)
        self._results = list(stage_outputs(manifest, stage))
        shapes = {value.name: tuple(value.shape) for value in self._session.get_outputs()}
        declared = {name: shapes[name] for name in self._results if name in shapes}
        check_contract(path.name, "output", stage_outputs(manifest, stage), declared)
        whole = {name for name, kind in types.items() if kind == "tensor(int64)"}
        self._types = {name: np.int64 if name in whole else np.float32 for name in types}
        self._watch = watch
        self._spec = manifest.stages[stage]

    def new_cache(self, limits: CacheLimits) -> RingCache:
        """See StageBackend.new_cache."""
        return ring_cache(self._spec, limits)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Array]
    ) -> TappedCall:
        """See StageBackend.bind."""
        inputs: dict[str, Array] = {name: np.zeros(size, self._types[name]) for name, size in shapes.items()}
        feeds = {**inputs, **shared, **cache.inputs()}
        return TappedCall(self._session, inputs, feeds, self._results, self.products, self._watch)


class TappedCall:
    """A StageCall whose `run` also passes on what entered the products."""

    def __init__(
        self,
        session: Any,
        inputs: dict[str, Array],
        feeds: dict[str, Array],
        results: list[str],
        products: list[WeightProduct],
        watch: Watch,
    ) -> None:
        self.inputs = inputs
        self.outputs: dict[str, Array] = {}
        self._session, self._feeds, self._results = session, feeds, results
        self._products, self._watch = products, watch
        tapped = dict.fromkeys(product.activation for product in products)
        self._taps = [name for name in tapped if name not in feeds]

    def begin(self) -> None:
        """See StageCall.begin."""

    def run(self, done: Done) -> None:
        """Compute the outputs and call `watch` for each product."""
        started = time.perf_counter()
        names = [*self._results, *self._taps]
        computed = self._session.run(names, self._feeds)
        values = {**self._feeds, **dict(zip(names, computed, strict=True))}
        self.outputs = {name: values[name] for name in self._results}
        for product in self._products:
            value = values[product.activation]
            if product.padded:
                slots = np.arange(value.shape[2])
                value = value[slots < self.inputs["patch_lengths"][..., None]]
            self._watch(product, value.reshape(-1, product.inputs))
        done(time.perf_counter() - started)


def _with_taps(model: ir.Model, products: list[WeightProduct]) -> bytes:
    known = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    for name in dict.fromkeys(product.activation for product in products):
        if name not in known:
            value = by_name[name]
            value.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


def _session(path: Path, graph: bytes, threads: int | None) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendError(
            "calibration runs on ONNX Runtime, which is not installed; pip install 'blt-edge[cpu]'"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    # As in the runtime: float32 weights stay in the mapped file, and idle stages leave the cores alone.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many kinds, all with the reason in their text
        raise BackendError(
            f"{path.name}: ONNX Runtime {ort.__version__} refused it: {first_line(error)}"
        ) from error
