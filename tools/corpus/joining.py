"""Puts what an engine tells of windows, in any order, back together: a result for each text, in their order.

What it does not know: files, models, where results go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from ...runtime.errors import BackendError
from .results import Result
from .texts import Engine, Facts, ScoredText, Text, Unscored

__all__ = ["score_texts"]


@dataclass
class _Joined:
    """A text of which not all is known."""

    name: str
    line: int | None
    facts: Facts | None = None
    unscored: Unscored | None = None
    missing: int = 0
    """Windows whose figures are not there."""
    bits: Fraction = Fraction()
    patches: int = 0
    windows: int = 0
    seconds: float | None = 0.0

    @property
    def read(self) -> bool:
        return self.facts is not None or self.unscored is not None

    def result(self) -> Result:
        if self.unscored is not None:
            return Result(self.name, self.line, 0, 0, 0, 0, 0.0, self.unscored.sha256, self.unscored.note)
        assert self.facts is not None
        return Result(
            self.name,
            self.line,
            self.facts.size,
            self.facts.words,
            self.patches - self.windows,  # BOS is alone in one of each window
            self.windows,
            float(self.bits),
            self.facts.sha256,
            seconds=self.seconds,
        )

    def take(self, part: ScoredText) -> None:
        """Count a window's figures."""
        self.missing -= 1
        self.bits += Fraction(part.bits)
        self.patches += part.patches
        self.windows += part.windows
        timed = self.seconds is not None and part.seconds is not None
        self.seconds = (self.seconds or 0.0) + (part.seconds or 0.0) if timed else None


def score_texts(
    read: Iterator[Text | Unscored], engine: Engine, passed: Callable[[int], None] = lambda done: None
) -> Iterator[Result]:
    """A result for each text, in the order in which they are read, each as soon as those before are known.

    Held are the texts that the engine took and gave no figures for, and those behind them. passed is told of
    the bytes of the input that were scored (`Text.done`), never fewer than before. Bits of windows are summed
    exactly, whatever their order. Raises BackendError for a text that the engine lost, and what it raises.
    """
    texts: deque[_Joined] = deque()
    owners: dict[int, tuple[_Joined, int]] = {}
    most = 0

    def given() -> Iterator[Text]:
        for one in read:
            if not texts or texts[-1].read:
                texts.append(_Joined(one.name, one.line))
            text = texts[-1]
            if isinstance(one, Unscored):
                text.unscored = one
                continue
            text.facts = one.facts
            text.missing += 1
            owners[one.number] = text, one.done
            yield one

    def known() -> Iterator[Result]:
        while texts and texts[0].read and not texts[0].missing:
            yield texts.popleft().result()

    for scored in engine(given()):
        text, done = owners.pop(scored.number)
        text.take(scored)
        most = max(most, done)
        passed(most)
        yield from known()
    yield from known()
    if texts:
        raise BackendError(f"the engine told nothing of {texts[0].name}, which is a mistake of ours")
