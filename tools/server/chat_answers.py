"""Pieces of text as OpenAI's chat objects, whole or as server-sent events."""

from __future__ import annotations

from typing import Any

from ...runtime import ByteDetail
from ...runtime.vocabulary import BYTE_OFFSET
from .answers import AnswerDocument, blt_part, joined_blt, new_head, reason_of, token_text
from .requests import CompletionRequest
from .service import ChoiceChunk


class ChatCompletion(AnswerDocument):
    """OpenAI's chat completion object while it is made."""

    def __init__(self, request: CompletionRequest, model: str) -> None:
        """model: its id."""
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__(request, new_head("chatcmpl", kind, model))
        self._said: list[list[dict[str, Any]]] = [[] for _ in range(request.n)]
        self._begun: set[int] = set()

    def chunks(self, piece: ChoiceChunk) -> list[dict[str, Any]]:
        """Take the next piece in; returns its chunks of a stream: who speaks, where it is a choice's first,
        its text, and why the choice has ended."""
        self._count(piece)
        chunk, index, reason = piece.chunk, piece.choice, reason_of(piece)
        first = index not in self._begun
        self._begun.add(index)
        logprobs = None
        if self._request.options.logprobs is not None:
            logprobs = {"content": list(map(_logprob, chunk.details)), "refusal": None}
        said: dict[str, Any] = {"text": chunk.text, "logprobs": logprobs, "finish_reason": reason}
        if self._request.blt_details:
            said["blt"] = blt_part(chunk, first)
        if not self._request.stream:
            self._said[index].append(said)
            return []
        return [self._chunk(index, part) for part in _parts(said, first)]

    @property
    def document(self) -> dict[str, Any]:
        """The whole answer, when every piece was taken in."""
        choices = [{"index": index, **self._whole(said)} for index, said in enumerate(self._said)]
        return {**self._head, "choices": choices, "usage": self.usage}

    def _whole(self, said: list[dict[str, Any]]) -> dict[str, Any]:
        text = "".join(one["text"] for one in said)
        whole: dict[str, Any] = {
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": said[-1]["finish_reason"],
        }
        if self._request.options.logprobs is not None:
            content = [one for part in said for one in part["logprobs"]["content"]]
            whole["logprobs"] = {"content": content, "refusal": None}
        if self._request.blt_details:
            whole["blt"] = joined_blt([one["blt"] for one in said])
        return whole


def _parts(said: dict[str, Any], first: bool) -> list[dict[str, Any]]:
    """The choices of a piece's chunks. What is told of bytes goes with their text, or else with the end."""
    parts: list[dict[str, Any]] = []
    nothing = {"logprobs": None, "finish_reason": None}
    if first:
        parts.append({"delta": {"role": "assistant", "content": "", "refusal": None}, **nothing})
    logprobs, reason = said["logprobs"], said["finish_reason"]
    if said["text"] or (logprobs and logprobs["content"]):
        parts.append({"delta": {"content": said["text"]}, "logprobs": logprobs, "finish_reason": None})
    if reason is not None:
        parts.append({"delta": {}, "logprobs": None, "finish_reason": reason})
    if "blt" in said:
        if not parts:
            parts.append({"delta": {}, **nothing})
        parts[-1]["blt"] = said["blt"]
    return parts


def _logprob(detail: ByteDetail) -> dict[str, Any]:
    assert detail.logprob is not None
    top = [_token(number, logprob) for number, logprob in detail.top]
    return {**_token(detail.byte + BYTE_OFFSET, detail.logprob), "top_logprobs": top}


def _token(number: int, logprob: float) -> dict[str, Any]:
    """A vocabulary id; those that end texts have no bytes."""
    byte = number - BYTE_OFFSET
    return {"token": token_text(number), "logprob": round(logprob, 6), "bytes": [byte] if byte >= 0 else None}
