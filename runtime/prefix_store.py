"""States of texts that were read, so that what comes again is not read again.

A state is kept under the bytes that it has read; for bytes that is all there is to compare. A prompt goes on
from the kept state that has the most in common with it: one whose text it begins with, or one that can be
rolled back to where the two part. States are kept where texts are likely to part or to go on: at the end of a
prompt and of an answer, where a prompt leaves what an earlier one had, and every so many bytes of a long one,
because windows make a state good for its own end only. What was used least recently goes first, so that all
of them together stay within a budget.
What this does not know: how a text goes on, files, the network.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .choices import Choices, joined_choices, stream_choices
from .errors import BackendError, OptionError, ran_out_of_memory
from .fields import checked_bytes, checked_int, shown
from .generation import GenerationChunk, GenerationResult, PromptReader
from .lanes import LANE
from .model import BltModel
from .options import GenerationOptions
from .prefix_readings import Reading, Readings
from .prefix_tree import PrefixTree
from .sequence import ChunkResult, Sequence
from .vocabulary import BOS, BYTE_OFFSET, decode

__all__ = ["PrefixStore", "StoreFigures", "StoredChoices", "default_memory", "spare_memory"]

Ids = npt.NDArray[np.int64]

_SHARE = 4
_MOST = 2_000_000_000
_UNKNOWN = 256_000_000
# A state costs what its windows take, reading so many bytes costs time: at the demo's size 2 MB for 0.1 s of
# one core, at the released 1B's 105 MB for 3 s.
_EVERY = 512
# Of the budget, for the states inside one prompt, and for the ends of its choices, of which most will not be
# gone on with: those of other texts are worth more.
_INSIDE = 0.5
# Bytes that are read again rather than kept in a state more.
_FEW = 64
# Of a kept state's small objects, measured: 11 kB.
_OBJECTS = 12_000


@dataclass(frozen=True)
class StoreFigures:
    """What a store holds, and what it has done so far."""

    states: int = 0
    """States it holds."""
    bytes: int = 0
    """Memory of them and of their texts: what several share counts once."""
    memory: int = 0
    """Bytes that they may take."""
    hits: int = 0
    """Prompts that went on from a state."""
    misses: int = 0
    """Prompts that began anew."""
    reused_bytes: int = 0
    """Bytes of prompts that were not read again."""
    evicted: int = 0
    """States that were dropped for others."""

    def __add__(self, other: StoreFigures) -> StoreFigures:
        return StoreFigures(*(getattr(self, name) + getattr(other, name) for name in _FIGURES))


_FIGURES = tuple(StoreFigures.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A state that is there to be forked, and is never read on in."""

    key: bytes
    sequence: Sequence
    parts: tuple[tuple[object, int], ...]
    """What it consists of, and the bytes of each."""


def spare_memory(model: BltModel) -> int:
    """Bytes that kept states may take beside all else: a quarter of what is free now where they are."""
    available = model.available_memory()
    return _UNKNOWN if available is None else available // _SHARE


def default_memory(model: BltModel) -> int:
    """Bytes for a store where nobody says: `spare_memory`, at most 2 GB."""
    return min(spare_memory(model), _MOST)


