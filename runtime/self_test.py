"""Does an engine compute what the graphs say? The runs that `build` proves it by, and those a load repeats.

A stage runs by itself, on inputs that are the same whatever computes it, so that what differs is its own
doing. Its cache is the one that texts will use, put where mistakes show: the oldest position that a window
must see holds values as large as those of all others together, and what it must not see eight times larger
ones, so that a window that is one position off changes everything, whatever the precision rounds away.

An engine's directory keeps what its stages gave in a few such runs (`SELF_TEST_NAME`); a load repeats those,
which takes as long as a few bytes of text, and finds an engine whose library or driver was exchanged.
What this does not know: how engines are built, and what is done about one that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .backends.base import CacheLimits, EngineLimits, StageBackend
from .backends.signatures import stage_outputs
from .embedding import EmbeddingTable
from .errors import BackendError, BundleError
from .files import open_plain
from .manifest import Manifest, StageSpec
from .narrow_cache import narrowed
from .stages import CachedStage, next_power_of_two
from .vocabulary import encode

__all__ = [
    "LOAD_ROWS",
    "NARROW_SELF_TEST_NAME",
    "SELF_TEST_NAME",
    "STAGE_TOLERANCES",
    "TEXT",
    "Breach",
    "Hold",
    "Inputs",
    "Run",
    "Step",
    "TakeBack",
    "Traced",
    "allowed",
    "check_engine",
    "first_breach",
    "keys_values",
    "load_steps",
    "read_self_test",
    "rounds_as",
    "run_steps",
    "state_inputs",
    "text_inputs",
    "write_self_test",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Inputs = dict[str, Array]
"""By name, a row for each byte or patch; the decoder's have `patch_values` [slots, V] for all rows too."""

SELF_TEST_NAME = "self_test.bin"
"""Float32 values beside an engine's `engine.json`: inputs that cannot be had otherwise, then outputs."""

NARROW_SELF_TEST_NAME = "self_test.int8.bin"
"""The same of graphs whose caches are in 8 bits."""

TEXT = (
    "Boats came in at dusk, and the lamp was lit: 3 short, 1 long. Ήταν αργά; 夜が来た。 Ночь — "
    "and nobody said a word (not even the cook, who had plenty).\n"
).encode()
"""What inputs are made of."""

STAGE_TOLERANCES: Mapping[str, float] = {
    "fp32": 1e-4,
    "fp16": 0.005,
    "int8w": 0.04,
    "int8": 0.16,
    "int4": 0.2,
}
"""By a stage's precision, how far its outputs may be from a reference's: fp32 by the largest difference as a
share of the scale, others by its norm as a share of the outputs' norm. Validation allows as much."""

# Engines that round where the reference does differ where sums in another order round to another integer:
# at most 0.006 on the demo in int4, and 0.02 where only one of the two rounds activations.
_ALIKE = 0.05

LOAD_ROWS = 8
"""Rows of inputs that a load needs of each stage."""

# A ring that holds positions no window may see, as taking bytes back leaves them.
_ROLLBACK = 8
# What keys are multiplied by to be chosen by half of all queries, and values to drown out the others: by the
# window's length, as far as the product of all is still a float16.
_LOUD, _LOUDEST = 8, 512
_PATCH_SLOTS = 8
_BLOCK = 65_537  # a prime: no head's values repeat at once
_SEED = 20_412


# 1. What runs.


@dataclass(frozen=True)
class Hold:
    """The cache holds `count` positions from `first` on and no others."""

    first: int
    count: int
    edge: bool = True
    """The oldest position that the next one sees is loud."""
    unseen: bool = True
    """Those before it are."""


@dataclass(frozen=True)
class Run:
    """The stage takes in so many rows."""

    rows: int


@dataclass(frozen=True)
class TakeBack:
    """The last `count` positions are forgotten."""

    count: int


Step = Hold | Run | TakeBack


