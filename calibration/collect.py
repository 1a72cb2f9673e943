"""Ranges of a model's activations, collected while it reads text as it does when it is used.

Real sequences over the float32 bundle: each window from BOS, first in prefill chunks, its last bytes one at a
time, the latent stage whenever patches close. Nothing but observers is kept, so memory does not grow with
the text.

What enters a stage's weight products is seen by reading its graph file, making the first input of each such
product an output too, and running the result from memory over the bundle's own mapped weights: nothing in the
bundle is touched or copied.
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
from ..graphs.surgery import foreign_graph, input_of, weights_from
from ..runtime.backends.base import HOST, CacheLimits, Done, OneText, StageBackend, ring_cache
from ..runtime.backends.ort import OrtStage
from ..runtime.backends.ort_session import import_onnxruntime, new_session, session_options, session_signature
from ..runtime.backends.signatures import check_signature, check_weights_file, input_type, stage_signature
from ..runtime.cache import RingCache, StageCache
from ..runtime.embedding import EmbeddingTable
from ..runtime.errors import OptionError
from ..runtime.fields import checked_int
from ..runtime.integrity import check_files
from ..runtime.manifest import Manifest, load_manifest
from ..runtime.model import BltModel
from ..runtime.names import CALIBRATION_METHODS
from ..runtime.sequence import SequenceLimits
from ..runtime.vocabulary import encode
from .data import Window, bundled_texts, choose_windows, open_texts
from .observers import ActivationObserver, CalibrationError, CalibrationRun, Observations

__all__ = [
    "DEFAULT_METHOD",
    "DEFAULT_WINDOWS",
    "check_method",
    "check_texts",
    "collect_observations",
    "window_ids",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
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

# 1. Texts through a model.


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

    texts: files and folders, None takes the bundled ones. windows: how many at most. window_bytes: bytes of
    each; None takes 511, or what the model was trained on when that is less. stages: those to observe, None =
    all.
    divisors: weight name -> float32 [K] that its input is divided by before it is observed
    (`smooth.Smoothing.divisors`). threads: CPU threads, None leaves it to the engine. progress(bytes done,
    all).

    Raises OptionError (texts, windows, a bundle that is not float32), BundleError, BackendError, and
    CalibrationError naming the weight whose input is not finite.
    """
    directory = Path(bundle)
    manifest = load_manifest(directory)
    check_files(directory, manifest)
    for stage, spec in manifest.stages.items():
        if spec.precision != "fp32":
            raise OptionError(
                f"{directory}: its {stage} stage is {spec.precision}; calibration needs the float32 bundle"
            )
    size = window_ids(manifest.model.trained_context) - 1 if window_bytes is None else window_bytes
    size = checked_int("window_bytes", size, 1, manifest.model.max_positions - 1)
    opened = bundled_texts() if texts is None else open_texts(texts, size)
    chosen = choose_windows(opened, windows, size, seed)
    observers: dict[str, ActivationObserver] = {}

    def watch(product: WeightProduct, values: Floats) -> None:
        observer = observers.setdefault(product.weight, ActivationObserver(product.inputs))
        divisor = (divisors or {}).get(product.weight)
        try:
            observer.observe(values if divisor is None else values / divisor)
        except CalibrationError as error:
            raise CalibrationError(f"{product.weight}: {error}") from None

    model = tapped_model(directory, manifest, manifest.stages if stages is None else stages, watch, threads)
    for index, window in enumerate(chosen):
        read_window(model, window)
        if progress is not None:
            progress((index + 1) * size, len(chosen) * size)
    # The first patch closes before the first byte, whatever the rule: even the latent stage has run.
    assert all(observer.rows for observer in observers.values())
    names = tuple(text.name for text in opened)
    return Observations(CalibrationRun(names, len(chosen), size, seed), observers)


def window_ids(trained_context: int) -> int:
    """Ids of a window of a model of this trained context, BOS included."""
    return min(_WINDOW_IDS, trained_context)


def check_texts(
    texts: Sequence[str | Path] | None, windows: int, trained_context: int, seed: int = 0
) -> None:
    """Raise OptionError when `collect_observations` would refuse the texts for a model of this context."""
    size = window_ids(trained_context) - 1
    choose_windows(bundled_texts() if texts is None else open_texts(texts, size), windows, size, seed)


def check_method(method: str) -> None:
    """Raise OptionError unless `method` is one of `names.CALIBRATION_METHODS`."""
    if method not in CALIBRATION_METHODS:
        allowed = ", ".join(CALIBRATION_METHODS)
        raise OptionError(f"calibration method: got {method!r}, allowed are {allowed}")