class PrefixStore:
    """A model that remembers what it has read, within so much memory. May be used from several threads."""

    def __init__(self, model: BltModel, memory: int | None = None) -> None:
        """memory: bytes that kept states may take; 0 keeps none, None takes `default_memory`.

        Raises OptionError.
        """
        if not isinstance(model, BltModel):
            raise OptionError(f"model is {shown(model)}; allowed is what BltModel.load gives")
        self.model = model
        self.memory = default_memory(model) if memory is None else checked_int("memory", memory, 0)
        self._lock = threading.Lock()
        self._tree: PrefixTree[_Kept] = PrefixTree()
        self._order: OrderedDict[bytes, _Kept] = OrderedDict()  # used least recently first
        self._holders: dict[int, list[int]] = {}  # of each part by identity: states that have it, its bytes
        self._bytes = 0
        self._engine = model.engine
        self._readings = Readings(_FEW, model.limits.rollback)
        self._hits = self._misses = self._reused = self._evicted = 0

    def __repr__(self) -> str:
        return f"<PrefixStore of {len(self._order)} states, {self.figures.bytes} of {self.memory} bytes>"

    @property
    def figures(self) -> StoreFigures:
        with self._lock:
            return StoreFigures(
                states=len(self._order),
                bytes=self._used,
                memory=self.memory,
                hits=self._hits,
                misses=self._misses,
                reused_bytes=self._reused,
                evicted=self._evicted,
            )

    def sequences(self) -> list[Sequence]:
        """What is kept, used least recently first; to be looked at, saved and forked only."""
        with self._lock:
            return [kept.sequence for kept in self._order.values()]

    def clear(self) -> None:
        """Drop all states."""
        with self._lock:
            self._clear()

    # 1. Texts.

    def stream(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **named: Any,
    ) -> Generator[GenerationChunk, None, None]:
        """Continue `prompt` as `BltModel.stream` does, without reading again what was read before.

        `stats.reused_bytes` of the last chunk tells how much that was. A prompt of which `prompt_details` are
        asked for is read anew, since they need the logits after each of its bytes, and kept like any other.
        Raises OptionError as that.
        """
        return _texts(self.stream_choices(prompt, options, cancel=cancel, **named))

    def generate(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **named: Any,
    ) -> GenerationResult:
        """What `stream` yields until its end, in one."""
        return joined_choices(self.stream_choices(prompt, options, cancel=cancel, **named))[0]

    def stream_choices(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None = None,
        *,
        n: int = 1,
        cancel: threading.Event | None = None,
        marks: Collection[int] = (),
        **named: Any,
    ) -> Generator[tuple[int, GenerationChunk], None, None]:
        """Continue `prompt` n times as `BltModel.stream_choices` does. Ends of answers are kept as of one, of
        several the first ones, in half of the memory.

        marks: numbers of the prompt's bytes after which other prompts are known to part from it.
        """
        asked, data = self.model.checked_request(prompt, options, named, cancel)
        return self._stream(data, asked, checked_int("n", n, 1), cancel, marks)

    def choices(
        self,
        prompt: str | bytes,
        options: GenerationOptions | None = None,
        *,
        n: int = 1,
        cancel: threading.Event | None = None,
        marks: Collection[int] = (),
        when_ready: Callable[[], None] = lambda: None,
        **named: Any,
    ) -> StoredChoices:
        """What `stream_choices` makes, each text by itself: in a batch, side by side.

        when_ready: called when the prompt was read, so that others than the first may begin. Raises
        OptionError as that.
        """
        asked, data = self.model.checked_request(prompt, options, named, cancel)
        return StoredChoices(self, data, asked, checked_int("n", n, 1), cancel, marks, when_ready)

    def _stream(
        self,
        data: bytes,
        options: GenerationOptions,
        n: int,
        cancel: threading.Event | None,
        marks: Collection[int],
    ) -> Generator[tuple[int, GenerationChunk], None, None]:
        self.model.limits.check_positions(1 + len(data))
        sequence, known, parting = self._begin(data, anew=options.prompt_details, cancel=cancel)
        read = self._reader(data, {parting, *marks})
        pieces = stream_choices(
            sequence,
            self.model.costs,
            data,
            options,
            n,
            cancel=cancel,
            known=known,
            read=read,
            ended=_Ends(self, n).keep,
        )
        with self._going(sequence, 1 + len(data) if n > 1 else None), closing(pieces):
            yield from pieces

    @contextmanager
    def _going(self, sequence: Sequence, most: int | None) -> Iterator[None]:
        """In the block a text is made in the sequence, which is kept at the end, of at most so many ids."""
        intact = False
        try:
            yield
            intact = True
        except GeneratorExit:  # between two rounds
            intact = True
            raise
        except (BackendError, MemoryError) as error:
            if ran_out_of_memory(error):
                self.clear()  # the next text needs it more than what is kept
            raise
        finally:
            # Where there are several choices, the first of them has gone on in this sequence.
            if intact and (most is None or sequence.length <= most):
                self.keep(sequence)

    def _reader(self, data: bytes, marks: Collection[int]) -> PromptReader:
        """Reads a prompt's rest and keeps states on the way: at marks, every so many bytes, at the end."""
        if not self.memory:
            return Sequence.extend

        def read(sequence: Sequence, ids: Ids) -> Iterator[ChunkResult]:
            first, end = sequence.length, sequence.length + len(ids)
            stops = {1 + mark for mark in marks if first + _FEW <= 1 + mark <= end - _FEW}
            with self._readings.begin(data, stops, sequence) as reading:
                yield from keeping(sequence, ids, stops, reading)

        def keeping(sequence: Sequence, ids: Ids, stops: set[int], reading: Reading) -> Iterator[ChunkResult]:
            first = kept = sequence.length
            end, step, cost = first + len(ids), sequence.limits.prefill_chunk, 0
            while (at := sequence.length) < end:
                stop = min([end, at + step, *(mark for mark in stops if mark > at)])
                reading.reached = stop
                if stop < end:
                    sequence.reserve(end - at)
                yield from sequence.extend(ids[at - first : stop - first])
                # As seldom as is needed for all states inside the prompt to stay within their part.
                often = (stop - kept) * _INSIDE * self.memory >= len(data) * cost
                if stop in stops or stop == end or (stop - kept >= _EVERY and often):
                    cost = max(cost, self.keep(sequence))
                    kept = stop

        return read

    # 2. States.

    def find(self, prompt: str | bytes) -> tuple[Sequence, int] | None:
        """A sequence that has read BOS and the longest beginning of `prompt` there is a state for, and how
        many bytes that is; its logits are there. It is the caller's own. None where there is no state.

        Raises OptionError for what is no text.
        """
        data = checked_bytes("prompt", prompt)
        with self._lock:
            self._check_engine()
            nearest = self._nearest(data)
        if nearest is None:
            return None
        kept, common = nearest
        try:
            sequence = self.model.fork(kept.sequence)
        except (BackendError, MemoryError):  # there is too little: a text is worth more than what is kept
            self.clear()
            return None
        sequence.roll_back(len(kept.key) - common)
        return sequence, common

    def _nearest(self, prompt: bytes) -> tuple[_Kept, int] | None:
        for kept, common in self._tree.nearest(prompt, self.model.limits.rollback):
            if not common and prompt:
                break  # which saves nothing
            if common == len(kept.key) or kept.sequence.state.can_roll_back(1 + common):
                self._order.move_to_end(kept.key)
                return kept, common
        return None

    def _begin(
        self, data: bytes, *, anew: bool, cancel: threading.Event | None
    ) -> tuple[Sequence, int | None, int]:
        """A sequence to read a prompt in, what it has read of it, where the prompt parts from all texts.

        In a batch it first waits for another text that reads the same just now.
        """
        if not anew:
            self._wait_for_others(data, cancel)
        with self._lock:
            parting = self._tree.common(data)
        found = None if anew else self.find(data)
        if self.memory:
            with self._lock:
                self._hits += found is not None
                self._misses += found is None
                self._reused += found[1] if found else 0
        return (*found, parting) if found else (self.model.sequence(), None, parting)

    def _wait_for_others(self, data: bytes, cancel: threading.Event | None) -> None:
        lane = LANE.get()
        while lane is not None and self.memory:
            with self._lock:
                nearest = self._nearest(data)
            until = self._readings.ahead(data, nearest[1] if nearest else 0)
            if until is None or (cancel is not None and cancel.is_set()):
                return
            lane.wait(until if cancel is None else partial(_either, until, cancel.is_set))

    def keep(self, sequence: Sequence) -> int:
        """Keep the state of a sequence of this model under the bytes that it has read, if it fits; the memory
        that this took, 0 where nothing new is kept.

        Nothing is kept of a sequence that has failed half-way, has read what is no text, or runs on an engine
        that the model has given up. Raises OptionError for another model's.
        """
        if getattr(sequence, "manifest", None) is not self.model.manifest:
            raise OptionError(f"sequence is {shown(sequence)}; allowed is what sequence() of this model gave")
        ids = sequence.ids
        if not self.model.goes_on(sequence):  # its engine has failed, if in another text
            return 0
        if not self.memory or not len(ids) or ids[0] != BOS or (ids[1:] < BYTE_OFFSET).any():
            return 0
        key = decode(ids[1:])
        with self._lock:
            self._check_engine()
            if key in self._order:
                self._order.move_to_end(key)
                return 0
        try:
            fork = sequence.fork(packed=True)
        except (BackendError, MemoryError):
            return 0
        parts = [(part, size) for part, size, _ in fork.state.parts()]
        with self._lock:
            if key in self._order:  # another thread was faster
                return 0
            return self._put(_Kept(key, fork, ((key, len(key)), *parts)))

    # 3. Accounts. The lock is held.

    @property
    def _used(self) -> int:
        return self._bytes + self._tree.bytes + len(self._order) * _OBJECTS

    def _put(self, kept: _Kept) -> int:
        if sum(size for _, size in kept.parts) + len(kept.key) + _OBJECTS > self.memory:
            return 0
        before = self._used
        for part, size in kept.parts:
            holders = self._holders.setdefault(id(part), [0, size])
            self._bytes += size if holders[0] == 0 else 0
            holders[0] += 1
        self._tree.put(kept.key, kept)
        self._order[kept.key] = kept
        taken = self._used - before
        while self._used > self.memory:
            self._drop(next(iter(self._order.values())))
            self._evicted += 1
        return taken

    def _drop(self, kept: _Kept) -> None:
        del self._order[kept.key]
        self._tree.remove(kept.key)
        for part, size in kept.parts:
            holders = self._holders[id(part)]
            holders[0] -= 1
            if not holders[0]:
                del self._holders[id(part)]
                self._bytes -= size

    def _clear(self) -> None:
        for kept in [*self._order.values()]:
            self._drop(kept)

    def _check_engine(self) -> None:
        # What an engine has read that failed since is of no use to the one that took its place.
        if self.model.engine is not self._engine:
            self._clear()
            self._engine = self.model.engine


