"""How often guesses of each source turn out right, and how fast its rounds are, as far as recent ones tell.

A new text begins with what the last one found, cut to the weight of a few guesses: how well a model is
guessed depends on the model more than on the text, and trying each source anew takes a short text's time.
"""

from __future__ import annotations

from copy import copy

__all__ = ["LOWEST", "Acceptance", "SourceRecord", "bucket_of"]

# Kinds of confidence that are told apart.
_BUCKETS = 8
# What is believed before there is any evidence is worth so many guesses, and the least confident guesses of
# each source are believed to be right this often: a few wrong rounds are enough to give a source up.
_PRIOR_WEIGHT = 3.0
LOWEST = {"patcher": 0.3, "decoder": 0.5, "lookup": 0.4}
# Evidence counts for about 50 guesses: acceptance follows the text. An idle source's fades as well.
_REMEMBER = 0.98
_FADE = 0.9
# And for about so many at the beginning of the next text.
_CARRIED = 12.0
# A source's speed is that of about its last 14 rounds.
_REMEMBER_ROUNDS = 0.93


def bucket_of(confidence: float) -> int:
    """The kind of a confidence, 0 to 1."""
    return min(_BUCKETS - 1, int(confidence * _BUCKETS))


class Acceptance:
    """How often guesses are right, as far as recent ones tell."""

    def __init__(self, expected: float) -> None:
        """expected: what to believe before there is any evidence."""
        self._expected = expected
        self._right = self._seen = 0.0

    @property
    def rate(self) -> float:
        """Estimated probability that a guess is right when those before it were."""
        return (self._expected * _PRIOR_WEIGHT + self._right) / (_PRIOR_WEIGHT + self._seen)

    def add(self, right: bool) -> None:
        """One guess's outcome."""
        self._right = _REMEMBER * self._right + right
        self._seen = _REMEMBER * self._seen + 1

    def fade(self) -> None:
        """Forget some of the evidence."""
        self._right *= _FADE
        self._seen *= _FADE

    def carried(self) -> Acceptance:
        """What a new text begins with."""
        other = copy(self)
        share = min(1.0, _CARRIED / other._seen) if other._seen else 1.0
        other._right *= share
        other._seen *= share
        return other


class SourceRecord:
    """What is known of one source of guesses."""

    def __init__(self, lowest: float) -> None:
        """lowest: how often its least confident guesses are believed to be right."""
        # Before there is evidence: likelier right the more confident, from `lowest` on.
        self.rates = [
            Acceptance(lowest + (1 - lowest) * (bucket + 0.5) / _BUCKETS) for bucket in range(_BUCKETS)
        ]
        self.bytes = self.seconds = 0.0
        self.rounds = self.idle = 0

    @property
    def speed(self) -> float:
        """Bytes a second of recent rounds; 0 before the first."""
        return self.bytes / self.seconds if self.seconds else 0.0

    def add(self, count: int, seconds: float) -> None:
        """One round's bytes and seconds."""
        self.bytes = _REMEMBER_ROUNDS * self.bytes + count
        self.seconds = _REMEMBER_ROUNDS * self.seconds + seconds
        self.rounds += 1
        self.idle = 0

    def carried(self) -> SourceRecord:
        """What a new text begins with."""
        other = copy(self)
        other.rates = [rate.carried() for rate in self.rates]
        return other
