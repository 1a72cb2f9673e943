"""Generation: prefill, then round after round of new bytes, as a stream of text that is certain.

`stream` is the primitive; `joined` makes one result of it, so that the two cannot drift. It goes on in a
sequence that may hold earlier text, and can leave it at the end of what was handed out. Stop strings are
found wherever the pieces are cut, and never handed out. What it does not know: bundles, devices, how bytes
are guessed ahead.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from .costs import CostTable
from .fields import checked_bytes
from .options import GenerationOptions
from .sampling import Sampler
from .scoring import ByteDetail, byte_details
from .sequence import ChunkResult, Sequence
from .speculation import Speculator
from .vocabulary import BYTE_OFFSET, EOS, Utf8Stream, byte_ids, encode

__all__ = [
    "FinishReason",
    "GenerationChunk",
    "GenerationResult",
    "GenerationStats",
    "PromptReader",
    "StopMatcher",
    "joined",
    "stream",
]

PromptReader = Callable[[Sequence, npt.NDArray[np.int64]], Iterator[ChunkResult]]
"""reads ids into a sequence and yields what `Sequence.extend` does."""


# 1. What is told.


FinishReason = Literal["length", "eos", "stop", "context", "cancelled"]
"""length: max_new_bytes reached; eos: the model ended the text, or a constraint lets nothing more come;
stop: a stop string was found;
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
    reused_bytes: int = 0
    """Bytes of the prompt that were not read, because the state of a text that begins with them was there."""
    forced: int = 0
    """Bytes that a constraint let no other come for, read together with others; they are no guesses."""

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
    prompt_details: tuple[ByteDetail, ...] = ()
    """In the first chunk, one for each byte of the prompt, when `GenerationOptions.prompt_details` asks."""

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
    prompt_details: tuple[ByteDetail, ...] = ()
    """One for each byte of the prompt, when `GenerationOptions.prompt_details` asks for them."""


# 2. Bytes in, certain text out.


