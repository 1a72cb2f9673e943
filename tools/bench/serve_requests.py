"""Requests to a server: as usual, of a client that leaves, malformed; and whether the answer was right."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from ...runtime import BltModel, GenerationOptions

__all__ = ["MALFORMED", "Case", "Outcome", "ask", "ask_and_leave", "ask_malformed", "make_cases"]

_PROMPTS = (
    "Once upon a time",
    "It was",
    "def main():\n",
    "Größe: Ærø",
    "人人生而自由",
    "",
    "7 + 5 =",
    "The cat\n\n",
)
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"temperature": 0.8, "top_k": 40, "repetition_penalty": 1.1, "seed": 3},
    {"temperature": 0, "draft": "none"},
)
_COMPLETIONS = "/v1/completions"
_MOST_TRIES = 60

MALFORMED: tuple[tuple[bytes, str], ...] = (
    (b'{"prompt": "Once"', "application/json"),
    (b'{"prompt": "Once", "temperature": NaN}', "application/json"),
    (b'{"prompt": "Once", "max_tokens": -1}', "application/json"),
    (b'{"prompt": "Once", "best": 1}', "application/json"),
    (b'{"prompt": "\xff\xfe"}', "application/json"),
    (b'{"prompt": ' + b"[" * 50_000, "application/json"),
    (b'{"prompt": {"a": 1}, "stream": true}', "application/json"),
    (b"prompt=Once", "application/x-www-form-urlencoded"),
    (b"", "application/json"),
    (b'{"prompt": "Once", "n": 1000000000}', "application/json"),
)
"""Bodies and content types; the answer to each is 400 and says what is wrong."""


@dataclass(frozen=True)
class Case:
    """A request and the text that is right."""

    document: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    right: bool
    """The answer is what it has to be."""
    seconds: float
    """Until its end, times of waiting to come again included."""
    refused: int = 0
    """Times it was told to come again."""
    said: str = ""
    """The answer, where it was wrong."""


def make_cases(model: BltModel, new_bytes: int) -> list[Case]:
    """Every prompt with every choice of options, answered in this process."""
    cases = []
    for prompt in _PROMPTS:
        for options in _OPTIONS:
            text = model.generate(prompt, GenerationOptions(new_bytes, **options)).text
            cases.append(Case({"prompt": prompt, "max_tokens": new_bytes, **options}, text))
    return cases


async def ask(client: httpx.AsyncClient, case: Case, *, stream: bool) -> Outcome:
    """Ask as OpenAI's client does, again when the server says so; the answer is compared."""
    started, refused = time.perf_counter(), 0
    while True:
        answer = await client.post(_COMPLETIONS, json={**case.document, "stream": stream})
        if answer.status_code != 429 or refused == _MOST_TRIES:
            break
        refused += 1
        await asyncio.sleep(float(answer.headers["Retry-After"]))
    text = _text(answer, stream)
    said = "" if text == case.text else f"{answer.status_code} {answer.text[:200]!r} for {case.document}"
    return Outcome(text == case.text, time.perf_counter() - started, refused, said)


def _text(answer: httpx.Response, stream: bool) -> str | None:
    if answer.status_code != 200:
        return None
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    lines = [line for line in answer.text.splitlines() if line]
    if lines[-1] != "data: [DONE]":
        return None
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])


async def ask_and_leave(client: httpx.AsyncClient, case: Case, *, stream: bool) -> Outcome:
    """Ask for eight times the text, and close the connection: after a few events, or a third of a second."""
    document = {**case.document, "max_tokens": 8 * case.document["max_tokens"], "stream": stream}
    started = time.perf_counter()
    try:
        async with client.stream(
            "POST", _COMPLETIONS, json=document, timeout=5.0 if stream else 0.3
        ) as answer:
            if answer.status_code == 429:
                return Outcome(True, time.perf_counter() - started, 1)
            read = 0
            async for line in answer.aiter_lines():
                read += line.startswith("data: {")
                if read == 5:
                    break
            right = answer.status_code == 200
    except httpx.TimeoutException:  # leaves while it waits for its turn, or for the whole answer
        right = True
    return Outcome(right, time.perf_counter() - started, said="" if right else "a stream did not begin")


async def ask_malformed(client: httpx.AsyncClient, request: tuple[bytes, str]) -> Outcome:
    """Send what is no request; right is a 400 with an error that has a message and a code."""
    body, kind = request
    started = time.perf_counter()
    answer = await client.post(_COMPLETIONS, content=body, headers={"Content-Type": kind})
    seconds = time.perf_counter() - started
    try:
        error = answer.json()["error"]
        right = answer.status_code == 400 and bool(error["message"] and error["code"])
    except (ValueError, KeyError):
        right = False
    return Outcome(right, seconds, said="" if right else f"{answer.status_code} {answer.text[:200]!r}")
