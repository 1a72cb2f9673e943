"""What several clients of one server gain from each other, and what they cost each other.

Theory: a pass over the new bytes of eight texts costs little more than one over those of one, so eight
clients get more bytes a second in all than one that asks for the same texts in turn. And a prompt is read in
chunks, between which others have their turn: who comes meanwhile waits for a chunk, not for the prompt, and
who is being answered for one stage of it. The server keeps no states here, so that the same prompt is read
each time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from itertools import chain, pairwise
from statistics import median
from typing import Any

import httpx

from ..profile.statistics import Spread

__all__ = ["CHUNK", "measure_reading", "measure_together"]

COMPLETIONS = "/v1/completions"
CHUNK = 256
"""Bytes of a prompt that one pass takes, as `BltModel.load` has it."""

# 1. Bytes a second.


async def measure_together(
    client: httpx.AsyncClient, text: str, *, clients: int, lengths: list[int], new_bytes: int, rounds: int
) -> list[dict[str, Any]]:
    """As many texts as clients, asked for by one client in turn and by all at once, in pairs."""
    told = []
    for length in lengths:
        for draft in ("auto", "none"):
            step = max(1, (len(text) - length) // clients)
            prompts = [text[step * number :][:length] for number in range(clients)]
            rates: dict[int, list[float]] = {1: [], clients: []}
            for number in range(rounds + 1):  # the first prepares what is prepared once
                for at_once in rates:
                    rate = await _rate(client, prompts, draft, new_bytes, at_once)
                    if number:
                        rates[at_once].append(rate)
            gain = Spread.of([many / one for one, many in zip(*rates.values(), strict=True)])
            print(
                f"prompts of {length} bytes, {new_bytes} new ones, draft {draft}: one client "
                f"{Spread.of(rates[1])} bytes a second, {clients} clients {Spread.of(rates[clients])}, "
                f"{gain} times as many",
                flush=True,
            )
            case = {"prompt_bytes": length, "new_bytes": new_bytes, "draft": draft, "rates": rates}
            told.append({**case, "gain": gain.median})
    return told


async def _rate(
    client: httpx.AsyncClient, prompts: list[str], draft: str, new_bytes: int, at_once: int
) -> float:
    """New bytes of all prompts a second, so many of them at a time."""
    waiting, made = iter(prompts), []

    async def work() -> None:
        for prompt in waiting:
            asked = {"prompt": prompt, "max_tokens": new_bytes, "temperature": 0, "draft": draft}
            answer = await client.post(COMPLETIONS, json=asked)
            made.append(answer.raise_for_status().json()["usage"]["completion_tokens"])

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return float(sum(made)) / (time.perf_counter() - started)


# 2. A long prompt among others.


async def measure_reading(
    client: httpx.AsyncClient, text: str, *, length: int, rounds: int
) -> dict[str, Any]:
    """What others notice of a prompt of `length` bytes: the first byte of a short request that comes while it
    is read, and the largest gap between two pieces of an answer, both in times of a chunk."""
    prompt, short = text[:length], text[-64:]
    chunks, firsts, gaps, slowed = [], [], [], []
    await _whole(client, prompt, 1)
    for _ in range(rounds):
        before = await _whole(client, prompt, 1)
        # Short requests, one after the other.
        reading, came = asyncio.create_task(_whole(client, prompt, 1)), []
        await asyncio.sleep(2 * CHUNK / length * before)
        while not reading.done():
            seconds = await _first_byte(client, short)
            if not reading.done():
                came.append(seconds)
            await asyncio.sleep(CHUNK / length * before / 2)
        among = await reading
        between = await _gaps(client, prompt, short, CHUNK / length * before)
        # The machine's pace changes: what is compared was measured around it.
        alone = (before + await _whole(client, prompt, 1)) / 2
        chunk = CHUNK / length * alone
        chunks.append(chunk)
        slowed.append(among / alone)
        firsts.append([one / chunk for one in came])
        gaps.append([one / chunk for one in between])
    milliseconds = Spread.of([1000 * one for one in chunks])
    print(
        f"a prompt of {length} bytes, alone: {milliseconds} ms a chunk of {CHUNK}\n"
        f"meanwhile, first byte of {sum(map(len, firsts))} short requests, in chunks: median "
        f"{median(chain(*firsts)):.2f}, largest of a round {Spread.of([max(one) for one in firsts])}\n"
        f"meanwhile, {sum(map(len, gaps))} gaps between pieces of an answer, in chunks: median "
        f"{median(chain(*gaps)):.2f}, largest of a round {Spread.of([max(one) for one in gaps])}\n"
        f"the prompt itself took {Spread.of(slowed)} times as long among short requests",
        flush=True,
    )
    return {
        "prompt_bytes": length,
        "chunk_ms": [1000 * one for one in chunks],
        "first_byte_chunks": firsts,
        "gap_chunks": gaps,
        "slowed": slowed,
    }


async def _gaps(client: httpx.AsyncClient, prompt: str, short: str, chunk: float) -> list[float]:
    """Seconds between pieces of a streamed answer while the prompt is read."""
    times: list[float] = []
    asked = {
        "prompt": short,
        "max_tokens": 4000,
        "temperature": 0.7,
        "seed": 1,
        "draft": "none",
        "stream": True,
    }
    reading: asyncio.Task[float] | None = None
    async for _ in _pieces(client, asked):
        if reading is None and len(times) == 0:
            reading = asyncio.create_task(_whole(client, prompt, 1))
            since = time.perf_counter() + chunk  # by then it is being read
        now = time.perf_counter()
        if reading is not None and reading.done():
            break
        if now > since:
            times.append(now)
    assert reading is not None
    await reading
    return [after - before for before, after in pairwise(times)]


async def _whole(client: httpx.AsyncClient, prompt: str, new_bytes: int) -> float:
    """Seconds that an answer takes."""
    started = time.perf_counter()
    asked = {"prompt": prompt, "max_tokens": new_bytes, "temperature": 0, "draft": "none"}
    (await client.post(COMPLETIONS, json=asked)).raise_for_status()
    return time.perf_counter() - started


async def _first_byte(client: httpx.AsyncClient, prompt: str) -> float:
    """Seconds until a streamed answer's first piece."""
    started, seconds = time.perf_counter(), 0.0
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
    async for _ in _pieces(client, asked):
        seconds = seconds or time.perf_counter() - started
    return seconds


async def _pieces(client: httpx.AsyncClient, asked: dict[str, Any]) -> AsyncIterator[str]:
    async with client.stream("POST", COMPLETIONS, json=asked) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield str(json.loads(line[6:])["choices"][0]["text"])
