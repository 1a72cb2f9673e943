"""Generation: prefill, then round after round of new bytes, as a stream of text that is certain.

`stream` is the primitive; `generate` is a loop over it, so that the two cannot drift.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .options import GenerationOptions
from .sampling import Sampler
from .sequence import Sequence
from .speculation import DraftFigures, Speculator
from .stopping import StopMatcher
from .utf8 import Utf8Stream
from .vocabulary import BYTE_OFFSET, EOS, encode

if TYPE_CHECKING:
    from .model import BltModel

__all__ = ["FinishReason", "GenerationChunk", "GenerationResult", "GenerationStats", "generate", "stream"]

FinishReason = Literal["length", "eos", "stop", "context", "cancelled"]
"""length: max_new_bytes reached; eos: the model ended the text; stop: a stop string was found;
context: the model has no more positions; cancelled: the caller's event was set."""


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one generation. Seconds are wall clock; every stage, patcher included, is counted."""

    prompt_bytes: int
    """Bytes of the prompt, without BOS."""
    new_bytes: int
    """Bytes sampled, those of a stop string and an incomplete tail included."""
    patches: int
    """Patches of prompt and new bytes, with the BOS patch."""
    prefill_seconds: float
    """From the start until the prompt's last logits."""
    first_byte_seconds: float
    """From the start until the first new byte was chosen."""
    decode_seconds: float
    """From the prompt's last logits to the end."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds inside each stage's graph."""
    stage_calls: dict[str, int] = field(default_factory=dict)
    """Runs of each stage's graph."""
    state_bytes: int = 0
    """Memory of caches and recent states at the end."""
    rounds: int = 0
    """Rounds of decoding that guessed bytes ahead."""
    drafted: int = 0
    """Bytes guessed in them."""
    accepted: int = 0
    """Guesses that were right."""
    missed: int = 0
    """Rounds that a wrong guess ended; guesses behind it were not looked at."""

    @property
    def bytes_per_second(self) -> float:
        """New bytes per second of decoding; 0 when there are none."""
        return self.new_bytes / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of the text, never part of a stop string and never cut inside a character."""

    text: str
    """New text; "" in a last chunk that only says why it ended."""
    data: bytes
    """The bytes that `text` stands for."""
    finish_reason: FinishReason | None = None
    """Set in the last chunk only."""
    stats: GenerationStats | None = None
    """Set in the last chunk only."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class GenerationResult:
    """A finished generation."""

    text: str
    """The new text; invalid bytes are replaced by U+FFFD."""
    data: bytes
    """The new bytes as they were sampled, up to a stop string."""
    finish_reason: FinishReason
    """Why it ended."""
    stats: GenerationStats
    """Figures."""


class _TextStream:
    """Bytes in, certain text out: stop strings and incomplete characters are held back."""

    def __init__(self, stops: tuple[bytes, ...]) -> None:
        self._matcher = StopMatcher(stops)
        self._utf8 = Utf8Stream()
        self._waiting = b""

    def push(self, data: bytes) -> tuple[str, bytes, bool]:
        """Text and its bytes that are certain now, and whether a stop string was found."""
        emitted, stopped = self._matcher.push(data)
        return (*self._pass(emitted), stopped)

    def flush(self, stopped: bool) -> tuple[str, bytes]:
        """What was held back; an incomplete character becomes U+FFFD."""
        text, data = self._pass(b"" if stopped else self._matcher.flush())
        tail, self._waiting = self._waiting, b""
        return text + self._utf8.flush(), data + tail

    def _pass(self, data: bytes) -> tuple[str, bytes]:
        self._waiting += data
        text = self._utf8.push(data)
        if not text:
            return "", b""
        done = len(self._waiting) - self._utf8.pending
        certain, self._waiting = self._waiting[:done], self._waiting[done:]
        return text, certain


