"""Packed graphs, written beside the stage graphs that they are made of; those of an engine are proven, too.

A packed graph (`graphs.packing`) takes several texts at once and reads the weights of the graph for one.
Before an engine lists it, texts of different lengths go through it together, and one by one through the
engine's own graph: in chunks and single steps, from nothing, after a few positions, and past the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..graphs.packing import pack_rows
from ..runtime.backends.base import CacheLimits, EngineLimits, narrow_cache, ordered_cache, ring_cache
from ..runtime.backends.ort_session import import_onnxruntime, new_session, session_options
from ..runtime.backends.signatures import ROWS, row_name, stage_outputs
from ..runtime.cache import StageCache
from ..runtime.embedding import EmbeddingTable
from ..runtime.engines import engine_limits, graph_file, packed_graph_file
from ..runtime.errors import BackendError, BltError, engine_error
from ..runtime.fields import checked_int
from ..runtime.manifest import Manifest, StageSpec
from ..runtime.names import MOST_ROWS
from ..runtime.self_test import (
    LOAD_ROWS,
    SELF_TEST_NAME,
    Hold,
    Inputs,
    Traced,
    allowed,
    first_breach,
    keys_values,
    read_self_test,
    rounds_as,
    state_inputs,
    text_inputs,
)

__all__ = ["check_rows", "pack_engine", "write_packed"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Positions that each text adds in the passes that are compared, the texts in turn.
_PASSES = ((5, 1, 3, 2), (1, 1, 1, 1), (1, 7, 1, 2))
_ROLLBACK = 8


def pack_engine(
    directory: Path,
    manifest: Manifest,
    engine: Path,
    rows: tuple[int, ...],
    warn: Callable[[str], None],
    scales: Mapping[str, Floats] | None = None,
) -> bool:
    """Write packed graphs beside the stage graphs of an engine, proven; returns whether they are there.

    scales: make them of the graphs for caches in 8 bits, whose scales these are. Where one of them can't be
    had there are none, and warn(line) says why. Raises OSError (disk full).
    """
    if not rows:
        return True
    caches = "float32" if scales is None else "int8"
    files = [packed_graph_file(stage, count, caches) for stage in manifest.stages for count in rows]
    try:
        write_packed(engine, manifest.stages, rows, caches)
        table = EmbeddingTable.open(directory, manifest.embedding)
        _prove(engine, manifest, table, engine_limits(manifest), rows, scales)
    except BaseException as error:
        for name in files:
            (engine / name).unlink(missing_ok=True)
        if not isinstance(error, BltError):
            raise
        warn(f"no packed graphs: {error}; texts run one by one")
        return False
    return True


def check_rows(rows: Sequence[int]) -> tuple[int, ...]:
    """How many texts at once were asked for, ascending, each once. Raises OptionError."""
    return tuple(sorted({checked_int("rows", count, 2, MOST_ROWS) for count in rows}))


def write_packed(
    directory: Path, stages: Iterable[str], rows: Sequence[int], caches: str = "float32"
) -> None:
    """Write packed graphs of the stage graphs in a bundle's or an engine's directory, beside them.

    caches: what those read. Raises BltError when one is not what this version writes, OSError (disk full).
    """
    for stage in stages if rows else ():
        name = graph_file(stage, caches)
        model = onnx.load(directory / name, load_external_data=False)
        for count in rows:
            packed = pack_rows(model, count, name)
            (directory / packed_graph_file(stage, count, caches)).write_bytes(packed.SerializeToString())


def _prove(
    engine: Path,
    manifest: Manifest,
    table: EmbeddingTable,
    reach: EngineLimits,
    rows: Sequence[int],
    scales: Mapping[str, Floats] | None,
) -> None:
    """Compare an engine's packed graphs with its graphs for one text. Peak memory is one stage, loaded twice.

    Raises BackendError naming stage and figure when one computes something else, or ONNX Runtime refuses it.
    """
    kept = read_self_test(engine / SELF_TEST_NAME, manifest, reach)
    inputs = text_inputs(manifest, table, LOAD_ROWS)
    inputs["latent"], inputs["decoder"] = state_inputs(kept["states"], reach.max_patch_length)
    inputs["decoder"]["patch_values"] = kept["patch_values"]
    for stage, spec in manifest.stages.items():
        texts = _texts(max(rows), spec, reach.positions(stage, spec), reach.rollback)
        own = None if scales is None else scales[stage]
        caches = "float32" if own is None else "int8"
        precision = rounds_as(spec.precision, own is not None)
        alone = _Graph(engine / graph_file(stage, caches), manifest, stage, reach, own)
        expected = [run for text in texts for run in alone.runs([text], inputs[stage])]
        for count in rows:
            path = engine / packed_graph_file(stage, count, caches)
            packed = _Graph(path, manifest, stage, reach, own, packed=True)
            found = packed.runs(texts[:count], inputs[stage])
            wanted = [run.outputs for run in expected[: len(found)]]
            breach = first_breach(precision, found, wanted, allowed(precision, alike=True))
            if breach is not None:
                raise BackendError(f"{stage}, {count} texts packed: {breach.told('what each alone gives')}")


@dataclass(frozen=True)
class _Text:
    """One text of several: what it has read before, and the rows of inputs that it takes."""

    number: int
    first: int
    """The oldest position that its cache holds."""
    held: int
    """How many it holds."""
    counts: tuple[int, ...]
    """Positions that it adds in each pass."""

    def rows(self, step: int) -> Array:
        """Numbers of the inputs' rows of a pass."""
        return 3 * self.number + sum(self.counts[:step]) + np.arange(self.counts[step])


