"""One text being read: all state of the four stages, extended byte by byte or in chunks, and rolled back.

A chunk of bytes goes through five phases (numbered in `Sequence.read`): the patcher's entropies, the
patch boundaries they decide, the encoder, the latent stage over the patches that closed, the
decoder. Patch boundaries depend on earlier bytes only, so nothing is ever computed twice, whatever the
chunks. `Draft` brings in phases that guessing has run before (`drafting`).
What is kept of the text is a `TextState`, which can be forked.
What this does not know: text, sampling, where guesses come from, stop strings, bundles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

from .backends.base import CacheLimits, StageBackend, Tensor
from .cache import StageCache
from .embedding import EmbeddingTable
from .errors import BackendError, OptionError, PromptTooLongError
from .fields import shown
from .manifest import Manifest
from .patching import PatchBoundaries
from .stages import CachedStage, Observer, StageTime, next_power_of_two
from .state import TextState, new_state
from .state_file import write_state
from .vocabulary import checked_ids

__all__ = ["ChunkResult", "Draft", "FallBack", "PatcherState", "Sequence", "SequenceLimits"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

FallBack = Callable[[BackendError, dict[str, StageBackend]], dict[str, StageBackend]]
"""fall_back(error, the backends it came from) -> others to go on with; raises where there are none."""


@dataclass(frozen=True)
class SequenceLimits:
    """Sizes that bound a sequence's memory."""

    prefill_chunk: int
    """Bytes that one pass over the stages takes at most."""
    rollback: int
    """Bytes that can always be taken back without computing anything again."""
    max_positions: int
    """Positions a text may take, BOS included."""
    model_positions: int | None = None
    """Positions the model has, where its engines were built for fewer."""

    def check_positions(self, wanted: int) -> None:
        """Raise PromptTooLongError when a text of so many ids, BOS included, has more than there are."""
        if wanted > self.max_positions:
            least, most = self.max_positions, self.model_positions or self.max_positions
            holder = "the model has" if least == most else "its engines were built for"
            remedy = f", or blt-edge build --max-bytes {wanted}" if wanted <= most else ""
            raise PromptTooLongError(
                f"the text needs {wanted} positions (BOS included), {holder} {least}; shorten it{remedy}"
            )

    @property
    def cache(self) -> CacheLimits:
        return CacheLimits(self.rollback, self.max_positions, self.prefill_chunk)


@dataclass(frozen=True)
class ChunkResult:
    """What the stages said about one chunk of S bytes. Copy what must outlive the next chunk."""

    logits: Floats
    """[S, 260]: next-byte logits after each byte."""
    byte_states: Tensor
    """[S, D]: encoder output, in the backend's memory."""
    closed: range
    """Patches that closed in the chunk; `Sequence.patch_values` has what the latent stage made of them."""
    entropies: Floats | None
    """[S] in nats; None when the patching rule needs none."""


@dataclass(frozen=True)
class Draft:
    """Ids that may come next, and what was computed of them while guessing.

    The caches of phases that were computed are ahead of the sequence by as many positions: `Sequence.read` of
    these ids comes next, nothing else.
    """

    ids: Ids
    """int64 [S]: the chosen id that was not read yet, then the guesses."""
    entropies: Floats | None = None
    """[S], nats, when the patcher has read all ids."""
    states: Tensor | None = None
    """[S, D] in the backend's memory, when the encoder has read all ids."""


class PatcherState:
    """The entropy model's own state: entropies of a text without the main model."""

    def __init__(
        self,
        backend: StageBackend,
        limits: SequenceLimits,
        observers: tuple[Observer, ...] = (),
        cache: StageCache | None = None,
    ) -> None:
        """cache: of a text to go on with; None begins one."""
        self.stage = CachedStage(
            backend, limits=limits.cache, name="patcher", observers=observers, cache=cache
        )
        self.last_logits: Floats | None = None

    def extend(self, ids: Ids) -> Floats:
        """Entropies [S] in nats after each of int64 ids [S]; `last_logits` [S, 260] belong to them."""
        count = len(ids)
        call = self.stage.prepare(count, {"byte_ids": (1, count)})
        call.inputs["byte_ids"][0] = ids
        outputs = self.stage.run(call)
        self.last_logits = outputs["logits"][0]
        entropies: Floats = outputs["entropy"][0]
        return entropies


