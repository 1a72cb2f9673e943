"""Does a corpus lose a text when a worker of a cluster is killed, and what memory does each worker take?

    python -m blt_edge.tools.bench.cluster survive --bundle demo-bundle
    python -m blt_edge.tools.bench.cluster memory --bundle demo-bundle --actors 1,2,4

survive: 2,000 small texts are scored in this process, then by 2 actors of a Ray cluster on this machine, one
of which is killed (-9) when a third of the results are there. Every text must have one result, the same to
the last bit, so that the totals are, too; exits 1 when one has not.
memory: of so many actors on this machine, each with one thread, once all have scored: what each has resident
(RSS), its proportional share, in which pages that n processes have mapped count as 1/n (PSS), and what is its
own alone. The sum of PSS is what all of them take together. From /proc, so on Linux only.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ...runtime import BltError, BltModel
from ..corpus.cluster import LOCAL, cluster_engine
from ..corpus.engines import local_engine
from ..corpus.texts import ScoredText, Text
from ..profile.statistics import machine
from .common import print_json

_ACTOR = b"ray::MapWorker"
_WORDS = ("the ", "quick ", "fox ", "Größe ", "人人生而自由 ", "12,345 ", "def f():\n", "was ", "of times ")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    survive = commands.add_parser("survive")
    survive.set_defaults(run=_survive)
    survive.add_argument("--texts", type=int, default=2000)
    survive.add_argument("--actors", type=int, default=2)
    memory = commands.add_parser("memory")
    memory.set_defaults(run=_memory)
    memory.add_argument("--actors", type=_numbers, default=(1, 2, 4))
    memory.add_argument("--text-bytes", type=int, default=512)
    for one in (survive, memory):
        one.add_argument("--bundle", required=True, type=Path)
        one.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{machine()}; {args.bundle}")
    try:
        args.run(args)
    except BltError as error:
        sys.exit(f"cluster: {error}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


# 1. A worker is killed.


def _survive(args: argparse.Namespace) -> None:
    texts = small_texts(args.texts, args.seed)
    started = time.perf_counter()
    alone = list(local_engine(BltModel.load(args.bundle, "cpu", 1))(iter(texts)))
    seconds = time.perf_counter() - started
    print(f"one process:   {_totals(alone)}, {seconds:.1f} s")
    started = time.perf_counter()
    found, killed = score_and_kill(args.bundle, texts, args.actors)
    together = time.perf_counter() - started
    print(f"{args.actors} actors:      {_totals(found)}, {together:.1f} s; {killed} was killed midway")
    wrong = differences(alone, found)
    print(f"{len(texts)} texts, {wrong} of them lost, repeated or scored otherwise")
    print_json(
        {
            "benchmark": "cluster survive",
            "bundle": str(args.bundle),
            "texts": len(texts),
            "actors": args.actors,
            "wrong": wrong,
            "killed": killed,
            "bits": math.fsum(one.bits for one in found),
            "seconds": {"one process": seconds, "cluster": together},
        }
    )
    sys.exit(1 if wrong or killed is None else 0)


def small_texts(count: int, seed: int) -> list[Text]:
    """Texts of 1 to 30 words, the same for the same seed."""
    chosen = random.Random(seed)
    lines = ("".join(chosen.choices(_WORDS, k=chosen.randint(1, 30))) for _ in range(count))
    return [Text(number, "made", None, line.encode(), None, 0) for number, line in enumerate(lines)]


def score_and_kill(bundle: Path, texts: list[Text], actors: int) -> tuple[list[ScoredText], int | None]:
    """What a cluster on this machine gives, and the id of the actor's process that was killed on the way,
    when a third of the results were there: None where there was none."""
    found: list[ScoredText] = []
    killed = None
    with cluster_engine(LOCAL, {"bundle": bundle}, processors=actors) as engine:
        for one in engine(iter(texts)):
            found.append(one)
            if killed is None and len(found) >= len(texts) // 3:
                for process in actor_processes()[:1]:
                    os.kill(process, signal.SIGKILL)
                    killed = process
    return found, killed


def differences(alone: list[ScoredText], found: list[ScoredText]) -> int:
    """How many texts have not exactly one result, with the same figures."""

    def figures(one: ScoredText) -> tuple[float, int, int]:
        return one.bits, one.patches, one.windows

    left = {one.number: figures(one) for one in alone}
    return sum(left.pop(one.number, None) != figures(one) for one in found) + len(left)


def _totals(found: list[ScoredText]) -> str:
    return f"{math.fsum(one.bits for one in found)!r} bits, {sum(one.patches for one in found)} patches"


# 2. Memory.


def _memory(args: argparse.Namespace) -> None:
    rows = []
    print(f"{'actors':>6} {'PSS of all':>11} {'PSS each':>9} {'RSS each':>9} {'own each':>9}   MB")
    for actors in args.actors:
        parts = _parts_of(args, actors)
        total = sum(part["Pss"] for part in parts)
        row = {"actors": actors, "pss_mb": total / 1e6}
        for name, part in (("pss_each", "Pss"), ("rss_each", "Rss"), ("own_each", "Private")):
            row[f"{name}_mb"] = sum(one[part] for one in parts) / actors / 1e6
        rows.append(row)
        print(f"{actors:6} {row['pss_mb']:11.0f} {row['pss_each_mb']:9.0f} ", end="")
        print(f"{row['rss_each_mb']:9.0f} {row['own_each_mb']:9.0f}")
    print_json(
        {
            "benchmark": "cluster memory",
            "bundle": str(args.bundle),
            "text_bytes": args.text_bytes,
            "rows": rows,
        }
    )


def _parts_of(args: argparse.Namespace, actors: int) -> list[dict[str, int]]:
    """The most that all actors together had, while all had the bundle mapped and had scored."""
    chosen = random.Random(args.seed)
    words = "".join(chosen.choices(_WORDS, k=args.text_bytes * actors * 8)).encode()
    texts = [
        Text(number, "made", None, words[start : start + args.text_bytes], None, 0)
        for number, start in enumerate(range(0, args.text_bytes * actors * 6, args.text_bytes))
    ]
    most: list[dict[str, int]] = []
    folder = str(args.bundle.resolve()).encode()
    with cluster_engine(LOCAL, {"bundle": args.bundle}, processors=actors) as engine:
        for _ in engine(iter(texts)):
            mapped = [process for process in actor_processes() if folder in _read(process, "maps")]
            parts = [shares(process) for process in mapped]
            if len(parts) == actors and _sum(parts) > _sum(most):
                most = parts
    if not most:
        sys.exit(f"cluster: the {actors} actors were never at work at the same time")
    return most


def _sum(parts: list[dict[str, int]]) -> int:
    return sum(part["Pss"] for part in parts)


# 3. Processes.


def actor_processes() -> list[int]:
    """Ids of the actors' processes below this one, which started the cluster."""

    def below(parent: int) -> Iterator[int]:
        for child in children.get(parent, ()):
            yield child
            yield from below(child)

    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        status = _read(int(folder.name), "stat").rpartition(b")")[2].split()
        if len(status) > 1:
            children.setdefault(int(status[1]), []).append(int(folder.name))
    return sorted(process for process in below(os.getpid()) if _read(process, "cmdline").startswith(_ACTOR))


def shares(process: int) -> dict[str, int]:
    """Bytes that a process has resident (Rss), its proportional share (Pss), what is its alone (Private)."""
    lines = _read(process, "smaps_rollup").decode().splitlines()[1:]
    sizes = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    own = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
    return {"Rss": sizes.get("Rss", 0), "Pss": sizes.get("Pss", 0), "Private": own}


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:  # it has ended
        return b""


if __name__ == "__main__":
    main()
