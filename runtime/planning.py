"""Which draft to try next, and when to stop guessing: what pays by measured costs and acceptance, or none.

Acceptance: every guess comes with a confidence, and how often guesses of about that confidence turn out right
is learned as the text goes. A round goes on guessing while one more guess is likelier to save a step than its
share of the pass over all guesses costs.

What followed in the text before is taken where it promises more than a plain step; else the source whose
recent rounds gave the most bytes a second guesses (the patcher with some benefit of the doubt), or none does.
What did not pay is tried again after a while, since texts change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .costs import CostTable
from .drafting import Match
from .options import LONGEST_DRAFT, GenerationOptions

__all__ = ["PLAIN", "Acceptance", "Gate", "Plan", "Planner"]


# 1. How often guesses are right.

# Kinds of confidence that are told apart.
_BUCKETS = 8
# What is believed before there is any evidence is worth so many guesses, and the least confident guesses of
# each source are believed to be right this often: a few wrong rounds are enough to give a source up.
_PRIOR_WEIGHT = 3.0
_LOWEST = {"patcher": 0.3, "decoder": 0.5, "lookup": 0.4}
# Evidence counts for about 50 guesses: acceptance follows the text. An idle source's fades as well.
_REMEMBER = 0.98
_FADE = 0.9


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


class Gate:
    """Lets guesses of a round pass while they are likely enough to be reached and right."""

    def __init__(self, rates: Sequence[Acceptance], floor: float) -> None:
        self._rates, self._floor = rates, floor
        self._survival = 1.0
        self.buckets: list[int] = []
        """Of each guess that passed, the kind of confidence it had."""

    def admits(self, confidence: float) -> bool:
        """Whether a guess of this confidence, 0 to 1, is worth checking; it counts as made then."""
        bucket = min(_BUCKETS - 1, int(confidence * _BUCKETS))
        survival = self._survival * self._rates[bucket].rate
        if survival < self._floor:
            return False
        self._survival = survival
        self.buckets.append(bucket)
        return True


# 2. What pays.

# Of guesses by the planner's own choice: by the 17th a round has seldom survived, and a pass over more
# positions gets dearer.
_LONGEST_CHOSEN = 16
# A source has to be faster than plain decoding by more than two measurements differ.
_MARGIN = 1.03
# What a lookup has to promise where its rounds have been faster than plain ones: costs of passes over many
# guesses are read off few runs and for the text's usual patches: too high, where it repeats itself.
_PROVEN_MARGIN = 0.5
# Rounds after which costs and the patches' density are looked at again, and an idle source is tried again.
_REFRESH = 32
_IDLE = 160
# Rounds of each source before it is judged.
_TRIALS = 4
# The patcher reads the chosen byte anyway: a round in which it makes no guess costs nothing.
_FREE_TRIALS = 12
# For the same reason it need not be measured faster than no guesses to be asked: noise would keep it out.
_BENEFIT_OF_DOUBT = 0.9
# A source's speed is that of about its last 14 rounds.
_REMEMBER_ROUNDS = 0.93
# Rows at which the slope of a pass over several guesses is read, and bounds of a gate's floor: some guesses
# are worth a look however dear they are, and one that is nearly certain is.
_SLOPE_ROWS = 9
_FLOORS = (0.05, 0.95)
# Before anything is known: patches per byte, and a guess's share of a plain step.
_USUAL_PATCHES = 0.25
_USUAL_SHARE = 0.3
# A source that would not pay if this share of its guesses were right is not worth a trial.
_HOPED = 0.9


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
    """What is known of one source of guesses."""

    def __init__(self, lowest: float) -> None:
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


class Planner:
    """Plans rounds of one text and learns from them."""

    def __init__(self, costs: CostTable, options: GenerationOptions, *, has_patcher: bool) -> None:
        self._costs, self._has_patcher = costs, has_patcher
        self._fixed_length = options.draft_length
        self._automatic = options.draft == "auto"
        wanted = [name for name in _LOWEST if self._automatic or name == options.draft]
        self._sources = {name: _Source(_LOWEST[name]) for name in wanted if name != "patcher" or has_patcher}
        self._plain_rounds = _Source(0.0)
        self._floors: dict[str, float] = {}
        self._plain = 0.0  # seconds of a byte without guesses
        self._patches = _USUAL_PATCHES
        self._age = 0

    def plan(self, match: Match | None, room: int, patches: float) -> Plan:
        """What to try when at most `room` guesses fit; `patches`: patches per byte of the text so far."""
        if not self._sources or room < 1:
            return PLAIN
        if self._age % _REFRESH == 0:
            self._refresh(patches)
        self._age += 1
        name = self._choose(match)
        if name is None:
            return PLAIN
        length = min(room, self._fixed_length or _LONGEST_CHOSEN, LONGEST_DRAFT)
        floor = 0.0 if self._fixed_length is not None else self._floors[name]
        return Plan(name, length, Gate(self._sources[name].rates, floor), match)

    def learn(self, plan: Plan, drafted: int, accepted: int, seconds: float, host_seconds: float) -> None:
        """What came of a plan, the seconds it took, and those of them outside the stages."""
        self._costs.observe(f"host {plan.source}", 0.0, host_seconds, drafted + 1)
        self.learn_guesses(plan, accepted)
        for name, source in (("none", self._plain_rounds), *self._sources.items()):
            if name != plan.source:
                source.idle += 1
                continue
            source.add(accepted + 1, seconds / self._costs.pace)

    def learn_guesses(self, plan: Plan, accepted: int) -> None:
        """Which of a plan's guesses were right, and nothing of speed: for a round with bytes that a
        constraint forced, which says nothing of one without."""
        source = self._sources.get(plan.source)
        for index, bucket in enumerate(plan.gate.buckets[: accepted + 1]):
            assert source is not None
            source.rates[bucket].add(index < accepted)

    def _choose(self, match: Match | None) -> str | None:
        usable = [name for name in self._sources if name != "lookup" or match is not None]
        if not self._automatic:
            return usable[0] if usable else None
        if self._plain == 0.0 or self._plain_rounds.rounds < _TRIALS:
            return None
        if match is not None and self._lookup_pays(match):
            return "lookup"
        best, speed = None, _MARGIN * self._plain_rounds.speed
        for name in usable:
            source = self._sources[name]
            if name == "lookup":
                continue
            trials = _FREE_TRIALS if name == "patcher" else _TRIALS
            if (source.rounds < trials or source.idle > _IDLE) and self._may_pay(name):
                return name
            if source.speed > (_BENEFIT_OF_DOUBT * speed if name == "patcher" and best is None else speed):
                best, speed = name, max(speed, source.speed)
        # What plain decoding gives is asked again, now and then, as everything else is.
        return None if self._plain_rounds.idle > _IDLE else best

    def _may_pay(self, name: str) -> bool:
        """Whether a source would, if most guesses were right."""
        bytes_of = {length: (1 - _HOPED ** (length + 1)) / (1 - _HOPED) for length in (2, 4, 8)}
        return any(
            count * self._plain > _MARGIN * self._round_seconds(name, length)
            for length, count in bytes_of.items()
        )

    def _lookup_pays(self, match: Match) -> bool:
        """Whether guesses from a match promise more than a plain step, or have given more of late."""
        source = self._sources["lookup"]
        gate = Gate(source.rates, self._floors["lookup"])
        expected = chance = 1.0
        for index in range(_LONGEST_CHOSEN):
            if not gate.admits(match.confidence(index)):
                break
            chance *= source.rates[gate.buckets[-1]].rate
            expected += chance
        if not gate.buckets:
            return False
        proven = source.speed > _MARGIN * self._plain_rounds.speed
        promise = expected / self._round_seconds("lookup", len(gate.buckets)) * self._plain
        return promise > (_PROVEN_MARGIN if proven else _MARGIN)

    def _refresh(self, patches: float) -> None:
        self._patches = patches
        for source in self._sources.values():
            if source.idle > _IDLE // 2:
                for rate in source.rates:
                    rate.fade()
        self._plain = self._round_seconds("none", 0) if self._costs.known("decoder") else 0.0
        for name in self._sources:
            marginal = self._round_seconds(name, _SLOPE_ROWS - 1) - self._round_seconds(name, 0)
            share = marginal / (_SLOPE_ROWS - 1) / self._plain if self._plain else _USUAL_SHARE
            self._floors[name] = min(max(share, _FLOORS[0]), _FLOORS[1])

    def _round_seconds(self, source: str, length: int) -> float:
        """Expected seconds of a round with `length` guesses by `source`."""
        costs, rows = self._costs, length + 1
        closed = self._patches * rows
        total = costs.seconds("decoder", rows)
        total += costs.seconds(f"host {source}", rows) or costs.seconds("host none", 1)
        total += min(closed, 1.0) * costs.seconds("latent", max(1, round(closed)))
        if source == "decoder":
            total += rows * costs.seconds("encoder", 1) + length * costs.seconds("decoder", 1)
        else:
            total += costs.seconds("encoder", rows)
        if self._has_patcher and source == "patcher":
            total += rows * costs.seconds("patcher", 1)
        elif self._has_patcher:
            total += costs.seconds("patcher", rows)
        return total
