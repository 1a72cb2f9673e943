"""Pieces of text as OpenAI's completion objects, whole or as server-sent events; usage counts bytes.

Those of chats are in `chat_answers`; what both have is `AnswerDocument`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ...runtime import ByteDetail, GenerationChunk
from ...runtime.vocabulary import BYTE_OFFSET, EOS, Utf8Stream
from .requests import CompletionRequest
from .service import ChoiceChunk

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
_SPECIAL = {0: "<0>", 1: "<bos>", EOS: "<eos>", 3: "<3>"}
_FIGURES = (
    *("prompt_bytes", "new_bytes", "patches", "prefill_seconds", "first_byte_seconds", "decode_seconds"),
    *("bytes_per_second", "stage_seconds", "drafted", "accepted", "rounds", "reused_bytes"),
)
DONE = b"data: [DONE]\n\n"
"""The last event of a stream that came to its end."""


def event(document: Any) -> bytes:
    """A server-sent event. Raises ValueError for what JSON has no word for."""
    return b"data: " + json.dumps(document, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n\n"


def token_text(number: int) -> str:
    r"""A vocabulary id as OpenAI writes tokens: ASCII as it is, another byte as bytes:\xNN, <eos>."""
    if number < BYTE_OFFSET:
        return _SPECIAL[number]
    byte = number - BYTE_OFFSET
    return chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"


class AnswerDocument:
    """An object of OpenAI's while it is made."""

    def __init__(self, request: CompletionRequest, head: dict[str, Any]) -> None:
        """head: what all of its chunks begin with."""
        self._request, self._head = request, head
        self._new_bytes = self._reused_bytes = 0

    def chunks(self, piece: ChoiceChunk) -> list[dict[str, Any]]:
        """Take the next piece in; returns its chunks of a stream."""
        raise NotImplementedError

    @property
    def document(self) -> dict[str, Any]:
        """The whole answer, when every piece was taken in."""
        raise NotImplementedError

    def _count(self, piece: ChoiceChunk) -> None:
        stats = piece.chunk.stats
        if stats is not None:
            self._new_bytes += stats.new_bytes
            if piece.choice % self._request.n == 0:  # the others go on from it
                self._reused_bytes += stats.reused_bytes

    def _chunk(self, index: int, said: dict[str, Any]) -> dict[str, Any]:
        told = said.pop("blt", None)
        document = {**self._head, "choices": [{"index": index, **said}]}
        if self._request.include_usage:
            document["usage"] = None
        if told is not None:
            document["blt"] = told
        return document

    @property
    def usage(self) -> dict[str, Any]:
        """Bytes: each prompt once, what of them had been read before, and all that was generated, that of
        stop strings included.
        """
        read, made = sum(map(len, self._request.prompts)), self._new_bytes
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": self._reused_bytes},
        }

    @property
    def usage_chunk(self) -> dict[str, Any]:
        """The stream's chunk that has no choice, only the counts."""
        return {**self._head, "choices": [], "usage": self.usage}


class Completion(AnswerDocument):
    """OpenAI's completion object while it is made."""

    def __init__(self, request: CompletionRequest, model: str) -> None:
        """model: its id."""
        super().__init__(request, new_head("cmpl", "text_completion", model))
        self._choices = [_Choice(request, prompt) for prompt in request.prompts for _ in range(request.n)]

    def chunks(self, piece: ChoiceChunk) -> list[dict[str, Any]]:
        """Take the next piece in; returns its chunk of a stream."""
        self._count(piece)
        return [self._chunk(piece.choice, self._choices[piece.choice].add(piece))]

    @property
    def document(self) -> dict[str, Any]:
        """The whole answer, when every piece was taken in."""
        choices = [{"index": index, **choice.whole} for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self.usage}


def new_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """How an object begins. prefix: of its id. kind: what OpenAI calls it. model: the model's id."""
    identity = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}


def reason_of(piece: ChoiceChunk) -> str | None:
    """Why the choice has ended, in OpenAI's words; None while it goes on."""
    reason = piece.chunk.finish_reason
    return None if reason is None else _REASONS.get(reason, "stop")


