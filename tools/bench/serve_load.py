"""Does a server stay right, and of one size, when much is asked of it at once and for long?

Theory: a few texts are at work at a time, so requests wait, and those that find the queue full are told to
come again. A client that leaves must free its place, a malformed request must cost nothing, and memory must
not depend on how many requests there were. Every answer is compared with what the same model makes here.

`--show load`, the usual: first `--concurrent` requests at once: a third as usual, half of them streamed; a
third whose client leaves midway; a third malformed. Then `--requests` short ones, eight at a time, with the
server's resident memory after each `--every`. `--show long`: so many clients of these three kinds for
`--minutes`, with the server's memory, files and threads. `--show together` and `--show reading` take prompts
from `--text`; `serve_together` says what they show. All over loopback. Exits 1 when an answer was wrong, or
something has grown.

    python -m blt_edge.tools.bench.serve_load --bundle demo-bundle
    python -m blt_edge.tools.bench.serve_load --bundle demo-bundle --show long --minutes 10
    python -m blt_edge.tools.bench.serve_load --bundle demo-bundle --show together --text tests/data/alice.txt
    python -m blt_edge.tools.bench.serve_load --bundle demo-bundle --show reading --text tests/data/alice.txt
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from ...runtime import BltModel, GenerationOptions
from ..profile.statistics import Latency, machine
from .common import options, print_json
from .serve_together import measure_reading, measure_together

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
COMPLETIONS = "/v1/completions"
_MOST_TRIES = 60
_AT_A_TIME = 8
# States of texts that clients have left fill what there is for them: that should be over soon.
_KEPT = "20MB"

# Bodies and content types; the answer to each is 400 and says what is wrong.
_JSON = "application/json"
MALFORMED: tuple[tuple[bytes, str], ...] = (
    (b'{"prompt": "Once"', _JSON),
    (b'{"prompt": "Once", "temperature": NaN}', _JSON),
    (b'{"prompt": "Once", "max_tokens": -1}', _JSON),
    (b'{"prompt": "Once", "best": 1}', _JSON),
    (b'{"prompt": "\xff\xfe"}', _JSON),
    (b'{"prompt": ' + b"[" * 50_000, _JSON),
    (b'{"prompt": {"a": 1}, "stream": true}', _JSON),
    (b"prompt=Once", "application/x-www-form-urlencoded"),
    (b"", _JSON),
    (b'{"prompt": "Once", "n": 1000000000}', _JSON),
)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--new-bytes", type=int, default=48, help="of a request")
    parser.add_argument("--show", choices=("load", "long", "together", "reading"), default="load")
    parser.add_argument("--minutes", type=float, default=10.0, help="of --show long")
    parser.add_argument("--text", type=Path, help="prompts of --show together and reading")
    parser.add_argument("--prompt-bytes", type=int, nargs="+", help="of those prompts")
    parser.add_argument("--clients", type=int, default=8, help="of --show together")
    parser.add_argument("--rounds", type=int, default=3, help="of --show together and reading")
    args = parser.parse_args()
    if args.show in ("together", "reading"):
        if args.text is None:
            parser.error(f"--show {args.show} needs --text FILE, from which prompts are taken")
        _show_others(args)
        return
    model = BltModel.load(args.bundle, threads=args.threads)
    started = time.perf_counter()
    # Every prompt with every choice of options, answered in this process.
    questions = [
        Question(
            {"prompt": prompt, "max_tokens": args.new_bytes, **choices},
            model.generate(prompt, GenerationOptions(args.new_bytes, **choices)).text,
        )
        for prompt in _PROMPTS
        for choices in _OPTIONS
    ]
    here = len(questions) / (time.perf_counter() - started)
    print(
        f"{machine()}; {args.bundle}; {len(questions)} different requests of {args.new_bytes} bytes, "
        f"{here:.1f} a second in this process"
    )
    del model
    server: list[int] = []
    kept = ("--cache-memory", _KEPT) if args.show == "long" else ()
    with serving(args.bundle, args.threads, *kept, started=server.append) as url:
        document = asyncio.run(_measure(url, questions, args, server[0]))
    head = {"benchmark": "serve_load", "bundle": str(args.bundle), "in_process_per_second": here}
    print_json({**head, **document})
    wrong = sum(phase["wrong"] for phase in document.values())
    if wrong or not all(
        phase.get("idle_after", True) and phase.get("flat", True) for phase in document.values()
    ):
        sys.exit(1)


def _show_others(args: argparse.Namespace) -> None:
    text = args.text.read_text("utf-8")

    async def measure(url: str) -> Any:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            if args.show == "reading":
                length = (args.prompt_bytes or [8000])[0]
                return await measure_reading(client, text, length=length, rounds=args.rounds)
            lengths = args.prompt_bytes or [64, 300]
            return await measure_together(
                client,
                text,
                clients=args.clients,
                lengths=lengths,
                new_bytes=args.new_bytes,
                rounds=args.rounds,
            )

    print(f"{machine()}; {args.bundle}; {args.threads} threads", flush=True)
    with serving(args.bundle, args.threads, "--cache-memory", "0") as url:
        found = asyncio.run(measure(url))
    print_json({"benchmark": "serve_load", "bundle": str(args.bundle), args.show: found})


@contextmanager
def serving(
    bundle: Path, threads: int, *others: str, started: Callable[[int], None] = lambda process: None
) -> Iterator[str]:
    """A server in a process of its own on a free port; its address. What it has to say shows on stderr.

    others: more arguments of `serve`. started: gets the process's number.
    """
    program = "from blt_edge.tools.cli import main; main()"
    command = ["serve", "-m", str(bundle), "--port", "0", "-q", "--threads", str(threads), *others]
    with subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise SystemExit("the server did not start")
        started(server.pid)
        try:
            yield url
        finally:
            server.terminate()
    if server.returncode != 0:
        raise SystemExit(f"the server ended with code {server.returncode}")


async def _measure(
    url: str, questions: list[Question], args: argparse.Namespace, process: int
) -> dict[str, Any]:
    # The server closes what says nothing for five seconds, which should not meet a request on its way.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=_AT_A_TIME, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        if args.show == "long":
            return {"long": await _long(client, questions, args.concurrent, args.minutes, process)}
        at_once = await _at_once(client, questions, args.concurrent)
        later = await _one_after_another(client, questions, args.requests, args.every)
    return {"at_once": at_once, "one_after_another": later}


# 1. Requests, and whether the answer was right.


@dataclass(frozen=True)
class Question:
    """A request and the text that is right."""

    document: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Reply:
    """What became of a request."""

    right: bool
    """The answer is what it has to be."""
    seconds: float
    """Until its end, times of waiting to come again included."""
    refused: int = 0
    """Times it was told to come again."""
    said: str = ""
    """The answer, where it was wrong."""


async def _ask(client: httpx.AsyncClient, question: Question, *, stream: bool) -> Reply:
    """Ask as OpenAI's client does, again when the server says so; the answer is compared."""
    started, refused = time.perf_counter(), 0
    while True:
        answer = await client.post(COMPLETIONS, json={**question.document, "stream": stream})
        if not _comes_again(answer) or refused == _MOST_TRIES:
            break
        refused += 1
        await asyncio.sleep(float(answer.headers["Retry-After"]))
    right = _text(answer, stream) == question.text
    said = "" if right else f"{answer.status_code} {answer.text[:200]!r} for {question.document}"
    return Reply(right, time.perf_counter() - started, refused, said)


