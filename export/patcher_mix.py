"""Which of the patcher's matrices can be in 4 bits while nearly all patches stay where float32 has them.

Patch boundaries depend on the patcher alone, so it alone is run: with all its matrices in 8 bits, with each
one by itself in 4, and then with more and more of them in 4, the harmless ones first. How harmful one is, is
how much it moves entropies for each byte that it saves. Candidates run as they will later, in this machine's
kernels. One half of the windows of the texts finds the mix, the other half must confirm it.

All weights are quantized twice, to files; a candidate's file is put together from those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..calibration.collect import window_ids
from ..calibration.data import CalibrationText, Window, bundled_texts, choose_windows, open_texts
from ..graphs.quantize import Recipe, linear_products, rewrite_stage
from ..graphs.surgery import input_of
from ..runtime.backends.ort import OrtStage
from ..runtime.errors import BltError, OptionError
from ..runtime.fields import checked_real
from ..runtime.manifest import Manifest, StageSpec
from ..runtime.names import BLOCK_PRECISIONS
from ..runtime.patching import PatchBoundaries
from ..runtime.quantization_spec import MixSpec
from ..runtime.sampling import log_probabilities
from ..runtime.sequence import PatcherState, SequenceLimits
from ..runtime.vocabulary import encode
from .bundle import bundle_stage, data_name, graph_name, load_stage, save_stage
from .quality import Tally

__all__ = [
    "MixError",
    "MixFigures",
    "MixTexts",
    "Tell",
    "check_mix",
    "check_target",
    "find_mix",
    "longest_head",
]

Floats = npt.NDArray[np.float32]

_STAGE = "patcher"
_WORDS = ("int4", "int8w")
# Windows on which each matrix is tried by itself: entropies, unlike boundaries, say much on little text.
_TRIAL_WINDOWS = 8
_LIMITS = (256, 64)  # prefill chunk and roll-back, as the runtime has them by default


@dataclass(frozen=True)
class MixTexts:
    """What a mix is found on, as calibration takes it."""

    texts: Sequence[str | Path] | None
    """Files and folders; None takes the bundled texts."""
    windows: int
    """Windows of them at most: every other one is kept to confirm what was found on the rest."""
    seed: int
    """What chooses them."""


@dataclass(frozen=True)
class MixFigures:
    """One candidate, measured."""

    narrow: int
    """Matrices in 4 bits."""
    matrices: int
    """All of them."""
    bytes: int
    """The patcher's weights on disk."""
    boundaries: float
    """Share of patch boundaries that are float32's: of the candidate's and of float32's own, the smaller."""
    bits_per_byte: float
    """How well the patcher itself predicts the text."""
    confirmed: float | None
    """`boundaries` in the half of the text that had no say; None where that was not read."""


Tell = Callable[[MixFigures], None]
"""Called with each candidate as it has been measured."""
Measure = Callable[[int, bool], MixFigures]
"""measure(matrices in 4 bits, whether to read the other half of the text, too)."""
Progress = Callable[[str, int, int], None]


class MixError(BltError):
    """No mix reaches the target."""


def check_target(target: object) -> float:
    """A share of boundaries that may be asked for. Raises OptionError."""
    return checked_real("target_boundaries", target, 0, 1, above_minimum=True)


def check_mix(manifest: Manifest, precisions: Mapping[str, str], texts: MixTexts) -> None:
    """Raise OptionError where there is nothing to mix, or the texts are too few: before minutes of work."""
    if _STAGE not in manifest.stages or not manifest.patching.needs_entropy:
        raise OptionError("target boundaries: no patcher decides this model's patches; drop the target")
    if precisions[_STAGE] not in BLOCK_PRECISIONS:
        raise OptionError(
            f"target boundaries: a mix is of int8w and int4, the patcher is {precisions[_STAGE]}; drop the "
            "target, or name another precision for the patcher"
        )
    mix_windows(texts, manifest)


