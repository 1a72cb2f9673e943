"""What a backend offers: bound calls of a stage graph, and the memory in which values pass between stages.

A call is a graph with its input and output buffers fixed. The owner says `begin`, fills `inputs`, calls
`run`, and reads `outputs`; nothing is allocated or bound per step. Buffers are reused by the next run of the
same call: whoever keeps a result copies it.

Values that pass from stage to stage (`RESIDENT`) stay where the backend computes: numpy arrays on the CPU,
device memory on a GPU, where runs are queued on one stream and only a run with outputs for the host waits for
it. The runtime does not look at them: it only asks for what both kinds of array offer (`Tensor`). What people
and sampling see (logits, entropies) is always numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .. import buffers
from ..cache import OrderedCache, RingCache, StageCache
from ..host import available_memory
from ..manifest import StageSpec
from ..narrow_cache import NarrowCache

__all__ = [
    "HOST",
    "PADDING",
    "RESIDENT",
    "CacheLimits",
    "Done",
    "EngineLimits",
    "Memory",
    "OneText",
    "PackedPart",
    "PackedStage",
    "StageBackend",
    "StageCall",
    "Tensor",
    "narrow_cache",
    "ordered_cache",
    "placed",
    "ring_cache",
    "ring_runs",
]

Array = npt.NDArray[Any]

RESIDENT = ("byte_states", "patch_bytes", "patch_values")
"""Inputs and outputs that pass from stage to stage and are in the backend's memory, not the host's."""

Done = Callable[[float], None]
"""done(seconds that a run took), called when that is known: on a GPU, when the host next waits for it."""


class Tensor(Protocol):
    """float32 values; slices of leading axes are views, assignment copies, `np.array(x)` fetches."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...

    def __setitem__(self, key: Any, value: Any, /) -> None: ...

    def copy(self) -> Any:
        """Values of its own."""


class Memory(Protocol):
    """Where a backend keeps tensors."""

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """New float32 values, all 0."""

    def available(self) -> int | None:
        """Bytes to be had there now; None where unknown."""