def read_window(model: BltModel, window: Window) -> None:
    """Read a window from BOS, its last bytes one by one."""
    sequence = model.sequence()
    ids = encode(window.read())
    steps = min(_STEPS, len(ids) - 1)
    for part in (ids[: len(ids) - steps], *ids[len(ids) - steps :].reshape(-1, 1)):
        for _ in sequence.extend(part):
            pass


# 2. A model that shows what enters its weight products.


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


Watch = Callable[[WeightProduct, Floats], None]
"""Called with what enters a product, float32 [rows, K], padding left out; copy what must outlive the call."""


def tapped_model(
    directory: Path, manifest: Manifest, stages: Collection[str], watch: Watch, threads: int | None
) -> BltModel:
    """A float32 bundle's model that calls `watch` for every weight product of every run of these stages."""
    backends: dict[str, StageBackend] = {
        stage: TappedStage(directory, manifest, stage, watch, threads)
        if stage in stages
        else OrtStage(directory, manifest, stage, threads)
        for stage in manifest.stages
    }
    chunk, rollback = (min(limit, manifest.axes["bytes"].max) for limit in _LIMITS)
    limits = SequenceLimits(chunk, rollback, manifest.model.max_positions)
    table = EmbeddingTable.open(directory, manifest.embedding)
    return BltModel(manifest, backends, table, limits, directory)


class TappedStage(OneText):
    """A StageBackend that calls `watch` for every weight product of every run."""

    memory = HOST

    def __init__(
        self, directory: Path, manifest: Manifest, stage: str, watch: Watch, threads: int | None
    ) -> None:
        """Load a stage of the float32 bundle in `directory`; threads None leaves it to ONNX Runtime.

        Raises BackendError when ONNX Runtime refuses the graph, BundleError when it is not what the
        manifest says.
        """
        self._spec, self.watch = manifest.stages[stage], watch
        path = directory / self._spec.file
        check_weights_file(path, self._spec.data)
        self.products: list[WeightProduct] = []
        with foreign_graph(path.name):
            model = ir.load(path)
            weights = weights_from(model, directory / self._spec.data)
            tapped = self._tap(model)
        ort = import_onnxruntime()
        self.session = new_session(ort, path.name, tapped, session_options(ort, "fp32", threads), weights)
        expected = stage_signature(manifest, stage)
        self.results = list(expected[1])
        inputs, outputs = session_signature(self.session)
        declared = {name: outputs[name] for name in self.results if name in outputs}
        check_signature(path.name, expected, (inputs, declared))

    def _tap(self, model: ir.Model) -> bytes:
        """The graph, serialized, with every product's input among its outputs."""
        for node in linear_products(model.graph):
            value, weight = input_of(node, 0), input_of(node, 1)
            assert weight.shape is not None
            # Rows beyond a patch's length are padding: no product's real input.
            padded = value.shape is not None and "patch_length" in map(str, value.shape)
            width = int(weight.shape.numpy()[0])
            self.products.append(WeightProduct(str(weight.name), str(value.name), width, padded))
            if not value.is_graph_input() and not value.is_graph_output():
                value.type = ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)
        graph: bytes = ir.to_proto(model).SerializeToString()
        return graph

    def new_cache(self, limits: CacheLimits) -> RingCache:
        return ring_cache(self._spec, limits)

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Array]
    ) -> TappedCall:
        inputs: dict[str, Array] = {name: np.zeros(size, input_type(name)) for name, size in shapes.items()}
        return TappedCall(self, inputs, {**inputs, **shared, **cache.inputs()})


class TappedCall:
    """A StageCall whose `run` also passes on what entered the products."""

    def __init__(self, stage: TappedStage, inputs: dict[str, Array], feeds: dict[str, Array]) -> None:
        self.inputs = inputs
        self.outputs: dict[str, Array] = {}
        self._stage, self._feeds = stage, feeds
        tapped = dict.fromkeys(product.activation for product in stage.products)
        self._names = [*stage.results, *(name for name in tapped if name not in feeds)]

    def begin(self) -> None:
        """See StageCall.begin."""

    def run(self, done: Done) -> None:
        """Compute the outputs and call `watch` for each product."""
        started = time.perf_counter()
        computed = self._stage.session.run(self._names, self._feeds)
        values = {**self._feeds, **dict(zip(self._names, computed, strict=True))}
        self.outputs = {name: values[name] for name in self._stage.results}
        for product in self._stage.products:
            value = values[product.activation]
            if product.padded:
                slots = np.arange(value.shape[2])
                value = value[slots < self.inputs["patch_lengths"][..., None]]
            self._stage.watch(product, value.reshape(-1, product.inputs))
        done(time.perf_counter() - started)
