"""Does a pass over several texts give each what it gets alone? Tried with a few numbers, on any backend.

Texts that hold nothing, a little, or a full window take in several positions and single ones, together and
each by itself, on the same numbers. What this does not know: bundles' texts, what backends are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .backends.base import CacheLimits, EngineLimits, PackedPart, PackedStage, StageBackend, StageCall
from .backends.signatures import input_type, new_axis, stage_signature
from .cache import StageCache
from .errors import BackendError
from .manifest import Manifest, StageSpec
from .self_test import Traced, allowed, first_breach

__all__ = ["check_packed"]

Array = npt.NDArray[Any]

# Positions that each text adds in two passes, and positions that it holds before, the texts in turn.
_PASSES = ((3, 1, 2, 1), (1, 2, 1, 1))
_HELD = (0, 3, 40, 1)
_ROLLBACK = 4
_PATCH_SLOTS, _PATCH_LENGTH = 5, 4
# Ids of bytes, not of what stands before and behind a text.
_BYTES = (4, 260)


@dataclass(frozen=True)
class _Text:
    """What one text reads: the same whoever runs it."""

    held: Array
    """Keys and values [2 * layers, 1, Hkv, held, head_dim] of its first positions."""
    passes: tuple[dict[str, Array], ...]
    """Inputs of each pass, by name."""
    shared: Mapping[str, Any]


def check_packed(
    manifest: Manifest,
    stage: str,
    backend: StageBackend,
    packed: PackedStage,
    texts: int,
    limits: EngineLimits,
) -> None:
    """Run `packed`, the graph of a stage for `texts` texts, beside the stage's graph for one.

    limits: what the engine takes. Raises BackendError naming stage and figure when a text gets something else
    in company; what the engine raises passes through.
    """
    spec = manifest.stages[stage]
    read = [_text(manifest, stage, backend, number, limits) for number in range(texts)]
    alone = [_Runner(stage, spec, backend, text, limits) for text in read]
    together = [_Runner(stage, spec, backend, text, limits) for text in read]
    for step in range(len(read[0].passes)):
        wanted = [each.alone(step) for each in alone]
        found = _packed_run(packed, together, step)
        breach = first_breach(spec.precision, found, wanted, allowed(spec.precision, alike=True))
        if breach is not None:
            raise BackendError(f"{stage}, {texts} texts at once: {breach.told('what each alone gives')}")
    packed.release()


class _Runner:
    """A text of its own cache, as it goes on."""

    def __init__(
        self, stage: str, spec: StageSpec, backend: StageBackend, text: _Text, limits: EngineLimits
    ) -> None:
        self._backend, self._text = backend, text
        positions = limits.positions(stage, spec)
        rollback = min(_ROLLBACK, limits.rollback)
        self.cache: StageCache = backend.new_cache(CacheLimits(rollback, positions, limits.prefill_chunk))
        if text.held.shape[3]:
            self.cache.place(0, text.held)

    def alone(self, step: int) -> dict[str, Array]:
        call, count = self._prepare(step)
        call.run(lambda seconds: None)
        return self._after(call, count)

    def part(self, step: int) -> PackedPart:
        call, count = self._prepare(step)
        return PackedPart(call, self.cache, self._text.shared, count)

    def after(self, part: PackedPart) -> Traced:
        first = self.cache.length
        return Traced(first, part.count, self._after(part.call, part.count))

    def _prepare(self, step: int) -> tuple[StageCall, int]:
        given = self._text.passes[step]
        count = next(iter(given.values())).shape[1]
        self.cache.reserve(count)
        shapes = {**{name: values.shape for name, values in given.items()}, "positions": (1, count)}
        call = self._backend.bind(shapes, self.cache, self._text.shared)
        call.begin()
        for name, values in given.items():
            call.inputs[name][0] = _there(self._backend, call.inputs[name], values)[0]
        call.inputs["positions"][0] = np.arange(self.cache.length, self.cache.length + count)
        self.cache.prepare(call.inputs, count)
        return call, count

    def _after(self, call: StageCall, count: int) -> dict[str, Array]:
        own = ("new_kv", *self.cache.outputs())
        outputs = {name: np.array(each)[0] for name, each in call.outputs.items() if name not in own}
        self.cache.advance(call.outputs, count)
        return outputs


def _packed_run(packed: PackedStage, runners: Sequence[_Runner], step: int) -> list[Traced]:
    parts = [runner.part(step) for runner in runners]
    packed.run(parts)
    return [runner.after(part) for runner, part in zip(runners, parts, strict=True)]


def _there(backend: StageBackend, buffer: Any, values: Array) -> Any:
    """The values where a buffer of the backend can copy them from."""
    if isinstance(buffer, np.ndarray):
        return values
    moved = backend.memory.zeros(values.shape)
    moved[:] = values
    return moved


def _text(manifest: Manifest, stage: str, backend: StageBackend, number: int, limits: EngineLimits) -> _Text:
    random = np.random.default_rng(number)
    spec, inputs = manifest.stages[stage], stage_signature(manifest, stage)[0]
    positions = limits.positions(stage, spec)
    most = min(limits.prefill_chunk, backend.packed_positions or limits.prefill_chunk)
    counts = [min(each[number % 4], most) for each in _PASSES]
    if sum(map(max, _PASSES)) > positions:
        counts = [1]
    held = min(_HELD[number % 4], positions - sum(counts))
    if spec.window is not None:
        held = min(held, spec.window - 1 + min(_ROLLBACK, limits.rollback))
    slots = _PATCH_SLOTS
    longest = min(_PATCH_LENGTH, limits.max_patch_length)
    longest = 1 << (longest.bit_length() - 1)
    bounds = {"byte_ids": _BYTES, "patch_index": (0, slots), "patch_lengths": (1, longest + 1)}

    def values(name: str, count: int) -> Array:
        sizes = {"batch": 1, new_axis(stage): count, "patch_length": longest, "patch_slots": slots}
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in inputs[name])
        if input_type(name) is np.int64:
            return random.integers(*bounds[name], shape)
        return random.standard_normal(shape).astype(np.float32)

    told = ("positions", "past_positions", "patch_values")
    own = [name for name in inputs if name not in told and not name.startswith("past.")]
    shared = {}
    if "patch_values" in inputs:
        moved = backend.memory.zeros((slots, spec.patch_values or 0))
        moved[:] = values("patch_values", 0)
        shared["patch_values"] = moved
    kept = random.standard_normal((2 * spec.layers, 1, spec.kv_heads, held, spec.head_dim))
    return _Text(
        kept.astype(np.float32),
        tuple({name: values(name, count) for name in own} for count in counts),
        shared,
    )
