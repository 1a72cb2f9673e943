"""Which draft to try next, and when to stop guessing: what has paid in recent rounds, or none.

What a round costs is a line over its guesses, and how often guesses of a confidence are right is followed as
the text goes. A round goes on guessing while one more guess is likelier to save a round than its share of one
costs. What followed in the text before is taken where that promises more bytes a second than a round without
guesses; else whatever has given the most bytes a second of late. All are tried again now and then, since
texts change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .drafting import Match
from .options import LONGEST_DRAFT, GenerationOptions

__all__ = ["PLAIN", "CostTable", "Gate", "Plan", "Planner"]

# Kinds of confidence that are told apart.
_BUCKETS = 8
# What is remembered of a round after the next one of its source: about the last 25 count.
_REMEMBER = 0.96
# How far one guess's outcome moves what is believed of its kind, and `_AGAIN` rounds move it back to where it
# began.
_FOLLOW = 0.1
_FORGET = 0.05
# Rounds of every source before it is judged, and after how many rounds of the text it is due once more.
_TRIALS = 2
_AGAIN = 128
# Of guesses by the planner's own choice.
_LONGEST_CHOSEN = 24
# What a guess costs of a round without any before rounds have told, and what it costs at least and at most:
# some guesses are worth a look however dear they are, and one that is nearly certain is.
_USUAL_SHARE = 0.25
_SHARES = (0.05, 0.95)


@dataclass
class _Line:
    """Seconds of a source's rounds by their guesses: decayed sums for a least-squares line."""

    rounds: float = 0.0
    guesses: float = 0.0
    squares: float = 0.0
    seconds: float = 0.0
    products: float = 0.0

    def add(self, guesses: int, seconds: float) -> None:
        found = (1, guesses, guesses**2, seconds, guesses * seconds)
        for name, value in zip(vars(self), found, strict=True):
            setattr(self, name, _REMEMBER * getattr(self, name) + value)

    @property
    def share(self) -> float:
        """What one more guess costs of a round without any."""
        spread = self.rounds * self.squares - self.guesses**2
        if spread <= self.rounds:  # all rounds had about as many guesses
            return _USUAL_SHARE
        slope = (self.rounds * self.products - self.guesses * self.seconds) / spread
        none = (self.seconds - slope * self.guesses) / self.rounds
        return min(max(slope / none, _SHARES[0]), _SHARES[1]) if none > 0 else _SHARES[1]


@dataclass
class CostTable:
    """What rounds with each source's guesses have cost on this machine, whatever the text."""

    lines: dict[str, _Line] = field(default_factory=dict)

    def line(self, source: str) -> _Line:
        return self.lines.setdefault(source, _Line())


class Gate:
    """Lets guesses of a round pass while they are likely enough to be reached and right."""

    def __init__(self, rates: Sequence[float], floor: float) -> None:
        self._rates, self._floor = rates, floor
        self.survival = 1.0
        """Probability that all guesses that passed are right."""
        self.buckets: list[int] = []
        """Of each guess that passed, the kind of confidence it had."""

    def admits(self, confidence: float) -> bool:
        """Whether a guess of this confidence, 0 to 1, is worth checking; it counts as made then."""
        bucket = min(_BUCKETS - 1, int(confidence * _BUCKETS))
        survival = self.survival * self._rates[bucket]
        if survival < self._floor:
            return False
        self.survival = survival
        self.buckets.append(bucket)
        return True


@dataclass(frozen=True)
class Plan:
    """What to do in a round."""

    source: str
    """"decoder", "patcher", "lookup", or "none"."""
    length: int
    """Guesses at most."""
    gate: Gate
    """Which of them pass."""
    match: Match | None = None
    """Where a lookup reads on."""


PLAIN = Plan("none", 0, Gate((), 1.0))
"""One byte, no guess."""


class _Source:
    """What one text has told of one source of guesses."""

    # Before anything is known: likelier right the more confident, and never less than every second time.
    PRIOR = tuple((1 + (bucket + 0.5) / _BUCKETS) / 2 for bucket in range(_BUCKETS))

    def __init__(self) -> None:
        self.rates = list(self.PRIOR)
        """How often guesses of each kind of confidence are right."""
        self.rounds = 0
        self.bytes = self.seconds = 0.0  # of recent rounds


class Planner:
    """Plans rounds of one text and learns from them."""

    def __init__(self, costs: CostTable, options: GenerationOptions, *, has_patcher: bool) -> None:
        self._costs = costs
        self._fixed_length = options.draft_length
        self._automatic = options.draft == "auto"
        there = ("patcher", "decoder", "lookup") if has_patcher else ("decoder", "lookup")
        self._drafts = [name for name in there if self._automatic or name == options.draft]
        self._sources = {name: _Source() for name in ("none", *self._drafts)}
        self._rounds = 0

    def plan(self, match: Match | None, room: int) -> Plan:
        """What to try when at most `room` guesses fit."""
        name = self._choose(match) if room > 0 else "none"
        if name == "none":
            return PLAIN
        length = min(room, self._fixed_length or _LONGEST_CHOSEN, LONGEST_DRAFT)
        floor = 0.0 if self._fixed_length is not None else self._costs.line(name).share
        return Plan(name, length, Gate(self._sources[name].rates, floor), match)

    def learn(self, plan: Plan, drafted: int, accepted: int, seconds: float) -> None:
        """What came of a plan, and the seconds it took."""
        self._rounds += 1
        self._costs.line(plan.source).add(drafted, seconds)
        source = self._sources[plan.source]
        source.rounds += 1
        source.bytes = _REMEMBER * source.bytes + accepted + 1
        source.seconds = _REMEMBER * source.seconds + seconds
        for index, bucket in enumerate(plan.gate.buckets[: accepted + 1]):
            source.rates[bucket] += _FOLLOW * ((index < accepted) - source.rates[bucket])
        if self._rounds % _AGAIN == 0:
            for source in self._sources.values():
                source.rates = [
                    rate + _FORGET * (prior - rate)
                    for rate, prior in zip(source.rates, source.PRIOR, strict=True)
                ]

    def _choose(self, match: Match | None) -> str:
        if not self._automatic:
            usable = [name for name in self._drafts if name != "lookup" or match is not None]
            return usable[0] if usable else "none"
        if match is not None and self._lookup_pays(match):
            return "lookup"
        others = [name for name in self._sources if name != "lookup"]
        for name in others:
            if self._sources[name].rounds < _TRIALS + self._rounds // _AGAIN:
                return name
        return max(others, key=self._speed)

    def _speed(self, name: str) -> float:
        source = self._sources[name]
        return source.bytes / source.seconds

    def _lookup_pays(self, match: Match) -> bool:
        """Whether guesses from a match promise more bytes than what they cost would give without them."""
        share = self._costs.line("lookup").share
        gate, expected = Gate(self._sources["lookup"].rates, share), 1.0
        while len(gate.buckets) < _LONGEST_CHOSEN and gate.admits(match.confidence(len(gate.buckets))):
            expected += gate.survival
        return expected > 1 + share * len(gate.buckets)
