"""Does a server's memory level off, whatever is asked of it for half an hour?

Theory: a request may leave something behind for good (a leak), or only until its kind has been seen at its
largest (caches, the allocator's free lists). The second ends, the first does not: so the server's own memory
in the last third of the run is held against that of the third before it, medians of both. What grows by more
than 1 % (1 MB at least) from one to the other has not levelled off. Its own is what belongs to no file: pages
of weights are in memory once they were read, as many as the files have and no more. What requests take while
they are answered would hide that, tens of megabytes that come and go: so nobody asks for anything when memory
is looked at, and the server has given back what it had to give (`--busy` looks at it in full work instead).
What the server keeps of texts fills its budget first (`--cache-memory`, a small one by default), and must
never be more.

Requests are of random kinds and lengths: whole and streamed texts, long prompts, stop strings, logprobs,
several choices, conversations that send everything again; clients that leave midway, never read, send half a
body, end their half, or connect and say nothing; bodies that are no requests, paths that are none, and the
page. `--clients` of them at a time, over loopback, the same ones for the same `--seed`. Statuses are checked,
texts are not: `serve_load` does that.
Prints the server's own and resident memory after each `--every` requests, then a verdict, and exits 1 when
memory has not levelled off or a status was wrong. `--parallel` is the server's.

    python -m blt_edge.tools.bench.soak --bundle demo-bundle --minutes 30
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import anyio
import httpx

from ...runtime.host import size_in
from ..profile.statistics import machine
from .common import options, print_json
from .serve_load import COMPLETIONS, MALFORMED, figures, serving

_LOOKS = 20
"""Samples of memory in each `--every` requests."""
_FEWEST = 30
"""Samples that a verdict needs."""
_WORDS = ("the", "quick", "fox", "Größe", "人人生而自由", "يولد", "جميع", "12,345", "def f():\n", "\n\n")
_PATIENCE = 120.0
_RELEASE_SECONDS = 2.1
"""After which the end of a text makes the server give freed memory back."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=int, default=1000, help="requests between two lines")
    parser.add_argument("--clients", type=int, default=8, help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, help="end after so many, if that is sooner")
    parser.add_argument("--cache-memory", default="50MB", help="of the server")
    parser.add_argument("--parallel", type=int, help="of the server")
    parser.add_argument("--busy", action="store_true", help="look at memory while requests are answered")
    args = parser.parse_args()
    print(f"{machine()}; {args.bundle}; {args.minutes:g} minutes, {args.clients} clients, seed {args.seed}")
    plan = Plan(args.minutes, args.every, args.clients, args.seed, args.requests, args.busy)
    asked = ["--cache-memory", args.cache_memory]
    asked += [] if args.parallel is None else ["--parallel", str(args.parallel)]
    process: list[int] = []
    with serving(args.bundle, args.threads, *asked, started=process.append) as url:
        soak = asyncio.run(_soak(url, plan, partial(_own_memory, process[0])))
    verdict, level = judged(soak.memory)
    wrong = f"{soak.wrong} answered wrongly"
    print(
        f"kept of texts: at most {max(soak.kept) / 1e6:.1f} MB of {soak.budget / 1e6:.1f} MB, "
        f"{soak.reused / 1e6:.2f} MB of prompts not read again"
    )
    print(f"{soak.requests} requests in {soak.seconds / 60:.1f} minutes: {wrong}; {verdict}")
    print_json(
        {
            **{"benchmark": "soak", "bundle": str(args.bundle), "seed": args.seed, "requests": soak.requests},
            **{"busy": args.busy, "parallel": args.parallel, "cache_memory": args.cache_memory},
            **{"seconds": soak.seconds, "kinds": dict(soak.kinds), "wrong": soak.wrong},
            **{"own_mb": soak.memory, "resident_mb": soak.resident},
            **{"levelled_off": level, "most_kept_bytes": max(soak.kept)},
        }
    )
    sys.exit(0 if level and not soak.wrong and max(soak.kept) <= soak.budget else 1)


def judged(memory: list[float]) -> tuple[str, bool]:
    """A line about samples of memory, in MB, and whether they have levelled off."""
    if len(memory) < _FEWEST:
        return f"too short to tell whether memory levels off ({len(memory)} samples of {_FEWEST})", False
    third = len(memory) // 3
    before, last = median(memory[third : 2 * third]), median(memory[2 * third :])
    level = last - before <= max(1.0, before / 100)
    said = "memory has levelled off" if level else "memory has NOT levelled off"
    return f"{said}: {before:.1f} MB in the second third, {last:.1f} MB in the last", level