@dataclass(frozen=True)
class Traced:
    """What a stage gave in one run."""

    position: int
    """The first that was taken in."""
    rows: int
    """How many were."""
    outputs: dict[str, Floats]
    """By name, [rows, ...]."""

    def __str__(self) -> str:
        last = self.position + self.rows - 1
        return f"position {last}" if self.rows == 1 else f"positions {self.position} to {last} in one pass"


def load_steps(stage: str, spec: StageSpec, limits: EngineLimits) -> list[Step]:
    """What a load repeats: a step and a few rows, past the window where the text can be so long."""
    most = limits.positions(stage, spec)
    rows = min(3, limits.prefill_chunk)
    held = 24 if spec.window is None else spec.window - 1 + min(_ROLLBACK, limits.rollback)
    held = min(held, most - 1 - rows)
    if held < 1:
        return [Run(1)]
    # Without a window a position sees all before it: there are none missing.
    first = 0 if spec.window is None else min(5, most - 1 - rows - held)
    return [Hold(first, held), Run(1), Run(rows)]


def run_steps(
    manifest: Manifest,
    stage: str,
    backend: StageBackend,
    limits: EngineLimits,
    inputs: Inputs,
    steps: Sequence[Step],
    scales: Floats | None = None,
) -> list[Traced]:
    """What a stage gives in each `Run`, rows of `inputs` taken in turn. Raises BackendError.

    scales: of caches in 8 bits, the stage's own or another's that it is compared with: what is held is then
    what such a cache can hold.
    """
    spec = manifest.stages[stage]
    rows = dict(inputs)
    shared: dict[str, Any] = {}
    if stage == "decoder":
        values = rows.pop("patch_values")
        shared["patch_values"] = backend.memory.zeros(values.shape)
        shared["patch_values"][:] = values
    sizes = CacheLimits(min(_ROLLBACK, limits.rollback), limits.positions(stage, spec), limits.prefill_chunk)
    cached = CachedStage(backend, limits=sizes, name=stage, shared=shared)
    wanted = [name for name in stage_outputs(manifest, stage) if name != "new_kv"]
    traced, done = [], 0
    for step in steps:
        if isinstance(step, Hold):
            held = keys_values(spec, step)
            cached.cache.place(step.first, held if scales is None else narrowed(held, scales))
        elif isinstance(step, TakeBack):
            assert cached.cache.can_roll_back(cached.cache.length - step.count)
            cached.cache.roll_back(cached.cache.length - step.count)
        else:
            position, numbers = cached.cache.length, np.arange(done, done + step.rows)
            chosen = {name: values.take(numbers, axis=0, mode="wrap") for name, values in rows.items()}
            call = cached.prepare(step.rows, {name: (1, *values.shape) for name, values in chosen.items()})
            for name, values in chosen.items():
                call.inputs[name][0] = values
            outputs = cached.run(call)
            traced.append(
                Traced(position, step.rows, {name: np.array(outputs[name][0], np.float32) for name in wanted})
            )
            done += step.rows
    return traced


@cache
def _noise() -> Floats:
    """Values in -1.7..1.7, of raw bits: other draws may change with numpy's version."""
    bits = np.random.PCG64(_SEED).random_raw(_BLOCK) >> np.uint64(40)
    noise: Floats = (bits.astype(np.float32) / (1 << 23) - 1) * np.float32(1.7)
    return noise


def keys_values(spec: StageSpec, held: Hold) -> Floats:
    """[2 * layers, 1, Hkv, count, head_dim] for a cache; see the module about their sizes."""
    values = np.resize(_noise(), (2 * spec.layers, 1, spec.kv_heads, held.count, spec.head_dim))
    if spec.window is not None and held.count >= spec.window - 1:
        edge = held.count - (spec.window - 1)  # the oldest position that the next one sees
        loud = slice(0 if held.unseen else edge, edge + 1 if held.edge else edge)
        keys, parts = values[::2], values[1::2]
        keys[:, :, :, loud] *= _LOUD
        parts[:, :, :, loud] *= min(spec.window, _LOUDEST)
        if held.unseen:
            parts[:, :, :, :edge] *= _LOUD
    return values


