"""Which stage runs next, and for which texts, where several wait: the choice alone, from what they wait for.

Two kinds of waiting text are told apart. One that is being decoded asks for a few positions at a time; its
passes are chosen in the stages' order, so that those who are behind catch up and all go on together. One
that is being read asks for a chunk: between two passes over chunks the others each get a byte, so that a byte
waits for one stage of a chunk, not for a prompt; and who waits for the same stage goes along.

The latent stage is run once a patch. Of several texts some close a patch with each byte, seldom all; and its
pass costs little more for four than for one. So it pays to let closed patches wait for each other, as long as
there are texts left to go on with: how many are waited for follows from what passes have cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Protocol, TypeVar

from .costs import CostTable
from .names import STAGES

__all__ = ["MOST_SHORT", "Chooser", "Waiting", "graph_rows"]

MOST_SHORT = 32
"""Positions that a byte with guesses behind it takes at most; what asks for more is reading."""

# After so many choices what is waited for is worked out anew, while little is known sooner.
_REFRESH = 64
_SOONER = (8, 24)
# Patches and bytes that are believed in before there are any, and how much of them the next pass leaves.
_USUAL = (4.0, 16.0)
_REMEMBER = 0.98
# A byte has to cost less than this share of what it costs without waiting.
_GAIN = 0.97
# Bytes of others that a closed patch waits for at most; and what any text does, whatever others ask for.
_PATIENCE = 16


class Waiting(Protocol):
    """A text that waits for a pass."""

    @property
    def stage(self) -> str: ...

    @property
    def kind(self) -> object:
        """What runs it: only what is run by the same goes together."""

    @property
    def count(self) -> int:
        """Its new positions."""

    @property
    def since(self) -> int:
        """Number of the pass before which it began to wait."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of texts that its stage has graphs for, ascending, from 1 on."""


_W = TypeVar("_W", bound=Waiting)


def graph_rows(rows: Sequence[int], texts: int) -> int:
    """Of graphs for so many rows, that for `texts`: the smallest with room, whose idle rows cost as much as
    others; the largest where none has."""
    return next((one for one in rows if one >= texts), rows[-1])


class Chooser:
    """Chooses pass after pass."""

    def __init__(self, chunk: int, costs: CostTable) -> None:
        """chunk: positions that one pass takes at most, but for a single text that asks for more. costs: what
        passes have cost, by all their positions, one for each idle row included; what they cost from now on
        is added by the caller."""
        self.costs = costs
        self.patches_waited_for = 1
        """Closed patches that go into a latent pass together, while others can go on."""
        self._chunk = chunk
        self._patches, self._bytes = _USUAL  # of short passes, recent ones most
        self._short_rounds = 0  # bytes since the last pass over a chunk
        self._let_by = 0  # positions that have gone before a larger one that has waited longer
        self._age = 0
        self.passes = 0
        """Passes so far."""

    def choose(self, waiting: Sequence[_W], texts: int) -> list[_W]:
        """Of the texts that wait (at least one, the longest wait first), those whose pass is next.

        They ask for one stage, in no more rows than it has. texts: all there are, waiting or not.
        """
        self.passes += 1
        eldest = waiting[0]
        if self.passes - eldest.since > _PATIENCE * max(len(STAGES), texts):
            # Of a text that asks for one stage alone, as for entropies, the others would wait for the end.
            return self._with(eldest, waiting[1:])
        short = [one for one in waiting if one.count <= MOST_SHORT]
        long = [one for one in waiting if one.count > MOST_SHORT]
        if long and (not short or self._short_rounds):
            self._short_rounds = 0
            lead = self._next_reader(long)
            return self._with(lead, [*short, *(one for one in long if one is not lead)])
        lead = self._lead(short, texts)
        group = self._with(lead, [one for one in short if one is not lead])
        if lead.stage == "latent":
            group = self._cheapest(group)
        if lead.stage == "decoder":
            self._short_rounds += 1
        self._count(lead.stage, group)
        return group

    def _next_reader(self, long: Sequence[_W]) -> _W:
        """Of texts that are being read, the one whose pass is next: who has waited longest, but before it
        smaller ones, as short prompts are, of a chunk in all."""
        lead, least = long[0], min(long, key=lambda one: one.count)
        if self._let_by + least.count <= self._chunk and least.count < lead.count:
            lead = least
        larger = any(one.count > lead.count for one in long)
        self._let_by = self._let_by + lead.count if larger else 0
        return lead

    def _with(self, lead: _W, others: Sequence[_W]) -> list[_W]:
        group, room, most = [lead], self._chunk - lead.count, lead.rows[-1]
        # What is short goes along in any case: it is next to nothing beside a chunk.
        for one in others:
            fits = one.count <= room or one.count <= MOST_SHORT
            alike = one.kind is lead.kind and one.stage == lead.stage
            if alike and fits and len(group) < min(most, one.rows[-1]):
                group.append(one)
                room, most = room - one.count, min(most, one.rows[-1])
        return group

    def _lead(self, short: Sequence[_W], texts: int) -> _W:
        """The text whose stage is next: the first stage in order that somebody waits for."""
        by_stage: dict[str, list[_W]] = {}
        for one in short:
            by_stage.setdefault(one.stage, []).append(one)
        stages = [stage for stage in STAGES if stage in by_stage]
        closed = by_stage.get("latent", [])
        if closed and len(stages) > 1 and not self._latent_is_due(closed, texts):
            stages.remove("latent")
        return by_stage[stages[0]][0]

    def _latent_is_due(self, closed: Sequence[_W], texts: int) -> bool:
        if self._age % _REFRESH == 0 or self._age in _SOONER:
            self.patches_waited_for = self._best_wait(closed[0].rows, texts)
        self._age += 1
        return len(closed) >= self.patches_waited_for or self.passes - closed[0].since > _PATIENCE * len(
            STAGES
        )

    def _cheapest(self, group: list[_W]) -> list[_W]:
        """As many of a group as cost least for each: a graph for eight runs as long for five, and four have
        one of their own. Who stays behind is soon joined by others."""
        rows = group[0].rows

        def patch_seconds(texts: int) -> float:
            count = sum(one.count for one in group[:texts])
            return self.costs.seconds("latent", count + graph_rows(rows, texts) - texts) / count

        # Of those that cost the same, the most.
        return group[: min(range(len(group), 0, -1), key=patch_seconds)]

    def _best_wait(self, rows: Sequence[int], texts: int) -> int:
        """How many patches to wait for: where a byte costs least, by what passes have cost.

        While `wait` patches gather, (wait - 1) / 2 of the texts stand still on average.
        """
        if texts < 3 or not all(self.costs.seconds(stage, 1) for stage in ("encoder", "latent", "decoder")):
            return 1
        rate = self._patches / self._bytes

        def byte_seconds(wait: int) -> float:
            active = texts - (wait - 1) / 2
            each = graph_rows(rows, ceil(active))
            steps = sum(self.costs.seconds(stage, each) for stage in STAGES if stage != "latent")
            # Of more texts than a pass has rows, nobody stands still for those that wait.
            return steps / min(active, each) + rate * self.costs.seconds("latent", wait) / wait

        best = min((one for one in rows if one <= texts), key=byte_seconds)
        return best if byte_seconds(best) < _GAIN * byte_seconds(1) else 1

    def _count(self, stage: str, group: Sequence[Waiting]) -> None:
        count = sum(one.count for one in group)
        if stage == "latent":
            self._patches += count
        elif stage == "decoder":
            self._patches *= _REMEMBER
            self._bytes = _REMEMBER * self._bytes + count