def _texts(count: int, spec: StageSpec, most: int, rollback: int) -> list[_Text]:
    """Texts that begin, that have read a little, or a window and more; of at most `most` positions."""
    passes = [each for end, each in enumerate(_PASSES, 1) if sum(map(max, _PASSES[:end])) <= most]
    beyond = (0, 40) if spec.window is None else (7, spec.window - 1 + min(_ROLLBACK, rollback))
    texts = []
    for number in range(count):
        counts = tuple(each[number % 4] for each in passes or [(1,) * 4])
        first, held = ((0, 0), (0, 3), beyond, (0, 20))[number % 4]
        held += number // 4 if held else 0  # texts of other lengths hold other values
        if first + held + sum(counts) > most:
            first = held = 0
        texts.append(_Text(number, first, held, counts))
    return texts


class _Graph:
    """A loaded graph of a stage, for one text or several packed ones."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        stage: str,
        reach: EngineLimits,
        scales: Floats | None,
        *,
        packed: bool = False,
    ) -> None:
        self._name, self._spec, self._packed = path.name, manifest.stages[stage], packed
        self._scales = scales
        ort = import_onnxruntime()
        options = session_options(ort, self._spec.precision, None)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = new_session(ort, path.name, path, options)
        self._fused = any(value.name.endswith("past_length") for value in self._session.get_inputs())
        most = reach.positions(stage, self._spec)
        self._limits = CacheLimits(min(_ROLLBACK, reach.rollback), most, reach.prefill_chunk)
        self._outputs = {
            name: tuple(int(axis) for axis in axes[2:])
            for name, axes in stage_outputs(manifest, stage).items()
            if name != "new_kv"
        }

    def runs(self, texts: Sequence[_Text], inputs: Inputs) -> list[Traced]:
        """What the graph gives in every pass over the texts: of the first text, of the second, and so on."""
        caches = [self._cache(text) for text in texts]
        traced: list[list[Traced]] = [[] for _ in texts]
        for step in range(len(texts[0].counts)):
            outputs, own = self._run(texts, caches, inputs, step)
            end = 0
            for text, cache, new, runs in zip(texts, caches, own, traced, strict=True):
                start, end = end, end + text.counts[step]
                part = {name: values[0, start:end] for name, values in outputs.items()}
                runs.append(Traced(cache.length, text.counts[step], part))
                cache.advance(new, text.counts[step])
        return [run for runs in traced for run in runs]

    def _cache(self, text: _Text) -> StageCache:
        cache: StageCache
        if self._scales is not None:
            cache = narrow_cache(self._spec, self._limits, self._scales)
        else:
            cache = (ordered_cache if self._fused else ring_cache)(self._spec, self._limits)
        if text.held:
            held = Hold(text.first, text.held, edge=False, unseen=False)
            cache.place(text.first, keys_values(self._spec, held))
        return cache

    def _run(
        self, texts: Sequence[_Text], caches: Sequence[StageCache], inputs: Inputs, step: int
    ) -> tuple[dict[str, Array], list[dict[str, Array]]]:
        """Outputs of one pass, of all positions and of each text's own."""
        counts = [text.counts[step] for text in texts]
        numbers = np.concatenate([text.rows(step) for text in texts])
        places = [cache.length + np.arange(count) for cache, count in zip(caches, counts, strict=True)]
        shared = inputs.get("patch_values")
        given = {
            name: values.take(numbers, axis=0, mode="wrap")[None]
            for name, values in inputs.items()
            if values is not shared
        }
        given["positions"] = np.concatenate(places)[None]
        if self._packed:
            given[ROWS] = np.array(counts)
        outputs = {
            name: np.zeros((1, len(numbers), *rest), np.float32) for name, rest in self._outputs.items()
        }
        made, own = dict(outputs), []
        for row, (text, cache, count) in enumerate(zip(texts, caches, counts, strict=True)):
            cache.reserve(count)
            taken = dict(cache.inputs())
            if self._fused:
                taken["past_length"], taken["total_length"] = np.zeros(1, np.int32), np.zeros((), np.int32)
                cache.prepare(taken, count)
            if shared is not None:
                taken["patch_values"] = np.roll(shared, text.number, axis=0)
            new = cache.outputs()
            if not self._fused:
                sizes = (2 * self._spec.layers, 1, self._spec.kv_heads, count, self._spec.head_dim)
                new = {"new_kv": np.zeros(sizes, np.float32)}
            own.append(new)
            for whole, part in ((given, taken), (made, new)):
                whole.update(
                    (row_name(row, name) if self._packed else name, each) for name, each in part.items()
                )
        self._call(given, made)
        return outputs, own

    def _call(self, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        binding = self._session.io_binding()
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                assert array.flags.c_contiguous, name
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises many kinds, all with the reason in their text
            raise engine_error(f"{self._name}: ONNX Runtime failed", error) from error
