"""What the worker does for one request: every choice, one after the other, as pieces of text.

A choice is what `BltModel.stream` makes of the prompt and the choice's options, which is what `blt-edge
generate` prints. Where the prompt is told of, too, it is read here first, in the same passes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, replace

from ...runtime import (
    BltModel,
    ByteDetail,
    FinishReason,
    GenerationChunk,
    GenerationOptions,
    GenerationStats,
    Sequence,
)
from ...runtime.details import likelihood
from ...runtime.vocabulary import BYTE_OFFSET, encode
from .requests import CompletionRequest

__all__ = ["Piece", "generate_pieces"]


@dataclass(frozen=True)
class Piece:
    """A piece of one choice."""

    choice: int
    """Index of the choice."""
    chunk: GenerationChunk
    """Its text; the last one of a choice has its finish reason and figures."""
    prompt: tuple[ByteDetail, ...] | None = None
    """In a choice's first piece, where the request asks for it: the prompt's bytes."""


def generate_pieces(
    model: BltModel, request: CompletionRequest, cancel: threading.Event
) -> Generator[Piece, None, None]:
    """All choices in order; when `cancel` is set, the last piece says "cancelled". Raises BltError."""
    for index, (prompt, options) in enumerate(request.choices):
        if not request.reads_prompt and not request.score_only:
            for chunk in model.stream(prompt, options, cancel=cancel):
                yield Piece(index, chunk)
        else:
            yield from _with_prompt(model, index, prompt, options, request.score_only, cancel)
        if cancel.is_set():
            return


def _with_prompt(
    model: BltModel,
    index: int,
    prompt: bytes,
    options: GenerationOptions,
    score_only: bool,
    cancel: threading.Event,
) -> Generator[Piece, None, None]:
    started = time.perf_counter()
    sequence = model.sequence()
    details: tuple[ByteDetail, ...] | None = _read_prompt(sequence, prompt, options.logprobs, cancel)
    read = _stats_of_prompt(sequence, len(prompt), time.perf_counter() - started)
    if cancel.is_set() or score_only:
        reason: FinishReason = "cancelled" if cancel.is_set() else "length"
        yield Piece(index, GenerationChunk("", b"", reason, read), details)
        return
    for chunk in model.stream(b"", options, sequence=sequence, cancel=cancel):
        stats = None if chunk.stats is None else _together(read, chunk.stats)
        yield Piece(index, replace(chunk, stats=stats), details)
        details = None


def _read_prompt(
    sequence: Sequence, prompt: bytes, logprobs: int | None, cancel: threading.Event
) -> tuple[ByteDetail, ...]:
    """Read BOS and the prompt; what was known of each byte before it. Some only if `cancel` is set."""
    likely: list[tuple[float | None, tuple[tuple[int, float], ...]]] = []
    for result in sequence.extend(encode(prompt)):
        if cancel.is_set():
            break
        if logprobs is not None:
            known = prompt[len(likely) : len(likely) + len(result.logits)]  # the last row is of a new byte
            likely += [
                likelihood(row, byte + BYTE_OFFSET, logprobs)
                for row, byte in zip(result.logits, known, strict=False)
            ]
    starts, entropies = set(sequence.boundaries.starts), sequence.entropies
    return tuple(
        ByteDetail(
            byte=byte,
            position=place,
            starts_patch=place + 1 in starts,
            entropy=None if entropies is None else float(entropies[place]),
            guessed=False,
            logprob=likely[place][0] if likely else None,
            top=likely[place][1] if likely else (),
        )
        for place, byte in enumerate(prompt[: sequence.length - 1])
    )


def _stats_of_prompt(sequence: Sequence, prompt_bytes: int, seconds: float) -> GenerationStats:
    return GenerationStats(
        prompt_bytes=prompt_bytes,
        new_bytes=0,
        patches=len(sequence.boundaries.patch_lengths()),
        prefill_seconds=seconds,
        first_byte_seconds=seconds,
        decode_seconds=0.0,
        stage_seconds={name: spent.seconds for name, spent in sequence.times.items()},
        stage_calls={name: spent.calls for name, spent in sequence.times.items()},
        state_bytes=sequence.state_bytes,
    )


def _together(read: GenerationStats, made: GenerationStats) -> GenerationStats:
    """Figures of a generation whose prompt was read before it began."""
    return replace(
        made,
        prompt_bytes=read.prompt_bytes,
        patches=read.patches + made.patches,
        prefill_seconds=read.prefill_seconds + made.prefill_seconds,
        first_byte_seconds=read.first_byte_seconds + made.first_byte_seconds,
        stage_seconds={name: read.stage_seconds[name] + spent for name, spent in made.stage_seconds.items()},
        stage_calls={name: read.stage_calls[name] + calls for name, calls in made.stage_calls.items()},
    )
