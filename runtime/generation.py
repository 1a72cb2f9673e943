"""Stop strings in a stream of bytes: found wherever the pieces are cut, and never emitted.

Generation: prefill, then round after round of new bytes, as a stream of text that is certain.

`stream` is the primitive; `generate` is a loop over it, so that the two cannot drift. Either can go on in a
sequence that holds earlier text, and leaves it at the end of what was handed out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from .errors import OptionError
from .fields import shown
from .options import GenerationOptions
from .sampling import Sampler
from .scoring import ByteDetail, DetailRecorder
from .sequence import Sequence
from .speculation import Speculator
from .vocabulary import BYTE_OFFSET, EOS, Utf8Stream, byte_ids, encode

if TYPE_CHECKING:
    from .model import BltModel

__all__ = [
    "FinishReason",
    "GenerationChunk",
    "GenerationResult",
    "GenerationStats",
    "StopMatcher",
    "generate",
    "stream",
]


class StopMatcher:
    """Passes bytes on until one of the stop strings has gone by.

    The stop string that *ends* first in the stream wins; of several that end at the same byte, the
    longest, so that no byte of the stop string is emitted. The result does not depend on how the stream
    is cut. Bytes that may yet turn out to begin a stop string are held back; `flush` returns them.

    Raises OptionError for an empty stop string, which would stop everything, TypeError for what is not bytes.
    """

    def __init__(self, stops: Iterable[bytes]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        if not all(isinstance(stop, bytes) for stop in self._stops):
            raise TypeError(f"stop strings are {shown(self._stops)}; allowed is a list of bytes objects")
        if b"" in self._stops:
            raise OptionError("a stop string is empty; allowed are strings of at least one byte")
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = b""
        self._found: bytes | None = None

    @property
    def found(self) -> bytes | None:
        """The stop string that ended the stream, None while there was none."""
        return self._found

    def push(self, data: bytes) -> tuple[bytes, bool]:
        """Takes the next bytes; returns (bytes that are safe to emit now, whether a stop string was found).

        After a stop string everything is dropped: the answer is always (b"", True).
        """
        if self._found is not None:
            return b"", True
        if not self._stops:
            return data, False
        stream = self._held + data
        for end, byte in enumerate(data, start=len(self._held) + 1):
            self._advance(byte)
            if self._found is not None:
                self._held = b""
                return stream[: end - len(self._found)], True
        keep = len(stream) - max(self._matched)
        self._held = stream[keep:]
        return stream[:keep], False

    def flush(self) -> bytes:
        """Ends the stream: the bytes still held back, which began a stop string that never came."""
        held, self._held = self._held, b""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, byte: int) -> None:
        """One byte for every stop string (Knuth-Morris-Pratt): how much of each the stream now ends with."""
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != byte:
                matched = self._borders[index][matched - 1]
            if stop[matched] == byte:
                matched += 1
            self._matched[index] = matched
            if matched == len(stop) and (self._found is None or matched > len(self._found)):
                self._found = stop


def _borders(stop: bytes) -> list[int]:
    """For each prefix of `stop`, the length of the longest shorter prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for end in range(1, len(stop)):
        while length and stop[end] != stop[length]:
            length = borders[length - 1]
        if stop[end] == stop[length]:
            length += 1
        borders[end] = length
    return borders


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
    """Patches that begin in prompt and new bytes, with the BOS patch of a new text."""
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
        return _ratio(self.new_bytes, self.decode_seconds)

    @property
    def milliseconds_per_byte(self) -> float:
        """Milliseconds of decoding for each new byte; 0 when there are none."""
        return 1000 * _ratio(self.decode_seconds, self.new_bytes)

    @property
    def text_patches(self) -> int:
        """Patches of the text, without the one that a new text's BOS is alone in."""
        return max(0, self.patches - 1)

    @property
    def bytes_per_patch(self) -> float:
        """Bytes of prompt and text for each of `text_patches`; 0 when there are none."""
        return _ratio(self.prompt_bytes + self.new_bytes, self.text_patches)

    @property
    def acceptance(self) -> float | None:
        """Share of the guesses that were right; None without guesses."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def calls_per_byte(self) -> dict[str, float]:
        """Runs of each stage's graph for each new byte, those of the prompt included."""
        return {name: _ratio(calls, self.new_bytes) for name, calls in self.stage_calls.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


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
    details: tuple[ByteDetail, ...] = ()
    """One for each byte of `data`, when `GenerationOptions.details` asks for them."""

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
    details: tuple[ByteDetail, ...] = ()
    """One for each byte of `data`, when `GenerationOptions.details` asks for them."""


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
    sequence: Sequence | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[GenerationChunk]:
    """Continue `prompt` (a str is taken as UTF-8), yielding text as soon as it is certain.

    The model's end-of-sequence ends it and is no text; other special ids are never chosen. The last chunk
    carries the finish reason and figures. `cancel` is looked at before every round of bytes and
    every chunk of the prompt. Raises PromptTooLongError before anything is computed.

    `sequence` (from `model.sequence()`) holds the text before the prompt, which may be empty then; BOS is put
    in where it has read nothing. When the last chunk comes, or the iterator is closed before that, it has
    read all of earlier text + prompt + the `data` that was yielded, and nothing else: no stop string, no
    guess, no byte that was held back. In two cases it lacks `text[sequence.length - 1:]`, which the next
    call's prompt has to begin with: the prompt's rest when `cancel` was set inside the prompt; the last
    byte at reason "context", where no position is left for it. After an exception it is of no more use.
    """
    data = prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else bytes(prompt)
    yield from _Generation(model, data, options, sequence, cancel).run()


class _Generation:
    """One call of `stream`: a sequence, and how much of what it reads was handed out."""

    def __init__(
        self,
        model: BltModel,
        prompt: bytes,
        options: GenerationOptions,
        sequence: Sequence | None,
        cancel: threading.Event | None,
    ) -> None:
        self._clock = _Clock()
        self._kept = sequence is not None
        self._sequence = model.sequence() if sequence is None else sequence
        self._past = _Past.of(self._sequence)
        self._prompt, self._options, self._cancel = prompt, options, cancel
        self._speculator = Speculator(self._sequence, Sampler(options), options, model.costs)
        self._recorder = DetailRecorder(self._sequence, options.logprobs) if options.details else None
        self._out = _TextStream(options.stop_bytes)
        self._new_bytes = 0
        self._pending = EOS  # the id chosen last, which the sequence has not read
        self._length = 0  # of BOS, prompt and everything handed out; 0 before the prompt was read

    def run(self) -> Iterator[GenerationChunk]:
        """See `stream`."""
        # 1. Prefill.
        reason = self._prefill()
        self._clock.prefilled = self._clock.first_byte = time.perf_counter()
        # 2. Round after round.
        stopped = False
        try:
            while reason is None:
                reason = _reason_to_end(self._sequence, self._options, self._new_bytes, self._cancel)
                for number in self._choose() if reason is None else ():
                    if number == EOS:
                        reason = "eos"
                        break
                    self._new_bytes += 1
                    text, certain, stopped = self._out.push(bytes([number - BYTE_OFFSET]))
                    if certain:
                        yield self._chunk(text, certain)
                    if stopped:
                        reason = "stop"
                        break
        except GeneratorExit:
            self._settle(stopped)
            raise
        # 3. What was held back, and the figures.
        last = self._chunk(*self._out.flush(stopped))
        self._settle(stopped)
        yield replace(last, finish_reason=reason, stats=self._stats())

    def _prefill(self) -> FinishReason | None:
        sequence, data = self._sequence, self._prompt
        for _ in sequence.extend(byte_ids(data) if sequence.length else encode(data)):
            if self._cancel is not None and self._cancel.is_set():
                return "cancelled"
        self._length = sequence.length
        return None

    def _choose(self) -> list[int]:
        # The next ids; the last of them is read in the next round, if there is one.
        if self._new_bytes == 0:
            chosen = [self._speculator.begin()]
            self._clock.first_byte = time.perf_counter()
        else:
            chosen = self._speculator.round(self._pending, self._options.max_new_bytes - self._new_bytes)
        self._pending = chosen[-1]
        if self._recorder is not None:
            self._recorder.add(chosen, self._speculator.rows)
        return chosen

    def _chunk(self, text: str, data: bytes) -> GenerationChunk:
        self._length += len(data)
        details = () if self._recorder is None else self._recorder.take(len(data))
        return GenerationChunk(text, data, details=details)

    def _settle(self, stopped: bool) -> None:
        """Let the sequence stand where the text does."""
        sequence = self._sequence
        if not self._kept:
            if stopped:  # figures are of the text alone, if the last round has read on behind it
                sequence.roll_back(sequence.length - len(self._prompt) - self._new_bytes)
            return
        if not self._length:
            return  # cancelled inside the prompt
        sequence.roll_back(max(0, sequence.length - self._length))
        if sequence.length < min(self._length, sequence.limits.max_positions):
            sequence.append(np.array([self._pending], np.int64))

    def _stats(self) -> GenerationStats:
        clock, drafts, sequence, past = self._clock, self._speculator.figures, self._sequence, self._past
        times = sequence.times
        return GenerationStats(
            prompt_bytes=len(self._prompt),
            new_bytes=self._new_bytes,
            patches=len(sequence.boundaries.patch_lengths()) - past.patches,
            prefill_seconds=clock.prefilled - clock.started,
            first_byte_seconds=clock.first_byte - clock.started,
            decode_seconds=time.perf_counter() - clock.prefilled,
            stage_seconds={name: spent.seconds - past.seconds[name] for name, spent in times.items()},
            stage_calls={name: spent.calls - past.calls[name] for name, spent in times.items()},
            state_bytes=sequence.state_bytes,
            rounds=drafts.rounds,
            drafted=drafts.drafted,
            accepted=drafts.accepted,
            missed=drafts.missed,
        )


@dataclass
class _Clock:
    # Moments of a generation, time.perf_counter() seconds.
    started: float = field(default_factory=time.perf_counter)
    prefilled: float = 0.0
    first_byte: float = 0.0


@dataclass(frozen=True)
class _Past:
    # What a sequence had behind it before, which figures leave out.
    patches: int
    seconds: dict[str, float]
    calls: dict[str, int]

    @classmethod
    def of(cls, sequence: Sequence) -> _Past:
        times = sequence.times
        return cls(
            len(sequence.boundaries.patch_lengths()) if sequence.length else 0,
            {name: spent.seconds for name, spent in times.items()},
            {name: spent.calls for name, spent in times.items()},
        )


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


def generate(
    model: BltModel,
    prompt: str | bytes,
    options: GenerationOptions,
    *,
    sequence: Sequence | None = None,
    cancel: threading.Event | None = None,
) -> GenerationResult:
    """Run `stream` to its end."""
    chunks = list(stream(model, prompt, options, sequence=sequence, cancel=cancel))
    last = chunks[-1]
    assert last.finish_reason is not None
    assert last.stats is not None
    return GenerationResult(
        "".join(chunk.text for chunk in chunks),
        b"".join(chunk.data for chunk in chunks),
        last.finish_reason,
        last.stats,
        tuple(detail for chunk in chunks for detail in chunk.details),
    )