def stream(
    model: BltModel,
    prompt: str | bytes,
    options: GenerationOptions,
    *,
    cancel: threading.Event | None = None,
) -> Iterator[GenerationChunk]:
    """Continue `prompt` (a str is taken as UTF-8), yielding text as soon as it is certain.

    The model's end-of-sequence ends it and is no text; other special ids are never chosen. The last chunk
    carries the finish reason and figures. `cancel` is looked at before every round of bytes and
    every chunk of the prompt. Raises PromptTooLongError before anything is computed.
    """
    data = prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else bytes(prompt)
    clock = _Clock()
    sequence = model.sequence()
    speculator = Speculator(sequence, Sampler(options), options, model.costs)
    out = _TextStream(options.stop_bytes)
    # 1. Prefill.
    reason = _prefill(sequence, data, cancel)
    clock.prefilled = clock.first_byte = time.perf_counter()
    # 2. Round after round. The last id chosen is never read: nothing will follow it.
    new_bytes, stopped = 0, False
    pending: int | None = None
    while reason is None:
        reason = _reason_to_end(sequence, options, new_bytes, cancel)
        if reason is not None:
            break
        chosen = (
            [speculator.begin()]
            if pending is None
            else speculator.round(pending, options.max_new_bytes - new_bytes)
        )
        pending = chosen[-1]
        if new_bytes == 0:
            clock.first_byte = time.perf_counter()
        for number in chosen:
            if number == EOS:
                reason = "eos"
                break
            new_bytes += 1
            text, certain, stopped = out.push(bytes([number - BYTE_OFFSET]))
            if certain:
                yield GenerationChunk(text, certain)
            if stopped:
                reason = "stop"
                break
    # 3. What was held back, and the figures: of the text alone, if the last round has read on behind it.
    if stopped:
        sequence.roll_back(max(0, sequence.length - len(data) - new_bytes))
    text, certain = out.flush(stopped)
    yield GenerationChunk(
        text, certain, reason, _stats(sequence, len(data), new_bytes, clock, speculator.figures)
    )


@dataclass
class _Clock:
    # Moments of a generation, time.perf_counter() seconds.
    started: float = field(default_factory=time.perf_counter)
    prefilled: float = 0.0
    first_byte: float = 0.0


def _prefill(sequence: Sequence, data: bytes, cancel: threading.Event | None) -> FinishReason | None:
    for _ in sequence.extend(encode(data)):
        if cancel is not None and cancel.is_set():
            return "cancelled"
    return None


def _reason_to_end(
    sequence: Sequence, options: GenerationOptions, new_bytes: int, cancel: threading.Event | None
) -> FinishReason | None:
    if new_bytes >= options.max_new_bytes:
        return "length"
    if cancel is not None and cancel.is_set():
        return "cancelled"
    # The byte chosen last has not been read yet: it needs a position before another can be chosen.
    if sequence.length + (new_bytes > 0) > sequence.limits.max_positions:
        return "context"
    return None


def _stats(
    sequence: Sequence, prompt_bytes: int, new_bytes: int, clock: _Clock, drafts: DraftFigures
) -> GenerationStats:
    times = sequence.times
    return GenerationStats(
        prompt_bytes=prompt_bytes,
        new_bytes=new_bytes,
        patches=len(sequence.boundaries.patch_lengths()),
        prefill_seconds=clock.prefilled - clock.started,
        first_byte_seconds=clock.first_byte - clock.started,
        decode_seconds=time.perf_counter() - clock.prefilled,
        stage_seconds={name: spent.seconds for name, spent in times.items()},
        stage_calls={name: spent.calls for name, spent in times.items()},
        state_bytes=sequence.state_bytes,
        rounds=drafts.rounds,
        drafted=drafts.drafted,
        accepted=drafts.accepted,
        missed=drafts.missed,
    )


def generate(
    model: BltModel,
    prompt: str | bytes,
    options: GenerationOptions,
    *,
    cancel: threading.Event | None = None,
) -> GenerationResult:
    """Run `stream` to its end."""
    text, data = [], []
    for chunk in stream(model, prompt, options, cancel=cancel):
        text.append(chunk.text)
        data.append(chunk.data)
    assert chunk.finish_reason is not None
    assert chunk.stats is not None
    return GenerationResult("".join(text), b"".join(data), chunk.finish_reason, chunk.stats)
