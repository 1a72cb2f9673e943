"""What a comparison asks of an engine, whatever runs below it: this module knows no engine.

A round is a prompt and a number of bytes to add; a reading is how fast each was. The first new byte, or
token, is chosen from the prompt's own logits, so n new ones are n - 1 steps: decoding speed counts the steps,
for every engine alike. A token model's tokens count as `TokenBudget.bytes_per_token` bytes each.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "BenchError",
    "Card",
    "Engine",
    "EngineSpec",
    "Reading",
    "Round",
    "TokenBudget",
    "folder_bytes",
    "need",
]


class BenchError(Exception):
    """One line for the person who asked: what was got, and what to do."""


@dataclass(frozen=True)
class Round:
    """What every engine is asked in turn."""

    prompt: bytes
    """The context. A token model takes as many tokens as these bytes stand for, whichever they are."""
    new_bytes: int
    """Bytes to add, greedily."""
    following: bytes = b""
    """What comes next in the text, for an engine that reads on in it."""


@dataclass(frozen=True)
class Reading:
    """One round's speeds, in bytes a second of wall clock."""

    prefill: float
    """The prompt's bytes over the time until its logits."""
    decode: float
    """The new bytes after the first over the time that they took."""
    bytes_per_patch: float | None = None
    """Of the new bytes: a patched model's speed hangs on it, and random weights patch otherwise than trained
    ones. None for a token model."""


@dataclass(frozen=True)
class Card:
    """What an engine runs."""

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


class Engine(Protocol):
    """A loaded model."""

    card: Card

    def read(self, task: Round) -> Reading:
        """Run one round from an empty cache."""
        ...


class EngineSpec(Protocol):
    """How to load a model: plain values, because the loading happens in a process of its own."""

    @property
    def name(self) -> str:
        """Unique in a comparison."""
        ...

    @property
    def memory_bytes(self) -> int:
        """About what the loaded model occupies."""
        ...

    def open(self) -> Engine:
        """Load. Raises BenchError when that can't be."""
        ...


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

    def bytes_per_second(self, steps: int, seconds: float) -> float:
        """Speed in bytes of `steps` tokens."""
        return steps * self.bytes_per_token / seconds

    def prompt(self, task: Round, vocabulary: int) -> list[int]:
        """Token ids in place of the prompt, different in each round, none of the first (special) ones."""
        start = sum(task.prompt)
        return [100 + (start + 7919 * i) % (vocabulary - 100) for i in range(self.tokens(len(task.prompt)))]


def need(module: str, package: str | None = None) -> Any:
    """Import an optional module. Raises BenchError naming the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = package or module.split(".")[0].replace("_", "-")
        raise BenchError(f"{module}: {error}; install it with: pip install {missing}") from None


def folder_bytes(folder: Path) -> int:
    """Bytes of the files right in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