class _Choice:
    """One choice: what was said of it so far."""

    def __init__(self, request: CompletionRequest, prompt: bytes) -> None:
        self._request, self._prompt = request, prompt
        self._said: list[dict[str, Any]] = []  # nothing in a stream, which has sent it
        self._first = True
        self._offsets = _Offsets()

    def add(self, piece: ChoiceChunk) -> dict[str, Any]:
        """The piece's text, logprobs, finish_reason, and blt where asked."""
        request, chunk, first = self._request, piece.chunk, self._first
        self._first = False
        text = chunk.text
        logprobs: dict[str, list[Any]] | None = None
        if request.options.logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            if first and request.echo:
                _add_logprobs(logprobs, chunk.prompt_details, self._offsets)
                self._offsets.end()
            _add_logprobs(logprobs, chunk.details, self._offsets)
        if first and request.echo:
            text = self._prompt.decode("utf-8", "replace") + text
        said: dict[str, Any] = {"text": text, "logprobs": logprobs, "finish_reason": reason_of(piece)}
        if request.blt_details:
            said["blt"] = blt_part(chunk, first)
        if not request.stream:
            self._said.append(said)
        return dict(said)

    @property
    def whole(self) -> dict[str, Any]:
        said = self._said
        whole: dict[str, Any] = {
            "text": "".join(one["text"] for one in said),
            "logprobs": None,
            "finish_reason": said[-1]["finish_reason"],
        }
        if self._request.options.logprobs is not None:
            whole["logprobs"] = {
                name: [value for one in said for value in one["logprobs"][name]]
                for name in said[0]["logprobs"]
            }
        if self._request.blt_details:
            whole["blt"] = joined_blt([one["blt"] for one in said])
        return whole


# 1. Logprobs, in the format of OpenAI's completions.


class _Offsets:
    """Which character of the text each byte is in; all bytes of one have its offset."""

    def __init__(self) -> None:
        self._utf8, self._characters = Utf8Stream(), 0
        self._pending = b""  # of a character that may come

    def next(self, byte: int) -> int:
        """The offset of the next byte's character, a U+FFFD for what is none."""
        data = bytes([byte])
        self._characters += len(self._utf8.push(data))
        self._pending = (self._pending + data)[-self._utf8.pending :] if self._utf8.pending else b""
        # Bytes that wait may be of two characters already: a half of a surrogate pair never becomes one.
        return self._characters + len(self._pending.decode("utf-8", "replace")) - 1

    def end(self) -> None:
        """What follows begins a new character."""
        self._characters += len(self._utf8.flush())
        self._pending = b""


def _add_logprobs(logprobs: dict[str, list[Any]], details: Iterable[ByteDetail], offsets: _Offsets) -> None:
    for detail in details:
        assert detail.logprob is not None
        token = token_text(detail.byte + BYTE_OFFSET)
        top = {token_text(number): round(logprob, 6) for number, logprob in detail.top}
        logprobs["tokens"].append(token)
        logprobs["token_logprobs"].append(round(detail.logprob, 6))
        logprobs["top_logprobs"].append({**top, token: round(detail.logprob, 6)})
        logprobs["text_offset"].append(offsets.next(detail.byte))


# 2. What only this server tells.


def blt_part(chunk: GenerationChunk, first: bool) -> dict[str, Any]:
    """Of one piece. first: whether it is its choice's first."""
    told: dict[str, Any] = {"bytes": [_byte(detail) for detail in chunk.details]}
    if first:
        told["prompt"] = [_byte(detail) for detail in chunk.prompt_details]
    if chunk.stats is not None:
        told["stats"] = {name: getattr(chunk.stats, name) for name in _FIGURES}
        told["stats"]["patches"] = chunk.stats.text_patches
        # The runtime's reason, which tells eos from stop and context from length.
        told["finish_reason"] = chunk.finish_reason
    return told


def joined_blt(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a whole choice."""
    return {**parts[0], **parts[-1], "bytes": [byte for part in parts for byte in part["bytes"]]}


def _byte(detail: ByteDetail) -> dict[str, Any]:
    return {
        "byte": detail.byte,
        "position": detail.position,
        "starts_patch": detail.starts_patch,
        "entropy": None if detail.entropy is None else round(detail.entropy, 6),
        "guessed": detail.guessed,
    }
