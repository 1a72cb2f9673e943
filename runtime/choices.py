"""Several texts that continue one prompt, which is read once.

What this does not know: where the sequence comes from, and how a text is made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .costs import CostTable
from .fields import checked_bytes
from .generation import GenerationChunk, GenerationResult, PromptReader, joined, stream
from .options import GenerationOptions
from .scoring import ByteDetail
from .sequence import ChunkResult, Sequence

__all__ = ["Choices", "joined_choices", "stream_choices"]

# Memory of choices that have begun and wait. For a first byte that is a character nothing has to be read, and
# nothing is copied; for a longer one a choice takes what its windows do.
_AHEAD = 256_000_000


class Choices:
    """Several texts that continue one prompt, each made where and when its turn comes.

    Text 0 reads the prompt; the others go on from there. Each is what `generation.stream` makes; with a seed,
    text j has seed + j.
    """

    def __init__(
        self,
        sequence: Sequence,
        costs: CostTable,
        prompt: str | bytes,
        options: GenerationOptions,
        n: int,
        *,
        cancel: threading.Event | None = None,
        known: int | None = None,
        read: PromptReader = Sequence.extend,
        when_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """n: how many there are. The sequence is new, or has read `known` bytes of the prompt. when_ready:
        called when others than text 0 may begin."""
        self._sequence: Sequence | None = sequence
        self._costs, self._options, self._n = costs, options, n
        self._data = checked_bytes("prompt", prompt)
        self._cancel, self._known, self._read, self._when_ready = cancel, known, read, when_ready
        self._base: Sequence | None = None  # has read the prompt
        self._told: tuple[ByteDetail, ...] | None = None  # of the prompt, which only the first text reads

    @property
    def ready(self) -> bool:
        """Whether the prompt was read, so that others than text 0 may begin."""
        return self._base is not None and (self._told is not None or not self._options.prompt_details)

    def begin(self, number: int) -> tuple[Sequence, Generator[GenerationChunk, None, None]]:
        """Text `number` and the sequence that it is made in. All are begun once, in order."""
        options = self._options
        if options.seed is not None:
            options = replace(options, seed=options.seed + number)
        known = len(self._data) if number else self._known
        read: PromptReader = Sequence.extend if number else self._reading
        if number == 0:
            assert self._sequence is not None, "the text has begun"
            own, self._sequence = self._sequence, None
        else:
            assert self._base is not None, "the prompt was not read"
            own = self._base.fork() if number < self._n - 1 else self._base
            self._base = self._base if number < self._n - 1 else None
        pieces = stream(
            own, self._costs, self._data, options, keep=False, cancel=self._cancel, known=known, read=read
        )
        return own, self._with_prompt(pieces)

    def _reading(self, sequence: Sequence, ids: npt.NDArray[np.int64]) -> Iterator[ChunkResult]:
        yield from self._read(sequence, ids)
        if self._n > 1:
            self._base = sequence.fork()
            if self.ready:
                self._when_ready()

    def _with_prompt(
        self, pieces: Generator[GenerationChunk, None, None]
    ) -> Generator[GenerationChunk, None, None]:
        # What is told of the prompt is told at the beginning of each text.
        with closing(pieces):
            first = next(pieces)
            if self._told is None:
                self._told = first.prompt_details
                if self._options.prompt_details and self.ready:  # which may be none: of an empty prompt
                    self._when_ready()
            yield replace(first, prompt_details=self._told)
            yield from pieces


def stream_choices(
    sequence: Sequence,
    costs: CostTable,
    prompt: str | bytes,
    options: GenerationOptions,
    n: int,
    *,
    cancel: threading.Event | None = None,
    known: int | None = None,
    read: PromptReader = Sequence.extend,
    ended: Callable[[Sequence], None] = lambda sequence: None,
) -> Generator[tuple[int, GenerationChunk], None, None]:
    """Continue the prompt `n` times: (which, its next piece); the arguments are those of `Choices`.

    The first pieces come together, as many as little memory allows, then one text after the other. Once
    `cancel` is set, no other one begins. ended: gets the sequence of each text that has come to its end.
    """
    choices = Choices(sequence, costs, prompt, options, n, cancel=cancel, known=known, read=read)
    del sequence
    done = 0
    while done < n and not (done and cancel is not None and cancel.is_set()):
        with ExitStack() as group:
            waiting: list[tuple[Sequence, Generator[GenerationChunk, None, None], float]] = []
            room = _AHEAD
            while done + len(waiting) < n and room > 0:
                number = done + len(waiting)
                own, pieces = choices.begin(number)
                group.callback(pieces.close)
                yield number, next(pieces)
                waiting.append((own, pieces, time.perf_counter()))
                room -= own.own_bytes
                if cancel is not None and cancel.is_set():
                    break
            del own
            while waiting:
                own, pieces, since = waiting.pop(0)  # a text that has ended should hold no memory
                waited = time.perf_counter() - since
                for chunk in pieces:
                    yield done, _without(waited, chunk)
                ended(own)
                done += 1


def _without(seconds: float, chunk: GenerationChunk) -> GenerationChunk:
    """The piece, its figures without the time in which others had their turn."""
    if chunk.stats is None:
        return chunk
    decoding = max(0.0, chunk.stats.decode_seconds - seconds)
    return replace(chunk, stats=replace(chunk.stats, decode_seconds=decoding))


def joined_choices(pieces: Iterable[tuple[int, GenerationChunk]]) -> list[GenerationResult]:
    """All that `stream_choices` yields, one result for each choice."""
    texts: list[list[GenerationChunk]] = []
    for number, chunk in pieces:
        if number == len(texts):
            texts.append([])
        texts[number].append(chunk)
    return [joined(text) for text in texts]