def _either(one: Callable[[], bool], other: Callable[[], bool]) -> bool:
    return one() or other()


class _Ends:
    """Ends of the choices of one prompt, which are kept in a part of the memory."""

    def __init__(self, store: PrefixStore, n: int) -> None:
        self._store, self._room, self._cost = store, _INSIDE * store.memory if n > 1 else 0.0, 0

    def keep(self, sequence: Sequence) -> None:
        """One of them has come to its end here."""
        if self._room > self._cost:
            self._cost = max(self._cost, self._store.keep(sequence))
            self._room -= self._cost


class StoredChoices:
    """Texts that continue one prompt, each to be gone through by itself: number 0 first, which reads it."""

    def __init__(
        self,
        store: PrefixStore,
        prompt: bytes,
        options: GenerationOptions,
        n: int,
        cancel: threading.Event | None,
        marks: Collection[int],
        when_ready: Callable[[], None],
    ) -> None:
        """What `PrefixStore.choices` gives."""
        self._store, self._prompt, self._options, self._n = store, prompt, options, n
        self._cancel, self._marks, self._when_ready = cancel, marks, when_ready
        self._choices: Choices | None = None
        self._ends = _Ends(store, n)

    @property
    def ready(self) -> bool:
        """Whether the prompt was read, so that others than number 0 may begin."""
        return self._choices is not None and self._choices.ready

    def stream(self, number: int) -> Generator[GenerationChunk, None, None]:
        """The pieces of one of the texts, as `BltModel.stream` yields them; in order, each once."""
        if number == 0:
            self._choices = self._begin()
        assert self._choices is not None
        own, pieces = self._choices.begin(number)
        most = 1 + len(self._prompt) if self._n > 1 else None
        with self._store._going(own, most), closing(pieces):
            yield from pieces
        self._ends.keep(own)

    def _begin(self) -> Choices:
        store, data, options = self._store, self._prompt, self._options
        store.model.limits.check_positions(1 + len(data))
        sequence, known, parting = store._begin(data, anew=options.prompt_details, cancel=self._cancel)
        read = store._reader(data, {parting, *self._marks})
        return Choices(
            sequence,
            store.model.costs,
            data,
            options,
            self._n,
            cancel=self._cancel,
            known=known,
            read=read,
            when_ready=self._when_ready,
        )


def _texts(
    pieces: Generator[tuple[int, GenerationChunk], None, None],
) -> Generator[GenerationChunk, None, None]:
    with closing(pieces):
        for _, chunk in pieces:
            yield chunk
