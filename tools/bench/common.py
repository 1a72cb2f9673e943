"""What measurements share: their options, the JSON line at the end, and what a comparison asks of a peer.

A peer is an engine with a model loaded, whatever runs below it: this module knows none. Its task is a prompt
and a number of bytes to add; the answer is how fast each was. The first new byte, or token, is chosen from
the prompt's own logits, so n new ones are n - 1 steps: decoding speed counts the steps, for every peer alike.
A token model's tokens count as `TokenBudget.bytes_per_token` bytes each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..profile.statistics import machine


class BenchError(Exception):
    """One line for the person who asked: what was got, and what to do."""


def options(theory: str | None, rounds: int = 0, threads: int = 2, **bundle: Any) -> argparse.ArgumentParser:
    """A parser with --bundle, --threads and, where there are rounds, --rounds.

    theory: the module's docstring, whose first line is the question.
    bundle: more of --bundle, such as a help text.
    """
    parser = argparse.ArgumentParser(description=(theory or "").splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path, **bundle)
    parser.add_argument("--threads", type=int, default=threads)
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def print_json(document: dict[str, Any]) -> None:
    print(json.dumps({"machine": machine(), **document}))


def need(module: str, package: str | None = None) -> Any:
    """Import an optional module. Raises BenchError naming the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = package or module.split(".")[0].replace("_", "-")
        raise BenchError(f"{module}: {error}; install it with: pip install {missing}") from None


@dataclass(frozen=True)
class Task:
    """What every peer is asked in turn."""

    prompt: bytes
    """The context. A token model takes as many tokens as these bytes stand for, whichever they are."""
    new_bytes: int
    """Bytes to add, greedily."""
    following: bytes = b""
    """What comes next in the text, for a peer that reads on in it."""


@dataclass(frozen=True)
class Speeds:
    """A task's speeds, in bytes a second of wall clock."""

    prefill: float
    """The prompt's bytes over the time until its logits."""
    decode: float
    """The new bytes after the first over the time that they took."""
    bytes_per_patch: float | None = None
    """Of the new bytes: a patched model's speed hangs on it, and random weights patch otherwise than trained
    ones. None for a token model."""


@dataclass(frozen=True)
class ModelCard:
    """What a peer runs."""

    name: str
    parameters: int
    """Trained numbers, tables of which a byte reads a few rows left out."""
    disk_bytes: int
    """Weights on disk, those tables left out."""
    build: str
    """Version and what is special about it."""
    table_parameters: int = 0
    """Trained numbers in such tables."""
    table_bytes: int = 0
    """Those tables on disk."""


class Peer(Protocol):
    """An engine with a model loaded."""

    card: ModelCard

    def run(self, task: Task) -> Speeds: ...


class PeerSpec(Protocol):
    """How to load a model: plain values, because the loading happens in a process of its own."""

    @property
    def name(self) -> str:
        """Unique in a comparison."""

    @property
    def memory_bytes(self) -> int:
        """About what the loaded model occupies."""

    def open(self) -> Peer:
        """Load. Raises BenchError when that can't be."""


@dataclass(frozen=True)
class TokenBudget:
    """What a token model gets, where a byte model gets bytes."""

    threads: int
    bytes_per_token: float
    positions: int
    """Tokens that a context must have room for."""

    def tokens(self, count: int) -> int:
        """Tokens that `count` bytes stand for, 2 at least: decoding needs a step."""
        return max(2, round(count / self.bytes_per_token))

    def prompt(self, task: Task, vocabulary: int) -> list[int]:
        """Token ids in place of the prompt, different for each task, none of the first (special) ones."""
        start = sum(task.prompt)
        return [100 + (start + 7919 * i) % (vocabulary - 100) for i in range(self.tokens(len(task.prompt)))]

    def speeds(self, prompt: int, prefill: float, steps: int, decode: float) -> Speeds:
        """Speeds in bytes, of `prompt` tokens and `steps` more that took so many seconds."""
        return Speeds(prompt * self.bytes_per_token / prefill, steps * self.bytes_per_token / decode)

    def timed(
        self, prompt: list[int], steps: int, read: Callable[[], None], step: Callable[[], None]
    ) -> Speeds:
        """Run `read`, which takes the prompt and chooses a token, and `step` so often, by the clock."""
        started = time.perf_counter()
        read()
        prefilled = time.perf_counter()
        for _ in range(steps):
            step()
        return self.speeds(len(prompt), prefilled - started, steps, time.perf_counter() - prefilled)
