"""Decoding that reads on in a text, for random weights, whose own text has odd patches and can't be guessed.

Choosing and guessing are done and paid for as the model's logits ask; what comes out is what the text says,
and a guess is right with a given probability, as measured on a trained model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime import BltModel, GenerationOptions
from ...runtime.drafting import LookupIndex, Match
from ...runtime.sampling import Sampler
from ...runtime.speculation import DraftFigures, Speculator

__all__ = ["ForcedRun", "Simulated", "read_on"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Simulated:
    """Guesses that are simulated."""

    source: str
    """"none", "decoder", "patcher" or "lookup"; guessing itself costs what it costs."""
    length: int = 0
    """Guesses in a round."""
    rate: float = 0.0
    """Probability that one is right."""

    @classmethod
    def parse(cls, text: str) -> Simulated:
        """From "none" or "SOURCE:LENGTH:RATE". Raises ValueError."""
        if text == "none":
            return cls("none")
        source, length, rate = text.split(":")
        if source not in ("decoder", "patcher", "lookup"):
            raise ValueError(f"got source {source}, there are decoder, patcher and lookup")
        return cls(source, int(length), float(rate))

    @property
    def spec(self) -> str:
        """What `parse` reads."""
        return "none" if self.source == "none" else f"{self.source}:{self.length}:{self.rate:g}"

    def __str__(self) -> str:
        if self.source == "none":
            return "none"
        return f"{self.source}, {self.length} guesses, {self.rate:.2f} right"


@dataclass(frozen=True)
class ForcedRun:
    """What one run gave."""

    prefill: float
    """Bytes a second of reading the prompt."""
    decode: float
    """Bytes a second after the first new one."""
    bytes_per_patch: float
    """Of the new bytes."""
    figures: DraftFigures
    """What drafting did."""


def read_on(model: BltModel, ids: Ids, prompt: int, new_bytes: int, case: Simulated, seed: int) -> ForcedRun:
    """Read `prompt` of int64 ids [n], then decode `new_bytes` that are the next of them.

    n is at least prompt + new_bytes + the guesses of a round.
    """
    sequence = model.sequence()
    started = time.perf_counter()
    sequence.append(ids[:prompt])
    prefill = prompt / (time.perf_counter() - started)
    closed = sequence.patches_closed
    sampler = _Forced(ids[prompt:], case.rate, seed)
    options = GenerationOptions(draft=case.source, draft_length=case.length or None)
    speculator = Speculator(sequence, sampler, options, model.costs)
    if case.source == "lookup":
        speculator._index = _SimulatedIndex(sampler)  # type: ignore[assignment]
    pending, made = speculator.begin(), 1
    started = time.perf_counter()
    while made < new_bytes:
        chosen = speculator.round(pending, new_bytes - made)
        pending, made = chosen[-1], made + len(chosen)
    decode = (made - 1) / (time.perf_counter() - started)
    patches = max(1, sequence.patches_closed - closed)
    return ForcedRun(prefill, decode, (made - 1) / patches, speculator.figures)


class _Forced(Sampler):
    """Chooses and guesses as the logits ask, at that cost, and returns what a text says."""

    def __init__(self, text: Ids, rate: float, seed: int) -> None:
        super().__init__(GenerationOptions(draft="none"))
        self._text, self._rate = text.tolist(), rate
        self._random = np.random.default_rng(seed)
        self.place = 0

    def __call__(self, logits: npt.NDArray[np.float32], ids: Any) -> int:
        super().guess(logits, ids, 0)
        self.place += 1
        return int(self._text[self.place - 1])

    def guess(self, logits: npt.NDArray[np.float32], ids: Any, ahead: int) -> int:
        super().guess(logits, ids, ahead)
        return self.likely(ahead)

    def likely(self, ahead: int) -> int:
        """The id after `ahead` more, or with the rest of the probability another one."""
        truth = int(self._text[self.place + ahead])
        return truth if self._random.random() < self._rate else 4 + (truth - 3) % 256


class _SimulatedIndex:
    """Stands for the lookup: a match everywhere."""

    def __init__(self, sampler: _Forced) -> None:
        self._sampler = sampler

    def extend(self, ids: list[int]) -> None:
        """Nothing to remember."""

    def find(self) -> Match:
        """A match of full length."""
        return Match(0, LookupIndex.LONGEST)

    def guesses(self, match: Match, count: int) -> list[int]:
        """As likely right as asked."""
        return [self._sampler.likely(index) for index in range(count)]