@dataclass(frozen=True)
class Plan:
    """How long is asked, how much, and when memory is looked at."""

    minutes: float
    every: int
    """Requests between two lines."""
    clients: int
    seed: int = 0
    most: int | None = None
    """Requests."""
    busy: bool = False
    """Look while requests are answered."""

    @property
    def look(self) -> int:
        """Requests between two looks."""
        return max(1, self.every // _LOOKS)


class Pause:
    """Lets clients ask, but now and then nobody."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # of pauses, which come in the order in which they were asked for
        self._over = asyncio.Event()
        self._quiet = asyncio.Event()
        self._over.set()
        self._quiet.set()
        self._asking = 0

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """One request, which begins when there is no pause."""
        while not self._over.is_set():
            await self._over.wait()
        self._asking += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._asking -= 1
            if not self._asking:
                self._quiet.set()

    @contextlib.asynccontextmanager
    async def nobody(self) -> AsyncIterator[None]:
        """A pause, from the end of what is asked now."""
        async with self._turn:
            self._over.clear()
            try:
                await self._quiet.wait()
                yield
            finally:
                self._over.set()


@dataclass
class Soak:
    """What was asked, and what came of it."""

    requests: int = 0
    wrong: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    """Of the server's own, in MB, at equal distances in requests."""
    resident: list[float] = field(default_factory=list)
    """With pages of files, likewise."""
    kept: list[float] = field(default_factory=lambda: [0.0])
    """Bytes that the server says its states take, at the same moments."""
    budget: float = 0.0
    """Bytes that they may take."""
    reused: float = 0.0
    """Bytes of prompts that were not read again, in the end."""

    def look(self, now: dict[str, float], own: int) -> None:
        """Take in what /metrics says, and the bytes of the server's own memory."""
        self.memory.append(own / 1e6)
        self.resident.append(now["process_resident_memory_bytes"] / 1e6)
        self.kept.append(now["blt_edge_prefix_memory_bytes"])
        self.budget = now["blt_edge_prefix_memory_limit_bytes"]
        self.reused = now["blt_edge_prefix_reused_bytes_total"]


def _own_memory(process: int) -> int:
    """Bytes that a process has in memory and that belong to no file."""
    size = size_in(Path(f"/proc/{process}/status"), "RssAnon:")
    if size is None:
        raise SystemExit("the server's memory can't be seen here: this needs Linux")
    return size


async def _soak(url: str, plan: Plan, own: Callable[[], int]) -> Soak:
    """own: the server's own memory in bytes."""
    soak, source, started, pause = Soak(), random.Random(plan.seed), time.monotonic(), Pause()
    # The server closes what says nothing for five seconds, which should not meet a request on its way.
    limits = httpx.Limits(keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE, limits=limits) as client:
        positions = (await client.get("/v1/models")).json()["data"][0]["blt"]["max_positions"]

        async def look(number: int) -> None:
            async with contextlib.nullcontext() if plan.busy else pause.nobody():
                soak.look(await (figures if plan.busy else _at_rest)(client), own())
                if number % plan.every == 0:
                    said = f"{number:>7} requests, {(time.monotonic() - started) / 60:5.1f} minutes"
                    memory = f"{soak.memory[-1]:.1f} MB, with pages of files {soak.resident[-1]:.1f} MB"
                    print(f"{said}: {memory}", flush=True)

        async def work() -> None:
            while time.monotonic() < started + 60 * plan.minutes and (
                plan.most is None or soak.requests < plan.most
            ):
                kind, ask = source.choice(_KINDS)
                asking = Client(client, url, positions, random.Random(source.random()))
                async with pause.asking():
                    try:
                        right, said = await ask(asking), ""
                    except (httpx.HTTPError, OSError, TimeoutError) as error:
                        right, said = False, f": {type(error).__name__} {error}"
                soak.requests += 1
                number = soak.requests  # others are counted while this one looks at the memory
                soak.kinds[kind] += 1
                soak.wrong += not right
                if not right:
                    print(f"wrong: {kind}, request {number}{said}", flush=True)
                if not (number % plan.look and number % plan.every):
                    await look(number)

        await asyncio.gather(*(work() for _ in range(plan.clients)))
    soak.seconds = time.monotonic() - started
    return soak


async def _at_rest(client: httpx.AsyncClient) -> dict[str, float]:
    """What the server says of itself when it has ended all texts and given freed memory back."""
    with anyio.fail_after(_PATIENCE):
        while (now := await figures(client))["blt_edge_texts_at_work"] or now["blt_edge_queue_length"]:
            await asyncio.sleep(0.05)  # texts of clients that have left
    await asyncio.sleep(_RELEASE_SECONDS)
    await client.post(COMPLETIONS, json={"prompt": "", "max_tokens": 1, "seed": 0})
    await asyncio.sleep(0.1)  # the answer is sent before memory is given back
    return await figures(client)


# Kinds of requests; each returns whether it was answered as it has to be.


@dataclass
class Client:
    """One request's way to the server, and its dice."""

    http: httpx.AsyncClient
    url: str
    positions: int
    """Of the model."""
    dice: random.Random

    def text(self, most: int) -> str:
        """Words of many scripts, of at most so many bytes."""
        size = self.dice.randint(0, most)
        words = self.dice.choices(_WORDS, k=size // 3 + 1)
        return " ".join(words).encode()[:size].decode(errors="ignore")

    def document(self, **fields: Any) -> dict[str, Any]:
        """A request of a usual kind."""
        dice = self.dice
        sampling = {"temperature": dice.choice([0, 0.7, 1]), "top_p": dice.choice([1, 0.9])}
        usual = {"prompt": self.text(60), "max_tokens": dice.randint(1, 60), "seed": dice.randint(0, 99)}
        return {**usual, **sampling, **fields}

    async def post(self, status: int = 200, **fields: Any) -> bool:
        answer = await self.http.post(COMPLETIONS, json=self.document(**fields))
        whole = not fields.get("stream") or answer.text.endswith("data: [DONE]\n\n")
        return answer.status_code == 429 or (answer.status_code == status and whole)

    async def by_hand(self, sent: bytes, *, end: bool = False, rest: bool = False) -> bytes:
        """Send bytes on a connection of its own, and leave; `end` its half before, or read the `rest`."""
        url = httpx.URL(self.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        try:
            writer.write(sent)
            await writer.drain()
            if end:
                writer.write_eof()
            if rest:
                return await asyncio.wait_for(reader.read(), _PATIENCE)
            await asyncio.sleep(self.dice.uniform(0, 1))
            return b""
        finally:
            writer.transport.abort()

    def request(self, **fields: Any) -> bytes:
        """A whole request as bytes."""
        body = json.dumps(self.document(**fields)).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _long(client: Client) -> bool:
    most = client.positions * 3 // 4
    if client.dice.random() >= 0.1:
        most = min(most, 1000)
    return await client.post(prompt=client.text(most), max_tokens=4)


async def _conversation(client: Client) -> bool:
    right, text = True, client.text(min(400, client.positions // 4))
    for _ in range(client.dice.randint(2, 5)):
        if len(text.encode()) + 20 >= client.positions:
            break
        asked = client.document(prompt=text, max_tokens=20)
        answer = await client.http.post(COMPLETIONS, json=asked)
        right = right and answer.status_code in (200, 429)
        if answer.status_code == 200:
            text += answer.json()["choices"][0]["text"] + client.text(40)
    return right


async def _leaves(client: Client) -> bool:
    asked = client.document(max_tokens=400, stream=client.dice.random() < 0.5)
    patience = client.dice.uniform(0.05, 0.5)
    with contextlib.suppress(httpx.TimeoutException):
        await client.http.post(COMPLETIONS, json=asked, timeout=patience)
    return True


async def _malformed(client: Client) -> bool:
    body, kind = client.dice.choice(MALFORMED)
    answer = await client.http.post(COMPLETIONS, content=body, headers={"Content-Type": kind})
    return answer.status_code == 400


async def _half_a_body(client: Client) -> bool:
    whole = client.request(prompt=client.text(20_000))
    await client.by_hand(whole[: client.dice.randint(1, len(whole) - 1)])
    return True


async def _unread(client: Client) -> bool:
    await client.by_hand(client.request(max_tokens=300, stream=True, logprobs=20))
    return True


async def _half_closed(client: Client) -> bool:
    return b"HTTP/1.1 200 " in await client.by_hand(client.request(), end=True, rest=True)


async def _idle(client: Client) -> bool:
    await asyncio.gather(*(client.by_hand(b"GET /"[: client.dice.randint(0, 5)]) for _ in range(20)))
    return True


async def _path(client: Client) -> bool:
    path, status = client.dice.choice(
        [
            ("/", 200),
            ("/page.js", 200),
            ("/healthz", 200),
            ("/v1/models", 200),
            (f"/{quote(client.text(30))}x", 404),
        ]
    )
    return (await client.http.get(path)).status_code == status


_KINDS: tuple[tuple[str, Callable[[Client], Awaitable[bool]]], ...] = (
    *[("whole", lambda client: client.post())] * 4,
    *[("stream", lambda client: client.post(stream=True))] * 4,
    ("long prompt", _long),
    *[("conversation", _conversation)] * 2,
    ("stops", lambda client: client.post(stop=["e", " the", "\n", "zz", "1", "人", "?", "!"])),
    ("logprobs", lambda client: client.post(logprobs=20, echo=True, blt_details=True)),
    ("choices", lambda client: client.post(n=3, stream=True)),
    ("leaves", _leaves),
    ("malformed", _malformed),
    ("half a body", _half_a_body),
    ("unread", _unread),
    ("half-closed", _half_closed),
    ("idle", _idle),
    ("path", _path),
)


if __name__ == "__main__":
    main()