# 2. Inputs.


def text_inputs(manifest: Manifest, table: EmbeddingTable, count: int) -> dict[str, Inputs]:
    """Inputs of the patcher and the encoder: the first `count` ids of `TEXT`, over and over."""
    ids = encode(np.resize(np.frombuffer(TEXT, np.uint8), count).tobytes())[:count]
    return {"patcher": {"byte_ids": ids}, "encoder": {"byte_embeds": table.embed(ids, count)}}


def state_inputs(states: Floats, patch_length: int) -> tuple[Inputs, Inputs]:
    """Inputs of latent stage and decoder, made of byte states [N, D]; the decoder still lacks patch values.

    Patches have from 1 to 8 bytes or `patch_length`, if that is less.
    """
    count, longest = len(states), min(8, patch_length)
    index = np.arange(count, dtype=np.int64)
    bytes_of = (np.arange(count)[:, None] * 2 + np.arange(next_power_of_two(longest))) % count
    latent: Inputs = {"patch_bytes": states[bytes_of], "patch_lengths": 1 + index * 3 % longest}
    decoder: Inputs = {"byte_states": states, "patch_index": index * 5 % _PATCH_SLOTS}
    return latent, decoder


def patch_slots(values: Floats) -> Floats:
    """Patch values [slots, V] for the decoder, of those [n, V] that a latent stage gave."""
    return np.resize(values, (_PATCH_SLOTS, values.shape[1]))


# 3. What an engine's directory keeps.


def write_self_test(
    path: Path,
    manifest: Manifest,
    limits: EngineLimits,
    states: Floats,
    patch_values: Floats,
    traced: Mapping[str, Sequence[Traced]],
) -> None:
    """Write what a load repeats: `traced` has what each stage gave in its `load_steps`.

    states [LOAD_ROWS, D] and patch_values [slots, V]: what `state_inputs` and the decoder were given.
    """
    arrays = {"states": states, "patch_values": patch_values}
    for stage, runs in traced.items():
        for number, run in enumerate(runs):
            arrays.update({f"{stage}.{number}.{name}": values for name, values in run.outputs.items()})
    layout = _layout(manifest, limits)
    assert {name: array.shape for name, array in arrays.items()} == layout
    path.write_bytes(b"".join(arrays[name].astype("<f4").tobytes() for name in layout))


def read_self_test(path: Path, manifest: Manifest, limits: EngineLimits) -> dict[str, Floats]:
    """What `write_self_test` wrote, by name. Raises BundleError when it has another size."""
    layout = _layout(manifest, limits)
    sizes = [math.prod(shape) for shape in layout.values()]
    needed = 4 * sum(sizes)
    with open_plain(path) as file:
        data = file.read(needed + 1)
    if len(data) != needed:
        raise BundleError(f"{path.name} has not the {needed} bytes that its engine's self-test needs")
    parts = np.split(np.frombuffer(data, "<f4"), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(layout.items(), parts, strict=True)}