def _comes_again(answer: httpx.Response) -> bool:
    """Whether the server is busy: the queue is full, or the request's turn did not come in time."""
    return answer.status_code in (429, 503) and "Retry-After" in answer.headers


def _text(answer: httpx.Response, stream: bool) -> str | None:
    if answer.status_code != 200:
        return None
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    lines = [line for line in answer.text.splitlines() if line]
    if lines[-1] != "data: [DONE]":
        return None
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])


async def _ask_and_leave(client: httpx.AsyncClient, question: Question, *, stream: bool) -> Reply:
    """Ask for eight times the text, and close the connection: after a few events, or a third of a second."""
    longer = {"max_tokens": 8 * question.document["max_tokens"], "stream": stream}
    document, patience = {**question.document, **longer}, 5.0 if stream else 0.3
    started = time.perf_counter()
    try:
        async with client.stream("POST", COMPLETIONS, json=document, timeout=patience) as answer:
            if _comes_again(answer):
                return Reply(True, time.perf_counter() - started, 1)
            read = 0
            async for line in answer.aiter_lines():
                read += line.startswith("data: {")
                if read == 5:
                    break
            right = answer.status_code == 200
    except httpx.TimeoutException:  # leaves while it waits for its turn, or for the whole answer
        right = True
    return Reply(right, time.perf_counter() - started, said="" if right else "a stream did not begin")


