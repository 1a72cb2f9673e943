"""Ranges of a model's activations, collected while it reads text as it does when it is used.

Real sequences over the float32 bundle: each window from BOS, first in prefill chunks, its last bytes one at a
time, the latent stage whenever patches close. Nothing but observers is kept, so memory does not grow with
the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.backends.base import StageBackend
from ..runtime.backends.ort import OrtStage
from ..runtime.embedding import EmbeddingTable
from ..runtime.errors import OptionError
from ..runtime.integrity import check_files
from ..runtime.manifest import Manifest, load_manifest
from ..runtime.model import BltModel
from ..runtime.sequence import SequenceLimits
from ..runtime.vocabulary import encode
from .data import Window, bundled_texts, choose_windows, open_texts
from .observers import METHODS, CalibrationError, Observer
from .ranges import CalibrationRun, Observations, Ranges
from .tap import TappedStage, WeightProduct

__all__ = [
    "DEFAULT_METHOD",
    "DEFAULT_WINDOWS",
    "check_method",
    "check_texts",
    "collect_observations",
    "collect_ranges",
]

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