class StopMatcher:
    """Passes bytes on until one of the stop strings, each of at least one byte, has gone by.

    The stop string that *ends* first in the stream wins; of several that end at the same byte, the
    longest, so that no byte of the stop string is emitted. Bytes that may yet turn out to begin a stop
    string are held back.
    """

    def __init__(self, stops: Iterable[bytes]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self.held = b""
        """Bytes held back, which end the stream when no more come."""
        self.found: bytes | None = None
        """The stop string that ended the stream, None while there was none."""

    def push(self, byte: int) -> bytes:
        """The next byte, unless a stop string was `found` -> the bytes that are safe to emit now."""
        # How much of each stop string the stream now ends with (Knuth-Morris-Pratt).
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != byte:
                matched = self._borders[index][matched - 1]
            if stop[matched] == byte:
                matched += 1
            self._matched[index] = matched
            if matched == len(stop) and (self.found is None or matched > len(self.found)):
                self.found = stop
        stream = self.held + bytes((byte,))
        if self.found is not None:
            self.held = b""
            return stream[: len(stream) - len(self.found)]
        safe = len(stream) - max(self._matched, default=0)
        self.held = stream[safe:]
        return stream[:safe]


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


class _TextStream:
    """Holds back stop strings and incomplete characters."""

    def __init__(self, stops: tuple[bytes, ...]) -> None:
        self._matcher = StopMatcher(stops)
        self._utf8 = Utf8Stream()
        self._waiting = b""  # for the end of a character

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text; no more bytes may come then."""
        return self._matcher.found is not None

    def push(self, byte: int) -> tuple[str, bytes]:
        """The next byte -> text and its bytes that are certain now."""
        return self._decode(self._matcher.push(byte))

    def flush(self) -> tuple[str, bytes]:
        """What was held back; an incomplete character becomes U+FFFD."""
        text, data = self._decode(self._matcher.held)
        tail, self._waiting = self._waiting, b""
        return text + self._utf8.flush(), data + tail

    def _decode(self, data: bytes) -> tuple[str, bytes]:
        self._waiting += data
        text = self._utf8.push(data)
        if not text:
            return "", b""
        done = len(self._waiting) - self._utf8.pending
        certain, self._waiting = self._waiting[:done], self._waiting[done:]
        return text, certain


# 3. The loop.


def stream(
    sequence: Sequence,
    costs: CostTable,
    prompt: str | bytes,
    options: GenerationOptions,
    *,
    keep: bool = True,
    cancel: threading.Event | None = None,
    known: int | None = None,
    read: PromptReader = Sequence.extend,
) -> Generator[GenerationChunk, None, None]:
    """Continue `prompt` (a str is taken as UTF-8), yielding text as soon as it is certain.

    `sequence` holds the text before the prompt, which may be empty; BOS is put in where it has read nothing.
    `costs`: what runs of the stages cost, which automatic drafting goes by. The ids that the model ends texts
    with are no text; other special ids are never chosen. The last chunk carries the finish reason and
    figures. `cancel` is looked at before every round of bytes and every chunk of the prompt. Raises
    PromptTooLongError before anything is computed.

    known: where the sequence has read BOS and so many bytes of the prompt already and nothing else; those get
    no `prompt_details`. read: reads the prompt, or its rest, as `Sequence.extend` does.

    With `keep` the sequence has read, when the last chunk comes or the iterator is closed before that, all of
    earlier text + prompt + the `data` that was yielded, and nothing else: no stop string, no guess, no byte
    that was held back. In two cases it lacks `text[sequence.length - 1:]`, which the next call's prompt has
    to begin with: the prompt's rest when `cancel` was set inside the prompt; the last byte at reason
    "context", where no position is left for it. After an exception it is of no more use.
    """
    data = checked_bytes("prompt", prompt)
    yield from _Generation(sequence, costs, data, options, keep, cancel, known, read).run()


def joined(chunks: Iterable[GenerationChunk]) -> GenerationResult:
    """All that a stream yields until its end, in one."""
    parts = list(chunks)
    last = parts[-1]
    assert last.finish_reason is not None
    assert last.stats is not None
    return GenerationResult(
        "".join(part.text for part in parts),
        b"".join(part.data for part in parts),
        last.finish_reason,
        last.stats,
        tuple(detail for part in parts for detail in part.details),
        parts[0].prompt_details,
    )


class _Generation:
    """One call of `stream`: a sequence, and how much of what it reads was handed out."""

    def __init__(
        self,
        sequence: Sequence,
        costs: CostTable,
        prompt: bytes,
        options: GenerationOptions,
        keep: bool,
        cancel: threading.Event | None,
        known: int | None,
        read: PromptReader,
    ) -> None:
        self._started = self._prefilled = self._first_byte = time.perf_counter()
        self._sequence, self._keep = sequence, keep
        # What the sequence has behind it, which figures leave out.
        self._patches_before = sequence.boundaries.count if known is None else 0
        self._known, self._read = known or 0, read
        self._times_before = {name: replace(spent) for name, spent in sequence.times.items()}
        self._prompt, self._options, self._cancel = prompt, options, cancel
        self._speculator = Speculator(
            sequence, Sampler(options, sequence.manifest.generation.suppressed), options, costs
        )
        self._details: deque[ByteDetail] = deque()  # of bytes that are not certain text yet
        self._prompt_details: list[ByteDetail] = []  # until the first chunk
        self._out = _TextStream(options.stop_bytes)
        self._new_bytes = 0
        self._pending = EOS  # the id chosen last, which the sequence has not read
        self._prompt_end = 0  # positions up to there; 0 before the prompt was read
        self._length = 0  # of them and everything handed out

    def run(self) -> Iterator[GenerationChunk]:
        sequence, cancel = self._sequence, self._cancel
        # 1. Prefill.
        reason: FinishReason | None = None
        for _ in self._read_prompt():
            if cancel is not None and cancel.is_set():
                reason = "cancelled"
                break
        else:
            self._length = self._prompt_end = sequence.length
        self._prefilled = self._first_byte = time.perf_counter()
        # 2. Round after round.
        try:
            while reason is None:
                reason = "eos" if self._speculator.ended else self._reason_to_end()
                for number in self._choose() if reason is None else ():
                    if number in sequence.end_ids:
                        reason = "eos"
                        break
                    self._new_bytes += 1
                    text, certain = self._out.push(number - BYTE_OFFSET)
                    if certain:
                        yield self._chunk(text, certain)
                    if self._out.stopped:
                        reason = "stop"
                        break
        except GeneratorExit:
            self._settle()
            raise
        # 3. What was held back, and the figures.
        last = self._chunk(*self._out.flush())
        self._settle()
        yield replace(last, finish_reason=reason, stats=self._stats())

    def _read_prompt(self) -> Iterator[None]:
        # In chunks, with what was known of each byte before it, where that is asked for.
        sequence, options, before = self._sequence, self._options, self._sequence.length
        ids = byte_ids(self._prompt[self._known :]) if before else encode(self._prompt)

        def look(first: int, rows: npt.NDArray[np.float32]) -> None:
            if options.prompt_details:  # rows: before the ids at first..; the last may be of a new byte
                known = ids[first - before :][: len(rows)].tolist()
                self._prompt_details += byte_details(sequence, first, known, rows, options.logprobs)

        if before:
            look(before, sequence.logits[None])
        for result in self._read(sequence, ids):
            look(sequence.length - len(result.logits) + 1, result.logits)
            yield

    def _reason_to_end(self) -> FinishReason | None:
        if self._new_bytes >= self._options.max_new_bytes:
            return "length"
        if self._cancel is not None and self._cancel.is_set():
            return "cancelled"
        # The byte chosen last has not been read yet: it needs a position before another can be chosen.
        sequence = self._sequence
        if sequence.length + (self._new_bytes > 0) > sequence.limits.max_positions:
            return "context"
        return None

    def _choose(self) -> list[int]:
        # The next ids; the last of them is read in the next round, if there is one.
        speculator, options = self._speculator, self._options
        if self._new_bytes == 0:
            chosen = [speculator.begin()]
            self._first_byte = time.perf_counter()
        else:
            chosen = speculator.round(self._pending, options.max_new_bytes - self._new_bytes)
        self._pending = chosen[-1]
        if options.details:
            first, guesses = self._sequence.length - len(chosen) + 1, len(chosen) - 1
            self._details += byte_details(
                self._sequence, first, chosen, speculator.rows, options.logprobs, guesses
            )
        return chosen

    def _chunk(self, text: str, data: bytes) -> GenerationChunk:
        self._length += len(data)
        details = tuple(self._details.popleft() for _ in data) if self._options.details else ()
        prompt_details, self._prompt_details = tuple(self._prompt_details), []
        return GenerationChunk(text, data, details=details, prompt_details=prompt_details)

    def _settle(self) -> None:
        """Let the sequence stand where the text does."""
        sequence = self._sequence
        if not self._keep:
            if self._out.stopped:  # figures are of the text alone, if the last round has read on behind it
                sequence.roll_back(sequence.length - self._prompt_end - self._new_bytes + 1)
            return
        if not self._length:
            return  # cancelled inside the prompt
        sequence.roll_back(max(0, sequence.length - self._length))
        if sequence.length < min(self._length, sequence.limits.max_positions):
            sequence.append(np.array([self._pending], np.int64))

    def _stats(self) -> GenerationStats:
        sequence, before = self._sequence, self._times_before
        times = sequence.times
        return GenerationStats(
            prompt_bytes=len(self._prompt),
            new_bytes=self._new_bytes,
            patches=sequence.boundaries.count - self._patches_before,
            prefill_seconds=self._prefilled - self._started,
            first_byte_seconds=self._first_byte - self._started,
            decode_seconds=time.perf_counter() - self._prefilled,
            stage_seconds={name: spent.seconds - before[name].seconds for name, spent in times.items()},
            stage_calls={name: spent.calls - before[name].calls for name, spent in times.items()},
            state_bytes=sequence.state_bytes,
            reused_bytes=self._known,
            **asdict(self._speculator.figures),
        )
