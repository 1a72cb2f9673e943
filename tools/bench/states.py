"""What does it save to have read a text before?

In each round, in turns: a prompt is read anew; its state is forked, saved, and restored from the file (which
the page cache has); a completion is made twice through one store; and of 1 and of 8 choices the time until
each has its first byte is taken. Medians, and the ratios of a round.

With --http, a server in a process of its own makes the completions instead: of a prompt that it has not seen,
and of the same again, over a connection that is kept and over a new one for each request. The client is the
standard library's, which does no more: others may take longer to get ready than the server to answer
(`httpx.post` reads certificates each time, 10 ms and more).

    python -m blt_edge.tools.bench.states --bundle demo-bundle --text FILE [--http]
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from ...runtime import BltModel, GenerationOptions, PrefixStore
from ...runtime.vocabulary import encode
from ..profile.statistics import Spread, machine
from .common import options, print_json
from .serve_load import COMPLETIONS, serving

_CHOICES = 8
_CONNECTIONS = ("kept connection", "new connections")
_STORE_BYTES = 4 << 30


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--prompt-bytes", type=int, default=3500)
    parser.add_argument("--new-bytes", type=int, default=32)
    parser.add_argument("--http", action="store_true", help="ask a server")
    args = parser.parse_args()

    prompt = args.text.read_bytes()[: args.prompt_bytes]
    if args.http:
        print(f"{machine()}; {args.threads} threads; {args.rounds} rounds; {len(prompt)} bytes; over HTTP")
        with serving(args.bundle, args.threads) as url:
            rounds = [_http_round(url, number, prompt, args.new_bytes) for number in range(args.rounds)]
        ratios = {f"second / first, {way}": (f"second, {way}", f"first, {way}") for way in _CONNECTIONS}
        _report("states over http", args.threads, len(prompt), rounds, ratios)
        return
    model = BltModel.load(args.bundle, threads=args.threads)
    print(
        f"{machine()}; {args.threads} threads; {args.rounds} rounds; {len(prompt)} bytes; {model.engine.name}"
    )
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            rounds.append(_round(model, prompt, args.new_bytes, Path(folder, "text.state")))
    ratios = {
        "restored / read": ("restore", "read anew"),
        "second completion / first": ("second completion", "first completion"),
        f"first bytes of {_CHOICES} / of 1": (f"first bytes, n={_CHOICES}", "first bytes, n=1"),
    }
    _report("states", args.threads, len(prompt), rounds, ratios)


def _report(
    benchmark: str,
    threads: int,
    prompt_bytes: int,
    rounds: list[dict[str, float]],
    ratios: dict[str, tuple[str, str]],
) -> None:
    """Print what the rounds gave, and medians of ratios within a round: (part, whole) by name."""
    columns = {name: [one[name] for one in rounds] for name in rounds[0]}
    for name, values in columns.items():
        unit = "MB" if name.endswith("file") else "s"
        print(f"{name:>32}: {Spread.of(values)} {unit}")
    found = {name: _ratio(columns, part, whole) for name, (part, whole) in ratios.items()}
    for name, value in found.items():
        print(f"{name:>32}: {value:.4f}")
    document: dict[str, Any] = {name: median(values) for name, values in columns.items()}
    print_json(
        {"benchmark": benchmark, "threads": threads, "prompt_bytes": prompt_bytes, **document, **found}
    )


def _round(model: BltModel, prompt: bytes, new_bytes: int, path: Path) -> dict[str, float]:
    """Seconds of each, and the file's size in MB."""
    sequence = model.sequence()
    found = {"read anew": _seconds(lambda: sequence.append(encode(prompt)))}
    found["fork"] = _seconds(sequence.fork)
    found["save"] = _seconds(lambda: sequence.save(path))
    found["file"] = path.stat().st_size / 1e6
    found["restore"] = _seconds(lambda: model.restore(path))
    asked = GenerationOptions(max_new_bytes=new_bytes)
    store = PrefixStore(model, memory=_STORE_BYTES)
    for which in ("first", "second"):
        found[f"{which} completion"] = _seconds(lambda: store.generate(prompt, asked))
    for count in (1, _CHOICES):
        found[f"first bytes, n={count}"] = _seconds(partial(_first_bytes, model, prompt, count))
    return found


def _http_round(url: str, number: int, prompt: bytes, new_bytes: int) -> dict[str, float]:
    """Seconds of the first and the second request, for each kind of connection."""
    found = {}
    for way in _CONNECTIONS:
        text = (f"{number}, {way}: ".encode() + prompt)[: len(prompt)].decode(errors="ignore")
        body = json.dumps({"prompt": text, "max_tokens": new_bytes, "temperature": 0})
        with closing(_connection(url)) as kept:
            kept.connect()
            for which in ("first", "second"):
                connect = partial(_connection, url) if way == "new connections" else None
                found[f"{which}, {way}"] = _seconds(partial(_ask, kept, connect, body))
    return found


def _ask(kept: HTTPConnection, connect: Callable[[], HTTPConnection] | None, body: str) -> None:
    """Have one completion, over the connection that is there or one of its own."""
    connection = kept if connect is None else connect()
    connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, answer.status
    if connection is not kept:
        connection.close()


def _connection(url: str) -> HTTPConnection:
    return HTTPConnection(urlsplit(url).netloc, timeout=600)


def _first_bytes(model: BltModel, prompt: bytes, count: int) -> None:
    """Run until each choice has its first piece."""
    waiting = set(range(count))
    asked = GenerationOptions(max_new_bytes=4, temperature=0.8, seed=1)
    pieces = model.stream_choices(prompt, asked, n=count)
    for index, _ in pieces:
        waiting.discard(index)
        if not waiting:
            break
    pieces.close()  # type: ignore[attr-defined]


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _ratio(columns: dict[str, list[float]], part: str, whole: str) -> float:
    return median(one / other for one, other in zip(columns[part], columns[whole], strict=True))


if __name__ == "__main__":
    main()