async def _ask_malformed(client: httpx.AsyncClient, body: bytes, kind: str) -> Reply:
    """Send what is no request; right is a 400 with an error that has a message and a code."""
    started = time.perf_counter()
    answer = await client.post(COMPLETIONS, content=body, headers={"Content-Type": kind})
    seconds = time.perf_counter() - started
    try:
        error = answer.json()["error"]
        right = answer.status_code == 400 and bool(error["message"] and error["code"])
    except (ValueError, KeyError):
        right = False
    return Reply(right, seconds, said="" if right else f"{answer.status_code} {answer.text[:200]!r}")


def _counted(replies: list[Reply]) -> dict[str, int]:
    """Right and wrong ones; some of the wrong are shown."""
    wrong = [reply for reply in replies if not reply.right]
    for reply in wrong[:10]:
        print(f"wrong: {reply.said}")
    return {"right": len(replies) - len(wrong), "wrong": len(wrong)}


def _latency(replies: list[Reply]) -> dict[str, float]:
    return Latency.of([1000 * reply.seconds for reply in replies]).to_dict() if replies else {}


async def figures(client: httpx.AsyncClient) -> dict[str, float]:
    """What the server's /metrics says now."""
    try:
        answer = await client.get("/metrics")
    except httpx.TransportError:  # a connection that the server had just given up
        answer = await client.get("/metrics")
    lines = answer.text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


# 2. Everything at once.


async def _at_once(client: httpx.AsyncClient, questions: list[Question], count: int) -> dict[str, Any]:
    kinds = [("usual", "leaves", "malformed")[number % 3] for number in range(count)]
    started = time.perf_counter()
    tasks = []
    for number, kind in enumerate(kinds):
        question = questions[number % len(questions)]
        if kind == "malformed":
            tasks.append(_ask_malformed(client, *MALFORMED[number % len(MALFORMED)]))
        else:
            ask = _ask if kind == "usual" else _ask_and_leave
            tasks.append(ask(client, question, stream=number % 2 == 0))
    replies = await asyncio.gather(*tasks)
    result: dict[str, Any] = {
        "requests": count,
        "seconds": time.perf_counter() - started,
        "idle_after": await _idle(client),
        **_counted(replies),
        "told_to_come_again": sum(reply.refused for reply in replies),
    }
    for kind in sorted(set(kinds)):
        of_kind = [reply for reply, other in zip(replies, kinds, strict=True) if other == kind]
        result[kind] = {"requests": len(of_kind), "ms": _latency(of_kind)}
    print(
        f"{count} at once: {result['right']} right, {result['wrong']} wrong, {result['told_to_come_again']} "
        f"times told to come again, in {result['seconds']:.1f} s; afterwards the server is "
        f"{'idle' if result['idle_after'] else 'NOT idle'}"
    )
    return result


async def _idle(client: httpx.AsyncClient) -> bool:
    """Whether the server, within ten seconds, has nothing left to do but this question."""
    for _ in range(100):
        now = await figures(client)
        if now["blt_edge_queue_length"] == 0 and now["blt_edge_http_requests_in_flight"] == 1:
            return True
        await asyncio.sleep(0.1)
    return False


# 3. Many, for long.