def _layout(manifest: Manifest, limits: EngineLimits) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array of the file, in its order."""
    layout: dict[str, tuple[int, ...]] = {
        "states": (LOAD_ROWS, manifest.model.width),
        "patch_values": (_PATCH_SLOTS, manifest.stages["latent"].patch_values or 0),
    }
    for stage, spec in manifest.stages.items():
        runs = [step for step in load_steps(stage, spec, limits) if isinstance(step, Run)]
        for number, run in enumerate(runs):
            for name, axes in stage_outputs(manifest, stage).items():
                if name != "new_kv":
                    layout[f"{stage}.{number}.{name}"] = (run.rows, *(int(axis) for axis in axes[2:]))
    return layout


# 4. Comparing.


def allowed(precision: str, alike: bool) -> float:
    """The largest share that an output may differ by; alike: the reference rounds where the engine does."""
    return min(STAGE_TOLERANCES[precision], _ALIKE) if alike else STAGE_TOLERANCES[precision]


def rounds_as(precision: str, narrow: bool) -> str:
    """The precision whose measure and tolerance a stage's outputs are held to.

    narrow: its cache is in 8 bits, which rounds about as much as weights in 8 bits do.
    """
    return "int8w" if narrow and precision in ("fp32", "fp16") else precision


@dataclass(frozen=True)
class Breach:
    """An output that is too far from what it should be."""

    output: str
    """Its name."""
    run: Traced
    """Where."""
    share: float
    """By how much, as `STAGE_TOLERANCES` measures it; inf for what is no number."""
    most: float
    """What is allowed."""

    def told(self, reference: str) -> str:
        share, most = _percent(self.share), _percent(self.most)
        return f"{self.output} at {self.run} differs by {share} from {reference}, {most} is allowed"


@np.errstate(all="ignore")  # what is no number is a breach, not a warning
def first_breach(
    precision: str, found: Sequence[Traced], expected: Sequence[Mapping[str, Floats]], most: float
) -> Breach | None:
    """The first output of a stage's runs that is further than `most` from what was expected of it."""
    for run, wanted in zip(found, expected, strict=True):
        for output, values in run.outputs.items():
            share = _difference(precision, values, wanted[output], [each[output] for each in expected])
            if not share <= most:
                return Breach(output, run, share, most)
    return None


def _difference(precision: str, found: Floats, expected: Floats, all_runs: Sequence[Floats]) -> float:
    apart = found.astype(np.float64) - expected
    if precision == "fp32":
        share = float(np.abs(apart).max(initial=0.0)) / max(1.0, float(np.abs(expected).max(initial=0.0)))
    else:
        # Of most runs, as a single value may happen to be next to nothing.
        usual = float(np.median([np.sqrt(np.mean(np.square(run, dtype=np.float64))) for run in all_runs]))
        # In float64: a norm that is infinite would allow any difference.
        size = max(float(np.linalg.norm(expected.astype(np.float64))), usual * np.sqrt(expected.size), 1e-12)
        share = float(np.linalg.norm(apart)) / size
    return share if np.isfinite(share) else np.inf


def check_engine(
    manifest: Manifest,
    backends: Mapping[str, StageBackend],
    table: EmbeddingTable,
    path: Path,
    limits: EngineLimits,
    scales: Mapping[str, Floats],
    *,
    alike: bool,
) -> None:
    """Repeat the runs that an engine's directory `path` keeps, and compare.

    scales: of each stage's cache in 8 bits; {} where they are float32. alike: what it keeps came from the
    engine itself. Raises BackendError naming the stage that computes
    something else, BundleError for a damaged file.
    """
    name = NARROW_SELF_TEST_NAME if scales else SELF_TEST_NAME
    kept = read_self_test(path / name, manifest, limits)
    inputs = text_inputs(manifest, table, LOAD_ROWS)
    inputs["latent"], inputs["decoder"] = state_inputs(kept["states"], limits.max_patch_length)
    inputs["decoder"]["patch_values"] = kept["patch_values"]
    for stage, spec in manifest.stages.items():
        steps = load_steps(stage, spec, limits)
        runs = run_steps(manifest, stage, backends[stage], limits, inputs[stage], steps, scales.get(stage))
        expected = [
            {name: kept[f"{stage}.{number}.{name}"] for name in run.outputs}
            for number, run in enumerate(runs)
        ]
        precision = rounds_as(spec.precision, stage in scales)
        breach = first_breach(precision, runs, expected, allowed(precision, alike))
        if breach is not None:
            told = breach.told("what was recorded when it was built")
            raise BackendError(f"{stage}: its self-test failed, {told}")


def _percent(share: float) -> str:
    if not np.isfinite(share):
        return "an infinite amount"
    return f"{100 * share:.0f} %" if share >= 1 else f"{100 * share:.2g} %"