class Sequence:
    """The bytes read so far and everything needed to read the next one."""

    def __init__(
        self,
        manifest: Manifest,
        backends: dict[str, StageBackend],
        table: EmbeddingTable,
        limits: SequenceLimits,
        observers: tuple[Observer, ...] = (),
        fall_back: FallBack | None = None,
        *,
        state: TextState | None = None,
        engine: Callable[[], str] = lambda: "not named",
    ) -> None:
        """observers: told of every run of a stage. fall_back: what `recover` asks; None = there is none.
        state: one of these backends', to go on with; None begins a text. engine: tells what the backends are.
        """
        self.manifest, self._backends, self._table = manifest, backends, table
        self.limits = limits
        self.end_ids = frozenset(manifest.generation.end_ids)
        self._observers, self._fall_back, self._engine = observers, fall_back, engine
        self._history = manifest.embedding.hash.history
        self._go_on_with(new_state(manifest, backends, limits.cache) if state is None else state)

    def _go_on_with(self, state: TextState) -> None:
        """Bind the stages to a state's caches."""
        self._state = state
        self._draft_states: Tensor | None = None
        self._memory = self._backends["encoder"].memory
        self.patcher: PatcherState | None = None

        def stage(name: str, **shared: Tensor) -> CachedStage:
            return CachedStage(
                self._backends[name],
                limits=self.limits.cache,
                name=name,
                shared=shared,
                observers=self._observers,
                cache=state.caches[name],
            )

        self._encoder = stage("encoder")
        self._latent = stage("latent")
        self._decoder = stage("decoder", patch_values=state.patch_values.tensor)
        self._stages = {"encoder": self._encoder, "latent": self._latent, "decoder": self._decoder}
        if "patcher" in state.caches:
            self.patcher = PatcherState(
                self._backends["patcher"], self.limits, self._observers, state.caches["patcher"]
            )
            self._stages = {"patcher": self.patcher.stage, **self._stages}

    def fork(self, *, packed: bool = False, observers: tuple[Observer, ...] | None = None) -> Sequence:
        """Another sequence that has read the same, from which another text goes on.

        Neither ever sees what the other reads; each counts its own `times`, the fork from zero. What both
        have in common is in memory once until one of them goes on, and what that adds behind a common
        beginning is never copied: see `sharing`. Call it where this sequence is used; the fork may then be
        used in another thread. packed: it is only kept, forked and saved, in less memory (`TextState.pack`).
        observers: told of its runs in the place of those that are told of this one's.
        Raises BackendError for a sequence whose engine has failed half-way.
        """
        self._check_in_step(Draft(self.ids[:0]))
        other, state = copy(self), self._state.fork()
        if packed:
            state.pack(self.limits.rollback)
        if observers is not None:
            other._observers = observers
        other._go_on_with(state)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was read and all that was computed of it to a file, whole or not at all.

        `BltModel.restore` makes a sequence of it, in any process, where nothing is computed again; see
        `state_file`. Raises OptionError when nothing was read, WriteError where the file can't be written,
        StateError for a state that holds what is no number, BackendError as `fork`.
        """
        self._check_in_step(Draft(self.ids[:0]))
        write_state(path, self._state, self.manifest, self._engine())

    def __repr__(self) -> str:
        return f"<Sequence of {self.length} ids, BOS included, in {self.boundaries.count} patches>"

    @property
    def length(self) -> int:
        """Ids read, BOS included."""
        return self._state.length

    @property
    def boundaries(self) -> PatchBoundaries:
        """Where patches begin."""
        return self._state.boundaries

    @property
    def ids(self) -> Ids:
        """int64 [length]: every id read, BOS included. A view."""
        return self._state.ids[: self.length]

    @property
    def entropies(self) -> Floats | None:
        """float32 [length], nats: the patcher's uncertainty after each id; None without one. A view."""
        return self._state.entropies[: self.length] if self.patcher else None

    @property
    def logits(self) -> Floats:
        """float32 [260]: next-byte logits after the last id. A view that the next call overwrites.

        Raises OptionError when nothing was read.
        """
        if not self.length:
            raise OptionError("nothing was read yet; append the ids of a text (vocabulary.encode)")
        return self._state.logits.after(self.length - 1)

    def runs_on(self, backends: dict[str, StageBackend]) -> bool:
        """Whether these backends, a model's, are the ones that read it."""
        return self._backends is backends

    @property
    def patches_closed(self) -> int:
        """Patches that have ended and gone through the latent stage."""
        return self._latent.cache.length

    @property
    def times(self) -> dict[str, StageTime]:
        return {name: stage.time for name, stage in self._stages.items()}

    @property
    def stage_seconds(self) -> float:
        """Seconds that all stages have run."""
        return sum(stage.time.seconds for stage in self._stages.values())

    @property
    def state_bytes(self) -> int:
        """Memory of caches and recent states, in bytes, what forks share included."""
        return self._state.bytes

    @property
    def own_bytes(self) -> int:
        """What of `state_bytes` no other sequence shares: what dropping this one would free."""
        return self._state.own_bytes

    @property
    def state(self) -> TextState:
        """What is kept of the text; to be looked at only."""
        return self._state

    def patch_values(self, patches: range) -> Floats:
        """The decoder's keys and values [n, V] of closed patches, at least of the last chunk; a copy.

        Raises OptionError for patches that have not closed, or are not kept any longer.
        """
        oldest, closed = self._state.patch_values.oldest, self.patches_closed
        known = isinstance(patches, range) and (not patches or oldest <= patches[0] <= patches[-1] < closed)
        if not known or patches.step != 1:
            raise OptionError(f"patches is {shown(patches)}; allowed is a range within {oldest} to {closed}")
        return self._state.patch_values.get(patches)

    def reserve(self, count: int) -> None:
        """Let the caches grow to what `count` more ids need when they grow next, at once: growing means
        copying. `append` and `extend` do so for the ids that they are given.

        Patches are foretold by the text so far. Never more is taken than the model has positions for.
        """
        self._state.expect(min(self.length + count, self.limits.max_positions))

    def append(self, ids: ArrayLike) -> list[ChunkResult]:
        """Read ids [n], in chunks; one result for each, its arrays copied when there are several.

        Before anything changes, raises OptionError for what are no ids of the vocabulary, PromptTooLongError
        when the model has no position for them.
        """
        ids = checked_ids(ids)
        several = len(ids) > self.limits.prefill_chunk
        return [_copied(result) if several else result for result in self.extend(ids)]

    def extend(self, ids: ArrayLike) -> Iterator[ChunkResult]:
        """Like `append`, one chunk at a time: yields a ChunkResult that the next step overwrites."""
        ids = checked_ids(ids)
        self.limits.check_positions(self.length + len(ids))
        step = self.limits.prefill_chunk
        for start in range(0, len(ids), step):
            if len(ids) > step:
                self.reserve(len(ids) - start)  # again, as the text so far tells more about the rest
            yield self.read(Draft(ids[start : start + step]))

    def read(self, draft: Draft) -> ChunkResult:
        """Read the ids of a draft, at most `limits.prefill_chunk` and as many as there are positions.

        Raises BackendError when the engine fails and there is no other, and from then on: its stages have
        read different texts. OptionError as `check_readable`.
        """
        self.check_readable()
        self._check_in_step(draft)
        try:
            return self._read(draft)
        except BackendError as error:
            self.recover(error)
            return self._read(Draft(draft.ids))

    def check_readable(self) -> None:
        """Raise OptionError for a packed sequence, in which nothing can be read on."""
        if self._state.packed:
            raise OptionError("this sequence is packed, to be kept only; go on in a fork() of it")

    def _read(self, draft: Draft) -> ChunkResult:
        state, ids, first, count = self._state, draft.ids, self.length, len(draft.ids)
        state.store_ids(first, ids)
        if draft.states is None:  # while the patcher runs
            self._table.read_ahead(self._ids_for(first, count), count)
        # 1. How uncertain is the next byte after each of these?
        entropies = draft.entropies
        if entropies is None and self.patcher:
            entropies = self.patcher.extend(ids)
        if entropies is not None:
            state.entropies[first : first + count] = entropies
        # 2. Which patches end here: decided now, since a boundary after byte i depends on bytes up to i.
        self.boundaries.extend(ids, entropies)
        # 3. One state per byte.
        states = self.encode(first, count) if draft.states is None else draft.states
        state.byte_states.append(first, states)
        # 4. The patches that closed go through the global transformer.
        starts = self.boundaries.starts
        closed = range(self._latent.cache.length, len(starts) - 1)
        done, budget = closed.start, self._latent.backend.padding * self.limits.prefill_chunk
        while done < closed.stop:
            group = _patch_group(starts, done, closed.stop, budget)
            self._run_patches(starts[done : done + group + 1])
            done += group
        # 5. Each byte reads the last patch that is complete before the next byte.
        logits = self.decode(states, self.boundaries.latent_index(first, count))
        state.length += count
        state.logits.put(first, logits)
        state.drop_before(state.length - self.limits.rollback)
        return ChunkResult(logits, states, closed, entropies)

    def recover(self, error: BackendError) -> None:
        """After an engine's error: read the text again with what the model falls back on, or raise it.

        The state is then what the other graphs make of `ids`; of a draft that was begun nothing is left.
        """
        if self._fall_back is None:
            raise error
        self._backends = self._fall_back(error, self._backends)
        self._read_again(self.ids.copy())

    def _read_again(self, ids: Ids) -> None:
        times = self.times
        self._go_on_with(new_state(self.manifest, self._backends, self.limits.cache))
        for name, stage in self._stages.items():
            stage.time = times[name]
        try:
            for _ in self.extend(ids):
                pass
        except BaseException:
            self._encoder.intact = False  # what holds a part of the text is of no use either
            raise

    def _check_in_step(self, draft: Draft) -> None:
        # A pass that failed half-way has moved some caches on, and boundaries with them.
        now, ahead = self.length, self.length + len(draft.ids)
        entropies_read = now if draft.entropies is None else ahead
        in_step = (
            all(stage.intact for stage in self._stages.values())
            and (self.patcher is None or self.patcher.stage.cache.length == entropies_read)
            and self._encoder.cache.length == (now if draft.states is None else ahead)
            and self._latent.cache.length == len(self.boundaries.starts) - 1
            and self._decoder.cache.length == self.boundaries.length == now
        )
        if not in_step:
            raise BackendError("an earlier pass over this text failed half-way; begin a new sequence")

    # The phases that drafts run ahead of `read`; each leaves its cache `count` positions further.

    def store_ids(self, first: int, ids: Ids) -> None:
        """Keep int64 ids [S] at positions first.. for the hashes of the bytes after them."""
        self._state.store_ids(first, ids)

    def encode(self, first: int, count: int) -> Tensor:
        """States [S, D] of the `count` stored ids at positions first..; the next call overwrites them."""
        call = self._encoder.prepare(count, {"byte_embeds": (1, count, self.manifest.model.width)})
        call.inputs["byte_embeds"][0] = self._table.embed(self._ids_for(first, count), count)
        states: Tensor = self._encoder.run(call)["byte_states"][0]
        return states

    def _ids_for(self, first: int, count: int) -> Ids:
        """The ids that embeddings of positions first.. depend on."""
        return self._state.ids[max(0, first - self._history) : first + count]

    def draft_states(self, count: int) -> Tensor:
        """Room for the states [count, D] of a draft, the same each time."""
        if self._draft_states is None or len(self._draft_states) < count:
            self._draft_states = self._memory.zeros((count, self.manifest.model.width))
        room: Tensor = self._draft_states[:count]
        return room

    def decode(self, states: Tensor, patches: Ids) -> Floats:
        """Logits [S, 260] after bytes of these states [S, D] that read the patches int64 [S]; likewise."""
        count = len(states)
        call = self._decoder.prepare(count, {"byte_states": (1, *states.shape), "patch_index": (1, count)})
        call.inputs["byte_states"][0] = states
        call.inputs["patch_index"][0] = patches % self._state.patch_values.slots
        logits: Floats = self._decoder.run(call)["logits"][0]
        return logits

    def forget_decoded(self) -> None:
        """Take back what `decode` did since the last `read`."""
        self._decoder.cache.roll_back(self.length)

    def _run_patches(self, edges: list[int]) -> None:
        # edges: starts of consecutive closed patches and the end of the last one.
        lengths = [end - start for start, end in pairwise(edges)]
        patches = len(lengths)
        # Few distinct lengths keep few bound calls; padding is masked out exactly.
        padded = next_power_of_two(max(lengths))
        shape = (1, patches, padded, self.manifest.model.width)
        call = self._latent.prepare(patches, {"patch_bytes": shape, "patch_lengths": (1, patches)})
        target = call.inputs["patch_bytes"][0]
        for index, (start, end) in enumerate(pairwise(edges)):
            target[index, : end - start] = self._state.byte_states.get(start, end)
        call.inputs["patch_lengths"][0] = lengths
        first = self._latent.cache.length
        values: Tensor = self._latent.run(call)["patch_values"][0]
        kept = self._state.patch_values
        if kept.put(first, values):
            self._decoder.share(patch_values=kept.tensor)

    def roll_back(self, count: int) -> None:
        """Take back the last `count` ids (0 <= count < length), as if they had never been read.

        Up to `limits.rollback` ids this only moves counters; beyond, the text is read again. Raises
        OptionError when count is no whole number, or out of range.
        """
        most = max(0, self.length - 1)
        if isinstance(count, bool) or not isinstance(count, Integral) or not 0 <= count <= most:
            raise OptionError(f"roll back {shown(count)} bytes: 0 to {most} can be taken back")
        if count == 0:
            return
        length = self.length - int(count)
        if self._state.can_roll_back(length):
            self._state.roll_back(length)
        else:
            self._read_again(self.ids[:length].copy())


def _patch_group(starts: list[int], first: int, closed: int, budget: int) -> int:
    # How many patches from `first` fit one padded block of at most `budget` byte states (at least one).
    longest = 0
    for index in range(first, closed):
        longest = max(longest, next_power_of_two(starts[index + 1] - starts[index]))
        if (index - first + 1) * longest > budget:
            return max(1, index - first)
    return closed - first


def _copied(result: ChunkResult) -> ChunkResult:
    entropies = None if result.entropies is None else result.entropies.copy()
    return replace(
        result, logits=result.logits.copy(), byte_states=result.byte_states.copy(), entropies=entropies
    )
