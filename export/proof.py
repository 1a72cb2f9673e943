"""Proving an engine before it is published: each stage beside its portable graph on the processor.

Both run over the same inputs in the ways that texts use a stage: single steps, a few rows, chunks; from an
empty cache that grows, and past the window, where it slides; with bytes taken back and read again. Whether
a window has the right length is asked without a tolerance, too. What an engine gave in the runs that a load
will repeat is kept beside it (`runtime.self_test`); where it cannot run here, what the portable graphs gave.
What this does not know: how engines are built or loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.backends.base import EngineLimits, StageBackend
from ..runtime.backends.ort import OrtStage
from ..runtime.embedding import EmbeddingTable
from ..runtime.errors import BackendError
from ..runtime.manifest import Manifest, StageSpec
from ..runtime.names import CHUNK_POSITIONS
from ..runtime.self_test import (
    LOAD_ROWS,
    Hold,
    Inputs,
    Run,
    Step,
    TakeBack,
    Traced,
    allowed,
    first_breach,
    load_steps,
    patch_slots,
    rounds_as,
    run_steps,
    state_inputs,
    text_inputs,
    write_self_test,
)

__all__ = ["WrongEngineError", "build_steps", "prove_engine"]

Floats = npt.NDArray[np.float32]

OpenStage = Callable[[str], StageBackend]
"""A stage of the new engine, loaded."""

# Rows of inputs that runs take in turn; past it they begin again.
_ROWS = 256
_ROLLBACK = 8
# Of the scale: an engine that runs twice on the same numbers may sum them in another order.
_NO_EFFECT = 1e-5


class WrongEngineError(BackendError):
    """An engine computes something else than the graphs it was built from."""


def prove_engine(
    directory: Path,
    manifest: Manifest,
    open_stage: OpenStage | None,
    reach: EngineLimits,
    self_test: Path | None,
    *,
    name: str,
    alike: bool,
    watch: Callable[[str], None] = lambda stage: None,
    scales: Mapping[str, Floats] | None = None,
    reference: OpenStage | None = None,
    int8_prefill: Collection[str] | None = None,
) -> None:
    """Compare an engine of the bundle in `directory` with its portable graphs, and write its `self_test`.

    open_stage: None when the engine can't run here. reach: what it takes. name: what built it, for the error.
    alike: it rounds activations where the portable graphs do, and is held to more than its precision asks.
    watch: called as each stage begins. scales: of the engine's caches in 8 bits, None where they are float32.
    reference: what it is compared with in the place of the portable graphs. int8_prefill: stages that read
    chunks in products of integers; only these are compared. Peak memory is that of one stage, loaded twice.

    Raises WrongEngineError naming stage and figure, BackendError when it can't run, OSError (disk full).
    """
    table = EmbeddingTable.open(directory, manifest.embedding)
    compared = manifest.stages.keys() if int8_prefill is None else int8_prefill
    inputs = text_inputs(manifest, table, _ROWS)
    repeated = text_inputs(manifest, table, LOAD_ROWS)
    kept: dict[str, Floats] = {}
    traced: dict[str, list[Traced]] = {}
    for stage in manifest.stages:
        if stage in compared:
            watch(stage)
        elif stage in ("patcher", "decoder"):  # what these give is nobody's input
            continue
        # The portable stage comes first: what it gives is the next one's input.
        own = None if scales is None else scales[stage]
        backend = OrtStage(directory, manifest, stage, None) if reference is None else reference(stage)
        portable = _Stage(manifest, stage, backend, reach, own)
        if stage == "encoder":
            states = np.resize(portable.chunk(inputs[stage])["byte_states"], (_ROWS, manifest.model.width))
            kept["states"] = states[:LOAD_ROWS]
            inputs["latent"], inputs["decoder"] = state_inputs(states, reach.max_patch_length)
            repeated["latent"], repeated["decoder"] = state_inputs(kept["states"], reach.max_patch_length)
        if stage == "latent":
            kept["patch_values"] = patch_slots(portable.chunk(inputs[stage])["patch_values"])
            for each in (inputs, repeated):
                each["decoder"]["patch_values"] = kept["patch_values"]
        engine = portable
        if open_stage is not None and stage in compared:
            engine = _Stage(manifest, stage, open_stage(stage), reach, own, int8_prefill is not None)
            engine.compare(portable, inputs[stage], name, alike)
            engine.check_window(inputs[stage], name)
        if self_test is not None:
            traced[stage] = engine.repeatable(repeated[stage])
    if self_test is not None:
        write_self_test(self_test, manifest, reach, kept["states"], kept["patch_values"], traced)


class _Stage:
    """A loaded stage, and the runs that it is put through."""

    def __init__(
        self,
        manifest: Manifest,
        stage: str,
        backend: StageBackend,
        reach: EngineLimits,
        scales: Floats | None,
        int8_prefill: bool = False,
    ) -> None:
        self._manifest, self._stage, self._backend, self._reach = manifest, stage, backend, reach
        self._spec, self._scales = manifest.stages[stage], scales
        rounding = rounds_as(self._spec.precision, scales is not None)
        # Whole rows of activations are rounded, as int8 does, if by scales of their own.
        self._rounding = "int8" if int8_prefill and rounding == "int8w" else rounding
        self._int8_prefill = int8_prefill

    def _run(self, inputs: Inputs, steps: Sequence[Step]) -> list[Traced]:
        return run_steps(self._manifest, self._stage, self._backend, self._reach, inputs, steps, self._scales)

    def chunk(self, inputs: Inputs) -> dict[str, Floats]:
        """Outputs of one pass over a chunk of the inputs."""
        (traced,) = self._run(inputs, [Run(_chunk(self._stage, self._spec, self._reach))])
        return traced.outputs

    def repeatable(self, inputs: Inputs) -> list[Traced]:
        """What a load will repeat."""
        return self._run(inputs, load_steps(self._stage, self._spec, self._reach))

    def compare(self, portable: _Stage, inputs: Inputs, name: str, alike: bool) -> None:
        """Raise WrongEngineError where this stage and the portable one are too far apart."""
        make = prefill_steps if self._int8_prefill else build_steps
        steps = make(self._stage, self._spec, self._reach)
        expected = [run.outputs for run in portable._run(inputs, steps)]
        most = allowed(self._rounding, alike)
        breach = first_breach(self._rounding, self._run(inputs, steps), expected, most)
        if breach is not None:
            raise self._wrong(name, breach.told(self._reference[0]))

    def _wrong(self, name: str, what: str) -> WrongEngineError:
        return WrongEngineError(
            f"{self._stage}: the engine that {name} made is wrong: {what}; nothing was kept, and the "
            f"{self._reference[1]}, which are right, go on running; try another version"
        )

    @property
    def _reference(self) -> tuple[str, str]:
        """What outputs are compared with, and what runs where they are wrong."""
        if self._int8_prefill:
            return "what the engine's own graph gives", "engine's own graphs"
        if self._scales is not None:
            return "what float32 caches give", "float32 caches"
        return "the portable graph's", "portable graphs"

    def check_window(self, inputs: Inputs, name: str) -> None:
        """Raise WrongEngineError where what the window must not see has any effect, or its oldest key none.

        Precisions that round much hide a window that is one position off, but not from this.
        """
        window, held = self._spec.window, _past_window(self._spec, self._reach)
        quiet = Hold(*held, edge=False, unseen=False)
        runs = [Run(1), Run(min(3, self._reach.prefill_chunk))]
        if self._int8_prefill:  # the first of its rows sees the oldest position
            runs = [Run(CHUNK_POSITIONS)]
        needed = sum(run.rows for run in runs)
        most = self._reach.positions(self._stage, self._spec) - quiet.first - max(_ROLLBACK, needed)
        if window is None or not 0 < quiet.count <= most or needed > self._reach.prefill_chunk + 1:
            return
        plain, unseen, edge = (
            self._run(inputs, [hold, *runs])
            for hold in (quiet, replace(quiet, unseen=True), replace(quiet, edge=True))
        )
        expected = [run.outputs for run in plain]
        if first_breach("fp32", unseen, expected, _NO_EFFECT) is not None:
            raise self._wrong(name, f"it reads what lies before its window of {window} positions")
        # In a window of one there is nothing but the position itself.
        if window > 1 and first_breach("fp32", edge[:1], expected[:1], _NO_EFFECT) is None:
            raise self._wrong(name, f"it does not read the oldest of the {window} positions in its window")


def _chunk(stage: str, spec: StageSpec, reach: EngineLimits) -> int:
    # A patch is the dearest thing to compute; a chunk of bytes may close no more than these.
    rows = reach.prefill_chunk // 8 if stage == "latent" else reach.prefill_chunk
    return max(1, min(rows, reach.positions(stage, spec), _ROWS))


def build_steps(stage: str, spec: StageSpec, reach: EngineLimits) -> list[Step]:
    """The ways that texts use a stage, cut to what the engine takes."""
    script = _Script(reach.positions(stage, spec), reach)
    chunk = _chunk(stage, spec, reach)
    # 1. From nothing, over buffers that grow.
    script.run(1, 1, 3, 16).take_back(2).run(4, chunk, 1)
    # 2. Far into a text; where there is a window, further than it slides, in steps and at once.
    held = _past_window(spec, reach)
    slides = ((1, 15, 16, 16, 14, 1, 1, 1), (5, chunk, 1))
    for rows in slides if spec.window is not None else ((1, 5, 16),):
        if script.hold(*held):
            script.run(*rows).take_back(_ROLLBACK).run(1, 3)
    return script.steps


def prefill_steps(stage: str, spec: StageSpec, reach: EngineLimits) -> list[Step]:
    """The ways that texts use a stage in chunks, cut to what the engine takes."""
    script = _Script(reach.positions(stage, spec), reach)
    chunk = max(CHUNK_POSITIONS, _chunk(stage, spec, reach))
    # From nothing, over buffers that grow, and with steps between; past the window, and sliding on.
    script.run(CHUNK_POSITIONS, 1, chunk).take_back(2).run(CHUNK_POSITIONS + 3)
    if script.hold(*_past_window(spec, reach)):
        script.run(CHUNK_POSITIONS, chunk).take_back(_ROLLBACK).run(CHUNK_POSITIONS + 1, 1)
    return script.steps


def _past_window(spec: StageSpec, reach: EngineLimits) -> tuple[int, int]:
    """First position and count of a cache that holds a full window and what may be taken back before it."""
    if spec.window is None:
        return 0, 200
    return 7, spec.window - 1 + min(_ROLLBACK, reach.rollback)


class _Script:
    """Steps that keep within an engine's reach."""

    def __init__(self, most: int, reach: EngineLimits) -> None:
        self.steps: list[Step] = []
        self._most, self._reach = most, reach
        self._length = self._base = 0

    def run(self, *counts: int) -> _Script:
        """Runs of so many rows, of fewer where the reach ends."""
        for count in counts:
            rows = min(count, self._reach.prefill_chunk, self._most - self._length)
            if rows > 0:
                self.steps.append(Run(rows))
                self._length += rows
        return self

    def take_back(self, count: int) -> _Script:
        """Forget up to `count` positions, which were read since the last `hold`."""
        count = min(count, _ROLLBACK, self._reach.rollback, self._length - self._base - 1)
        if count > 0:
            self.steps.append(TakeBack(count))
            self._length -= count
        return self

    def hold(self, first: int, count: int) -> bool:
        """Hold `count` positions and say so, if a few more fit after them."""
        if count < 1 or first + count + 4 > self._most:
            return False
        self.steps.append(Hold(first, count))
        self._base = self._length = first + count
        return True