def find_mix(
    bundle: Path,
    manifest: Manifest,
    recipe: Recipe,
    target: float,
    texts: MixTexts,
    folder: Path,
    *,
    tell: Tell = lambda figures: None,
    progress: Progress = lambda what, done, total: None,
) -> MixSpec:
    """The smallest mix found for the patcher of a float32 bundle.

    recipe: how integers are found; its precision is not looked at. folder: an empty one for candidates, some
    three times what the patcher takes in 8 bits. tell(figures) of each head of the order that was measured,
    progress(what, bytes of text read, in all).

    Raises OptionError for texts that can't be read in two windows, MixError when 8 bits alone miss the
    target, and BackendError.
    """
    search = _Search(bundle, manifest, recipe, folder, texts, progress)
    names = search.order()
    found = longest_head(
        len(names), lambda count, confirm: search.measure(names, count, confirm=confirm), target, tell
    )
    assert found.confirmed is not None
    narrow = set(names[: found.narrow])
    return MixSpec(
        int4=tuple(name for name in search.names if name in narrow),
        int8w=tuple(name for name in search.names if name not in narrow),
        target=target,
        boundaries=found.confirmed,
        texts=search.text_names,
        windows=len(search.windows),
        window_bytes=search.window_bytes,
        seed=texts.seed,
    )


def longest_head(count: int, measure: Measure, target: float, tell: Tell) -> MixFigures:
    """Of the candidates 0, 1, ... `count` the last whose share reaches the target in both halves of the text.

    More matrices in 4 bits move more boundaries, but for chance: the first half is asked at both ends and
    then halfway between one that reaches the target and one that misses it, the second half from the last
    that reaches it on down. Raises MixError when not even 0 does.
    """

    def told(number: int, confirm: bool) -> MixFigures:
        figures = measure(number, confirm)
        tell(figures)
        return figures

    wide = told(0, True)
    _refuse_missed(target, wide)
    low, high, guess = 0, count + 1, count
    while high - low > 1:
        reached = told(guess, False).boundaries >= target
        low, high = (guess, high) if reached else (low, guess)
        guess = (low + high) // 2
    for number in range(low, 0, -1):
        figures = told(number, True)
        assert figures.confirmed is not None
        if min(figures.boundaries, figures.confirmed) >= target:
            return figures
    return wide


def _refuse_missed(target: float, wide: MixFigures) -> None:
    assert wide.confirmed is not None
    reached = min(wide.boundaries, wide.confirmed)
    if reached < target:
        most = np.floor(reached * 1000) / 1000
        raise MixError(
            f"target boundaries: {target:g} is out of reach: with the whole patcher in 8 bits {reached:.4f} "
            f"are float32's; give at most {most:g}, or no target and --precision with patcher=fp16"
        )


@dataclass(frozen=True)
class _Reading:
    """What a patcher said of some windows."""

    entropies: tuple[Floats, ...]
    starts: tuple[tuple[int, ...], ...]
    bits: float
    bytes: int


