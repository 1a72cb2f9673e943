"""How well a text is predicted: bits per byte of a whole one, and what was known of each byte before it came.

Both look at sequences only. What they do not know: bundles, sampling, stop strings, text.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import OptionError
from .fields import shown
from .lanes import own_seconds
from .sampling import log_probabilities
from .sequence import Sequence
from .vocabulary import BYTE_OFFSET, byte_ids, encode

__all__ = ["ByteDetail", "EmptyTextError", "Score", "byte_details", "likelihood", "score"]

# 1. One byte after the other.


@dataclass(frozen=True)
class ByteDetail:
    """One byte and what was known just before it."""

    byte: int
    """0..255."""
    position: int
    """Its index in the whole text, prompt included; 0 is the text's first byte (BOS is none)."""
    starts_patch: bool
    """A patch starts with this byte."""
    entropy: float | None
    """Nats: the patcher's uncertainty of this byte before it was known; None when patching needs none."""
    guessed: bool
    """A draft had guessed it."""
    logprob: float | None = None
    """Natural log of its probability under the model's own distribution: temperature 1, no filter and no
    penalty, over all 260 classes. None unless `GenerationOptions.logprobs` is set."""
    top: tuple[tuple[int, float], ...] = ()
    """The `GenerationOptions.logprobs` most likely ids (vocabulary ids, special ones too) with their natural
    log probabilities, most likely first, the lower id on ties."""


def byte_details(
    sequence: Sequence,
    first: int,
    ids: Iterable[int],
    rows: npt.NDArray[np.float32],
    logprobs: int | None,
    guesses: int = 0,
) -> list[ByteDetail]:
    """Details of the ids at positions first.. of a sequence, up to a special id, which is no byte.

    The sequence has read everything before the last of them, at least. rows float32 [as many or more, 260]:
    the logits that each was chosen from, or would have been. The first `guesses` of the ids had been guessed.
    """
    starts, entropies = sequence.boundaries.starts, sequence.entropies
    details = []
    for index, number in enumerate(ids):
        if number < BYTE_OFFSET:
            break
        place = first + index
        at = bisect_left(starts, place)
        logprob, top = likelihood(rows[index], number, logprobs)
        details.append(
            ByteDetail(
                byte=number - BYTE_OFFSET,
                position=place - 1,
                starts_patch=at < len(starts) and starts[at] == place,
                entropy=None if entropies is None else float(entropies[place - 1]),
                guessed=index < guesses,
                logprob=logprob,
                top=top,
            )
        )
    return details


def likelihood(
    logits: npt.NDArray[np.float32], number: int, count: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Natural log probability of an id under logits [V], and the `count` most likely ids with theirs, the
    lower id on ties; (None, ()) when count is None."""
    if count is None:
        return None, ()
    logs = log_probabilities(logits)
    order = np.argsort(-logs, kind="stable")[:count] if count else ()
    return float(logs[number]), tuple((int(one), float(logs[one])) for one in order)


# 2. A whole text.


@dataclass(frozen=True)
class Score:
    """What scoring a text gave."""

    bits_per_byte: float
    """Mean negative log2 probability of each byte, over all 260 classes."""
    bytes: int
    """Bytes scored; BOS is not one."""
    patches: int
    """Patches over all windows, each window's BOS patch included."""
    windows: int
    """Windows scored, each from BOS."""
    context: int
    """Ids in a full window, BOS included."""
    seconds: float
    """Wall clock; of a text that shares passes with others, what was its own and its part of those."""

    @property
    def bits(self) -> float:
        """Bits of all bytes together."""
        return self.bits_per_byte * self.bytes

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds > 0 else 0.0


class EmptyTextError(OptionError):
    """A text has no byte that could be scored."""


def score(
    new_sequence: Callable[[], Sequence],
    data: bytes | BinaryIO,
    context: int,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score `data` in windows of `context` (>= 2) ids: BOS and the next context - 1 bytes, without overlap.

    Each window is read by a new sequence; of a stream no more than a window is held. progress(bytes done,
    bytes in all, 0 for a stream). Raises EmptyTextError, and PromptTooLongError when a sequence has no
    positions for a window.
    """
    started = own_seconds()
    bits, done, patches, windows = 0.0, 0, 0, 0
    stream, total = (io.BytesIO(data), len(data)) if isinstance(data, bytes) else (data, 0)
    while window := _filled(stream, context - 1):
        sequence = new_sequence()
        bits += _bits(sequence, window)
        patches += sequence.boundaries.count
        done, windows = done + len(window), windows + 1
        if progress is not None:
            progress(done, total)
    if not done:
        raise EmptyTextError("there is nothing to score: the text is empty")
    return Score(bits / done, done, patches, windows, context, own_seconds() - started)


def _filled(stream: BinaryIO, size: int) -> bytes:
    """The next `size` bytes, fewer only at the end: a pipe may give fewer at a time. Raises OptionError."""
    parts = []
    while size and (part := stream.read(size)):
        if not isinstance(part, bytes):
            raise OptionError(
                f"data gives {shown(part)}; allowed is a file that was opened to read bytes ('rb')"
            )
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _bits(sequence: Sequence, window: bytes) -> float:
    bits, following = 0.0, byte_ids(window)
    for result in sequence.extend(encode(window)):
        # The row after the window's last byte predicts a byte of the next window: not scored.
        targets, following = np.split(following, [len(result.logits)])
        logs = log_probabilities(result.logits[: len(targets)])
        bits -= float(logs[np.arange(len(targets)), targets].sum() / np.log(2.0))
    return bits