async def _one_after_another(
    client: httpx.AsyncClient, questions: list[Question], count: int, every: int
) -> dict[str, Any]:
    replies: list[Reply] = []
    numbers = iter(range(count))
    memory: list[float] = []
    started = time.perf_counter()

    async def work() -> None:
        for number in numbers:
            replies.append(await _ask(client, questions[number % len(questions)], stream=number % 2 == 0))
            if len(replies) % every == 0:
                now = await figures(client)
                memory.append(now.get("process_resident_memory_bytes", 0.0) / 1e6)
                print(f"{len(replies):>6} requests: {memory[-1]:.1f} MB resident", flush=True)

    await asyncio.gather(*(work() for _ in range(_AT_A_TIME)))
    seconds = time.perf_counter() - started
    counts, latency = _counted(replies), _latency(replies)
    growth = memory[-1] - memory[0] if len(memory) > 1 else 0.0
    print(
        f"{count} short requests, {_AT_A_TIME} at a time: {counts['right']} right, {counts['wrong']} wrong, "
        f"{count / seconds:.1f} a second, p50 {latency['p50']:.0f} ms, p99 {latency['p99']:.0f} ms; "
        f"memory grew by {growth:.1f} MB from the first {every} to the last"
    )
    return {
        "requests": count,
        "seconds": seconds,
        "requests_per_second": count / seconds,
        **counts,
        "ms": latency,
        "resident_mb": memory,
        "growth_mb": growth,
    }


# 4. Many clients of all kinds, for long.


async def _long(
    client: httpx.AsyncClient, questions: list[Question], clients: int, minutes: float, process: int
) -> dict[str, Any]:
    replies: list[Reply] = []
    looks: list[tuple[float, int, int]] = []
    started = time.monotonic()
    numbers = count()

    async def work(kind: str) -> None:
        while time.monotonic() < started + 60 * minutes:
            number = next(numbers)
            question, stream = questions[number % len(questions)], number % 2 == 0
            try:
                if kind == "malformed":
                    reply = await _ask_malformed(client, *MALFORMED[number % len(MALFORMED)])
                    await asyncio.sleep(0.5)  # the others have a turn, too
                else:
                    ask = _ask if kind == "usual" else _ask_and_leave
                    reply = await ask(client, question, stream=stream)
            except httpx.TransportError as error:
                reply = Reply(False, 0.0, said=f"{type(error).__name__} {error}")
            replies.append(reply)

    async def look() -> None:
        while time.monotonic() < started + 60 * minutes:
            now = await figures(client)
            threads, files = _threads_and_files(process)
            looks.append((now.get("process_resident_memory_bytes", 0.0) / 1e6, threads, files))
            if len(looks) % 30 == 0:
                print(
                    f"{(time.monotonic() - started) / 60:5.1f} minutes, {len(replies)} requests: "
                    f"{looks[-1][0]:.1f} MB resident, {threads} threads, {files} files",
                    flush=True,
                )
            await asyncio.sleep(1.0)

    kinds = [("usual", "leaves", "malformed")[number % 3] for number in range(clients)]
    await asyncio.gather(look(), *(work(kind) for kind in kinds))
    counts, idle = _counted(replies), await _idle(client)
    flat, said = _judged(looks)
    print(
        f"{clients} clients for {minutes:g} minutes: {len(replies)} requests, {counts['right']} right, "
        f"{counts['wrong']} wrong, {sum(reply.refused for reply in replies)} times told to come again; "
        f"{said}; afterwards the server is {'idle' if idle else 'NOT idle'}"
    )
    memory, threads, files = zip(*looks, strict=True)
    usage = {"resident_mb": memory, "threads": threads, "files": files}
    return {"requests": len(replies), **counts, "idle_after": idle, "flat": flat, **usage}


def _threads_and_files(process: int) -> tuple[int, int]:
    """Of a process, where the system tells; else 0."""
    here = Path(f"/proc/{process}")
    try:
        return len([*(here / "task").iterdir()]), len([*(here / "fd").iterdir()])
    except OSError:
        return 0, 0


def _judged(looks: list[tuple[float, int, int]]) -> tuple[bool, str]:
    """Whether memory, threads and files of the last third are those of the third before it, by medians."""
    third = len(looks) // 3
    if not third:
        return True, "too short to tell whether it grows"
    flat, said = True, []
    for place, (name, slack) in enumerate((("MB", 0.02), ("threads", 0.0), ("files", 0.1))):
        before, last = (median(look[place] for look in looks[first:][:third]) for first in (third, 2 * third))
        flat = flat and last <= before * (1 + slack) + 1
        said.append(f"{before:.0f} to {last:.0f} {name}")
    return flat, f"{', '.join(said)} from the second third to the last" + ("" if flat else ", which GREW")


if __name__ == "__main__":
    main()
