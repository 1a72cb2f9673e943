"""A stage of a float32 bundle that shows what enters its weight products while it runs.

The graph file is read, the first input of every product with a stored matrix becomes an output too, and the
result runs from memory over the bundle's own mapped weights: nothing in the bundle is touched or copied.

Ranges of a model's activations, collected while it reads text as it does when it is used.

Real sequences over the float32 bundle: each window from BOS, first in prefill chunks, its last bytes one at a
time, the latent stage whenever patches close. Nothing but observers is kept, so memory does not grow with
the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graphs.quantize import linear_products
from ..runtime.backends.base import HOST, CacheLimits, Done, StageBackend, ring_cache
from ..runtime.backends.ort import OrtStage, session_signature
from ..runtime.backends.signatures import check_signature, stage_signature
from ..runtime.cache import RingCache, StageCache
from ..runtime.embedding import EmbeddingTable
from ..runtime.errors import BackendError, OptionError, first_line
from ..runtime.integrity import check_files
from ..runtime.manifest import Manifest, load_manifest
from ..runtime.model import BltModel
from ..runtime.sequence import SequenceLimits
from ..runtime.vocabulary import encode
from .data import Window, bundled_texts, choose_windows, open_texts
from .observers import METHODS, CalibrationError, CalibrationRun, Observations, Observer, Ranges

__all__ = [
    "DEFAULT_METHOD",
    "DEFAULT_WINDOWS",
    "TappedCall",
    "TappedStage",
    "WeightProduct",
    "check_method",
    "check_texts",
    "collect_observations",
    "collect_ranges",
    "weight_products",
]

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
        expected = stage_signature(manifest, stage)
        self._results = list(expected[1])
        inputs, outputs = session_signature(self._session)
        declared = {name: outputs[name] for name in self._results if name in outputs}
        check_signature(path.name, expected, (inputs, declared))
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


Progress = Callable[[int, int], None]

DEFAULT_METHOD = "mse"
"""The calibration method when none is asked for."""

DEFAULT_WINDOWS = 96
"""Windows that are read: enough that each language of the bundled text gets its turn."""

# Ids of a window, BOS included, unless the model was trained on fewer.
_WINDOW_IDS = 512
# The last bytes of each window are read one by one, as in decoding.
_STEPS = 16
_LIMITS = (256, 64)  # prefill chunk and roll-back, as the runtime has them by default


def collect_ranges(
    bundle: str | Path,
    texts: Sequence[str | Path] | None = None,
    method: str = DEFAULT_METHOD,
    *,
    windows: int = DEFAULT_WINDOWS,
    window_bytes: int | None = None,
    seed: int = 0,
    stages: Collection[str] | None = None,
    divisors: Mapping[str, Floats] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Ranges:
    """Limits by `method` for the activations of a float32 bundle; see `collect_observations`."""
    check_method(method)
    return collect_observations(
        bundle,
        texts,
        windows=windows,
        window_bytes=window_bytes,
        seed=seed,
        stages=stages,
        divisors=divisors,
        threads=threads,
        progress=progress,
    ).ranges(method)


def collect_observations(
    bundle: str | Path,
    texts: Sequence[str | Path] | None = None,
    *,
    windows: int = DEFAULT_WINDOWS,
    window_bytes: int | None = None,
    seed: int = 0,
    stages: Collection[str] | None = None,
    divisors: Mapping[str, Floats] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Observations:
    """Read windows of the texts with a float32 bundle and observe what enters its weight products.

    texts: files, None takes the bundled ones. windows: how many at most. window_bytes: bytes of each; None
    takes 511, or what the model was trained on when that is less. stages: those to observe, None = all.
    divisors: weight name -> float32 [K] that its input is divided by before it is observed
    (`smooth.Smoothing.rows`). threads: CPU threads, None leaves it to the engine. progress(bytes done, all).

    Raises OptionError (texts, windows, a bundle that is not float32), BundleError, BackendError, and
    CalibrationError naming the weight whose input is not finite.
    """
    directory = Path(bundle)
    manifest = load_manifest(directory)
    check_files(directory, manifest)
    _check_float32(directory, manifest)
    size = _window_bytes(manifest, window_bytes)
    opened = bundled_texts() if texts is None else open_texts(texts)
    chosen = choose_windows(opened, windows, size, seed)
    observers: dict[str, Observer] = {}
    watched = set(manifest.stages if stages is None else stages)
    model = _model(directory, manifest, watched, _watcher(observers, divisors or {}), threads)
    for index, window in enumerate(chosen):
        _read(model, window)
        if progress is not None:
            progress((index + 1) * size, len(chosen) * size)
    # The first patch closes before the first byte, whatever the rule: even the latent stage has run.
    assert all(observer.rows for observer in observers.values())
    names = tuple(text.name for text in opened)
    return Observations(CalibrationRun(names, len(chosen), size, seed), observers)


def check_texts(
    texts: Sequence[str | Path] | None, windows: int, trained_context: int, seed: int = 0
) -> None:
    """Raise OptionError when `collect_ranges` would refuse the texts for a model of this context."""
    opened = bundled_texts() if texts is None else open_texts(texts)
    choose_windows(opened, windows, min(_WINDOW_IDS, trained_context) - 1, seed)


def check_method(method: str) -> None:
    """Raise OptionError unless `method` is one of `observers.METHODS`."""
    if method not in METHODS:
        raise OptionError(f"calibration method: got {method!r}, allowed are {', '.join(METHODS)}")


def _check_float32(directory: Path, manifest: Manifest) -> None:
    for stage, spec in manifest.stages.items():
        if spec.precision != "fp32":
            raise OptionError(
                f"{directory}: its {stage} stage is {spec.precision}; calibration needs the float32 bundle"
            )


def _window_bytes(manifest: Manifest, wanted: int | None) -> int:
    most = manifest.model.max_positions - 1
    size = min(_WINDOW_IDS, manifest.model.trained_context) - 1 if wanted is None else wanted
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
        raise OptionError(f"window_bytes: got {size!r}, a whole number from 1 to {most} is needed")
    return size


def _watcher(
    observers: dict[str, Observer], divisors: Mapping[str, Floats]
) -> Callable[[WeightProduct, Floats | None], None]:
    def watch(product: WeightProduct, values: Floats | None) -> None:
        observer = observers.setdefault(product.weight, Observer(product.inputs))
        if values is None:
            return
        divisor = divisors.get(product.weight)
        try:
            observer.observe(values if divisor is None else values / divisor)
        except CalibrationError as error:
            raise CalibrationError(f"{product.weight}: {error}") from None

    return watch


def _model(
    directory: Path,
    manifest: Manifest,
    watched: Collection[str],
    watch: Callable[[WeightProduct, Floats | None], None],
    threads: int | None,
) -> BltModel:
    backends: dict[str, StageBackend] = {}
    for stage in manifest.stages:
        if stage in watched:
            tapped = TappedStage(directory, manifest, stage, watch, threads)
            for product in tapped.products:
                watch(product, None)  # every product has its observer, seen or not
            backends[stage] = tapped
        else:
            backends[stage] = OrtStage(directory, manifest, stage, threads)
    chunk, rollback = (min(limit, manifest.axes["bytes"].max) for limit in _LIMITS)
    limits = SequenceLimits(chunk, rollback, manifest.model.max_positions)
    table = EmbeddingTable.open(directory, manifest.embedding)
    return BltModel(manifest, backends, table, limits, directory)


def _read(model: BltModel, window: Window) -> None:
    sequence = model.sequence()
    ids = encode(window.read())
    steps = min(_STEPS, len(ids) - 1)
    for part in (ids[: len(ids) - steps], *ids[len(ids) - steps :].reshape(-1, 1)):
        for _ in sequence.extend(part):
            pass