class _Search:
    """The float32 patcher, both ways of its weights in integers, and the texts."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        recipe: Recipe,
        folder: Path,
        texts: MixTexts,
        progress: Progress,
    ) -> None:
        self._bundle, self._manifest, self._recipe, self._folder = bundle, manifest, recipe, folder
        self._spec, self._progress = manifest.stages[_STAGE], progress
        opened, self.windows, self.window_bytes = mix_windows(texts, manifest)
        self.text_names = tuple(text.name for text in opened)
        graph = bundle_stage(bundle, self._spec).graph
        self.names = [str(input_of(node, 1).name) for node in linear_products(graph)]
        self._saved = {word: self._save(word) for word in _WORDS}
        self._expected = self._read(bundle, self._spec, self.windows, "the patcher in float32")

    def _save(self, word: str) -> ir.Model:
        """The patcher with all its matrices in one precision, in a folder of its own."""
        self._progress(f"quantizing the patcher to {word}", 0, 0)
        folder = self._folder / word
        folder.mkdir()
        model = bundle_stage(self._bundle, self._spec)
        rewrite_stage(model, replace(self._recipe, precision=word, wider=frozenset()))
        save_stage(folder, _STAGE, model, lambda _bytes: None)
        return load_stage(folder, _stage_spec(self._spec, word))

    def order(self) -> list[str]:
        """The matrices, those first that move entropies least for each byte that they save."""
        finding = self.windows[::2]
        trial = finding[:: -(-len(finding) // _TRIAL_WINDOWS)]
        wide = self._candidate((), trial, "all matrices in 8 bits")
        harm = {}
        for number, name in enumerate(self.names, 1):
            what = f"matrix {number} of {len(self.names)} in 4 bits"
            found = self._candidate((name,), trial, what)
            pairs = zip(found.entropies, wide.entropies, strict=True)
            moved = np.mean(np.concatenate([(one - other) ** 2 for one, other in pairs]))
            shape = self._saved["int4"].graph.initializers[f"{name}.int4"].shape
            assert shape is not None
            harm[name] = float(moved) / float(np.prod(shape.numpy()))
        return sorted(self.names, key=harm.__getitem__)

    def measure(self, names: Sequence[str], count: int, *, confirm: bool) -> MixFigures:
        """The candidate with the first `count` of the names in 4 bits."""
        halves = [range(0, len(self.windows), 2), range(1, len(self.windows), 2)][: 2 if confirm else 1]
        shares, readings = [], []
        for half, numbers in zip(("", ", confirming"), halves, strict=False):
            windows = [self.windows[number] for number in numbers]
            what = f"{count} of {len(names)} matrices in 4 bits{half}"
            readings.append(self._candidate(names[:count], windows, what))
            wanted = [self._expected.starts[number] for number in numbers]
            tally = Tally()
            for own, other in zip(readings[-1].starts, wanted, strict=True):
                tally.add_boundaries(own, other)
            shares.append(1 - max(tally.false_boundaries, tally.missed_boundaries))
        return MixFigures(
            narrow=count,
            matrices=len(names),
            bytes=(self._folder / "candidate" / data_name(_STAGE)).stat().st_size,
            boundaries=shares[0],
            bits_per_byte=readings[0].bits / readings[0].bytes,
            confirmed=shares[1] if confirm else None,
        )

    def _candidate(self, narrow: Sequence[str], windows: Sequence[Window], what: str) -> _Reading:
        """What the patcher says with these matrices in 4 bits, the others in 8."""
        model = bundle_stage(self._bundle, self._spec)
        wider = frozenset(self.names) - frozenset(narrow)
        rewrite_stage(model, replace(self._recipe, precision="int4", wider=wider))
        for name, value in model.graph.initializers.items():
            source = self._saved["int8w" if name.rpartition(".")[0] in wider else "int4"]
            value.const_value = source.graph.initializers[name].const_value
        folder = self._folder / "candidate"
        folder.mkdir(exist_ok=True)
        save_stage(folder, _STAGE, model, lambda _bytes: None)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.release()  # a mapped file can't be removed everywhere
        return self._read(folder, _stage_spec(self._spec, "int4"), windows, what)

    def _read(self, folder: Path, spec: StageSpec, windows: Sequence[Window], what: str) -> _Reading:
        manifest = replace(self._manifest, stages={**self._manifest.stages, _STAGE: spec})
        stage = OrtStage(folder, manifest, _STAGE, None)
        chunk, rollback = (min(limit, manifest.axes["bytes"].max) for limit in _LIMITS)
        limits = SequenceLimits(chunk, rollback, manifest.model.max_positions)
        total = sum(window.size for window in windows)
        entropies, starts, bits, done = [], [], 0.0, 0
        for window in windows:
            self._progress(what, done, total)
            ids = encode(window.read())
            patcher = PatcherState(stage, limits)
            parts, logs = [], []
            for first in range(0, len(ids), chunk):
                parts.append(patcher.extend(ids[first : first + chunk]).copy())
                assert patcher.last_logits is not None
                logs.append(log_probabilities(patcher.last_logits))
            entropies.append(np.concatenate(parts))
            boundaries = PatchBoundaries(manifest.patching)
            boundaries.extend(ids, entropies[-1])
            starts.append(tuple(boundaries.starts))
            bits -= float(np.concatenate(logs)[np.arange(len(ids) - 1), ids[1:]].sum() / np.log(2))
            done += window.size
        self._progress(what, total, total)
        return _Reading(tuple(entropies), tuple(starts), bits, done)


def mix_windows(texts: MixTexts, manifest: Manifest) -> tuple[list[CalibrationText], list[Window], int]:
    """The texts, their windows, and the bytes of each. Raises OptionError unless there are two windows."""
    size = window_ids(manifest.model.trained_context) - 1
    opened = bundled_texts() if texts.texts is None else open_texts(texts.texts, size)
    windows = choose_windows(opened, texts.windows, size, texts.seed)
    if len(windows) < 2:
        raise OptionError(
            f"windows: a mix needs 2 of {size} bytes, one to find it and one to confirm it, the texts give "
            f"{len(windows)}; allow more, or give longer texts"
        )
    return opened, windows, size


def _stage_spec(spec: StageSpec, precision: str) -> StageSpec:
    return replace(spec, file=graph_name(_STAGE), data=data_name(_STAGE), precision=precision)
