"""Several texts that continue one prompt, which is read once.

What this does not know: where the sequence comes from, and how a text is made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .costs import CostTable
from .fields import checked_bytes
from .generation import GenerationChunk, GenerationResult, PromptReader, joined, stream
from .options import GenerationOptions
from .scoring import ByteDetail
from .sequence import ChunkResult, Sequence

__all__ = ["joined_choices", "stream_choices"]

# Memory of choices that have begun and wait. For a first byte that is a character nothing has to be read, and
# nothing is copied; for a longer one a choice takes what its windows do.
_AHEAD = 256_000_000


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
    """Continue the prompt `n` times: (which, its next piece).

    The first pieces come together, as many as little memory allows, then one text after the other. Each is
    what `generation.stream` makes, whose arguments these are; with a seed, choice j has seed + j. Once
    `cancel` is set, no other one begins. The sequence is new, or has read `known` bytes of the prompt.
    ended: gets the sequence of each text that has come to its end.
    """
    data, base = checked_bytes("prompt", prompt), []
    told: tuple[ByteDetail, ...] = ()  # of the prompt, which only the first choice reads

    def reading(sequence: Sequence, ids: npt.NDArray[np.int64]) -> Iterator[ChunkResult]:
        yield from read(sequence, ids)
        if n > 1:
            base.append(sequence.fork())

    def begin(number: int) -> tuple[Sequence, Generator[GenerationChunk, None, None]]:
        asked = replace(options, seed=None if options.seed is None else options.seed + number)
        if number == 0:
            new = stream(sequence, costs, data, asked, keep=False, cancel=cancel, known=known, read=reading)
            return sequence, new
        own = base[0] if number == n - 1 else base[0].fork()
        return own, stream(own, costs, data, asked, keep=False, cancel=cancel, known=len(data))

    done = 0
    while done < n and not (done and cancel is not None and cancel.is_set()):
        with ExitStack() as group:
            waiting: list[tuple[Sequence, Generator[GenerationChunk, None, None], float]] = []
            room = _AHEAD
            while done + len(waiting) < n and room > 0:
                number = done + len(waiting)
                own, pieces = begin(number)
                group.callback(pieces.close)
                first = next(pieces)
                if number == 0:
                    told = first.prompt_details
                yield number, replace(first, prompt_details=told)
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