class _HostMemory:
    def zeros(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return buffers.zeros(shape)

    def available(self) -> int | None:
        return available_memory()


HOST = _HostMemory()
"""Numpy arrays."""


def ring_runs(first: int, count: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Where `count` <= size consecutive numbers from `first` lie in a ring: (slots, which of them)."""
    done = 0
    while done < count:
        slot = (first + done) % size
        run = min(count - done, size - slot)
        yield slice(slot, slot + run), slice(done, done + run)
        done += run


@dataclass(frozen=True)
class EngineLimits:
    """What texts and passes an engine has to take."""

    max_bytes: int
    """Longest text in ids, BOS included."""
    max_patches: int
    """Most patches of a text."""
    max_patch_length: int
    """Longest patch in bytes; the runtime pads to powers of two."""
    max_batch: int = 1
    """Texts at a time."""
    prefill_chunk: int = 256
    """Bytes or patches that one pass takes at most."""
    rollback: int = 64
    """Bytes that can be taken back without computing them again."""

    def positions(self, stage: str, spec: StageSpec) -> int:
        """Positions that a stage's cache can come to."""
        return min(spec.max_positions, self.max_patches if stage == "latent" else self.max_bytes)


@dataclass(frozen=True)
class CacheLimits:
    """Sizes that a stage's cache is made for."""

    rollback: int
    """Positions that can always be taken back."""
    positions: int
    """Positions that the model has."""
    chunk: int
    """Positions that one call takes at most."""


def ring_cache(spec: StageSpec, limits: CacheLimits) -> RingCache:
    """What a portable stage graph reads."""
    sizes = (spec.layers, spec.kv_heads, spec.head_dim)
    return RingCache(*sizes, window=spec.window, rollback=limits.rollback, limit=limits.positions)


def ordered_cache(spec: StageSpec, limits: CacheLimits) -> OrderedCache:
    """What a stage graph with fused attention reads."""
    sizes = (spec.layers, spec.kv_heads, spec.head_dim)
    return OrderedCache(
        *sizes, window=spec.window, rollback=limits.rollback, limit=limits.positions, chunk=limits.chunk
    )


def narrow_cache(spec: StageSpec, limits: CacheLimits, scales: npt.NDArray[np.float32]) -> NarrowCache:
    """What a stage's two graphs with fused attention read, one of them in 8 bits; scales: `NarrowCache`'s."""
    return NarrowCache(
        spec.layers,
        spec.kv_heads,
        spec.head_dim,
        scales,
        window=spec.window,
        rollback=limits.rollback,
        limit=limits.positions,
        chunk=limits.chunk,
    )


class StageCall(Protocol):
    """One stage graph at one set of shapes, bound to one cache."""

    inputs: dict[str, Any]
    """Buffers to fill before `run`, every graph input but the cache: `Tensor` if `RESIDENT`, else numpy."""
    outputs: dict[str, Any]
    """Buffers that hold the results after `run`, likewise."""

    def begin(self) -> None:
        """Wait until `inputs` may be written: an earlier run may still be reading them."""

    def run(self, done: Done) -> None:
        """Compute outputs from inputs and the cache as it stands."""


@dataclass(frozen=True)
class PackedPart:
    """What one text has in a pass over several."""

    call: StageCall
    """Its own bound call: inputs are taken from there, outputs put there."""
    cache: StageCache
    """Its cache, with room for the new positions, which the pass does not yet count."""
    shared: Mapping[str, Any]
    """Inputs that are read from the text's own tensors."""
    count: int
    """Its new positions."""


class PackedStage(Protocol):
    """A stage graph that takes the new positions of several texts in one pass, each with its own past."""

    def run(self, parts: Sequence[PackedPart]) -> float:
        """Fill the outputs of every part's call; seconds that it took. Raises what the engine does."""

    def release(self) -> None:
        """Let go of the memory of texts that are gone."""


def placed(parts: Sequence[PackedPart], before: Sequence[StageCache | None]) -> list[PackedPart | None]:
    """What each row of a packed graph computes: a text stays in the row that it had before, where it was in
    one, so that little has to be bound again. None = no text.

    before: the cache of the text that each row had last, None where there is none any longer.
    """
    rows = {id(cache): row for row, cache in enumerate(before) if cache is not None}
    found: list[PackedPart | None] = [None] * len(before)
    new = []
    for part in parts:
        row = rows.get(id(part.cache))
        if row is None:
            new.append(part)
        else:
            found[row] = part
    free = [row for row, part in enumerate(found) if part is None]
    for part, row in zip(new, free, strict=False):
        found[row] = part
    return found


PADDING = 8
"""`StageBackend.padding` where any shape can run: a chunk of text in one pass, nearly always. What is padded
goes through the pooling alone, and costs less than reading the weights of the stage once more."""


class OneText:
    """What a `StageBackend` without graphs for several texts has of them."""

    rows: tuple[int, ...] = ()
    packed_positions: int | None = None
    padding: int = PADDING

    def packed(self, texts: int) -> PackedStage:
        raise AssertionError(f"there is no graph for {texts} texts")


class StageBackend(Protocol):
    """One loaded stage graph."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of texts that graphs for several were made for, ascending; () = one at a time only."""

    @property
    def packed_positions(self) -> int | None:
        """Most new positions of one text in a pass over several; None = any number. Whoever has more runs
        alone."""

    @property
    def padding(self) -> int:
        """A pass over patches takes at most so many bytes for each byte of a chunk, every patch padded to the
        longest."""

    def packed(self, texts: int) -> PackedStage:
        """The graph for so many texts or a few more, at most the largest of `rows`; loaded when it is asked
        for first. Raises BackendError, BundleError."""

    @property
    def memory(self) -> Memory:
        """Where its `RESIDENT` values are: the same for all stages of a model."""

    def new_cache(self, limits: CacheLimits) -> StageCache:
        """An empty cache, in the layout that the graph reads."""

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], cache: StageCache, shared: Mapping[str, Any]
    ) -> StageCall:
        """A call with inputs of these shapes; `shared` inputs are read from the caller's own tensors.

        shapes: graph input name -> shape, for every input that is neither the cache's nor shared.
        """
