"""Rounds of guessing and checking: several bytes for one pass over the stages, and the same bytes.

A round reads the chosen byte that the sequence has not seen yet together with guesses after it, chooses after
each of them as it would have anyway, and stops at the first choice that is not the guess. The sequence is
rolled back to there, so the text and its random numbers are those of decoding byte by byte, to the rounding
of the engine's sums. One pass is enough: a patch that closes among accepted bytes is the same in the draft,
and no accepted byte reads a patch that the correction cuts short (arXiv 2605.08044).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .costs import CostTable
from .drafting import LookupIndex, draft_with_decoder, draft_with_patcher
from .errors import BackendError, OptionError
from .lanes import own_seconds
from .options import GenerationOptions
from .planning import Plan, Planner
from .sampling import Sampler
from .sequence import Draft, Sequence

__all__ = ["DraftFigures", "Speculator", "check_draft"]

Floats = npt.NDArray[np.float32]


@dataclass
class DraftFigures:
    """What drafting has done so far."""

    rounds: int = 0
    """Rounds with at least one guess."""
    drafted: int = 0
    """Guesses in them."""
    accepted: int = 0
    """Guesses that were right."""
    missed: int = 0
    """Rounds that a wrong guess ended."""


def check_draft(options: GenerationOptions, sequence: Sequence) -> None:
    """Raise OptionError when the sequence can't be read on, or its model cannot draft as the options ask."""
    sequence.check_readable()
    if options.draft == "patcher" and sequence.patcher is None:
        raise OptionError(
            "draft: got 'patcher', but this model's patches need no entropy model; "
            "take auto, decoder or lookup"
        )


class Speculator:
    """Chooses the ids of one text, one or several at a time. Raises OptionError as `check_draft` does."""

    def __init__(
        self, sequence: Sequence, sampler: Sampler, options: GenerationOptions, costs: CostTable
    ) -> None:
        check_draft(options, sequence)
        self._sequence, self._sampler = sequence, sampler
        self._index = LookupIndex() if options.draft in ("auto", "lookup") else None
        self._planner = Planner(costs, options, has_patcher=sequence.patcher is not None)
        self.figures = DraftFigures()
        self.rows: Floats = np.empty((0, 0), np.float32)
        """Logits [S, 260] that the last ids were chosen from, one row each, maybe more rows behind. A view
        that the sequence's next step overwrites."""

    def begin(self) -> int:
        """The first id after what the sequence has read."""
        logits, ids = self._sequence.logits, self._sequence.ids
        self.rows = logits[None]
        chosen = self._sampler(logits, ids)
        if self._index is not None:
            self._index.extend([*ids.tolist(), chosen])
        return chosen

    def round(self, pending: int, most: int) -> list[int]:
        """Read the chosen id `pending`; returns the next ids, 1 to `most`, the last of which is not read."""
        started, staged = own_seconds(), self._sequence.stage_seconds
        plan = self._plan(most)
        try:
            draft = self._draft(plan, pending)
        except BackendError as error:
            self._sequence.recover(error)
            draft = Draft(np.array([pending], np.int64))
        chosen = self._check(draft)
        if self._index is not None:
            self._index.extend(chosen)
        drafted, accepted = len(draft.ids) - 1, len(chosen) - 1
        if drafted:
            self.figures.rounds += 1
            self.figures.drafted += drafted
            self.figures.accepted += accepted
            self.figures.missed += accepted < drafted
        seconds = own_seconds() - started
        host_seconds = seconds - (self._sequence.stage_seconds - staged)
        self._planner.learn(plan, drafted, accepted, seconds, host_seconds)
        return chosen

    def _plan(self, most: int) -> Plan:
        sequence = self._sequence
        limits = sequence.limits
        room = min(
            most - 1, limits.max_positions - sequence.length - 1, limits.rollback, limits.prefill_chunk - 1
        )
        match = self._index.find() if self._index is not None else None
        patches = sequence.patches_closed / max(1, sequence.length)
        return self._planner.plan(match, room, patches)

    def _draft(self, plan: Plan, pending: int) -> Draft:
        admits = plan.gate.admits
        if plan.source == "decoder":
            return draft_with_decoder(self._sequence, pending, plan.length, self._sampler, admits)
        if plan.source == "patcher":
            return draft_with_patcher(self._sequence, pending, plan.length, self._sampler, admits)
        ids = [pending]
        if plan.source == "lookup":
            assert self._index is not None
            assert plan.match is not None
            for place, guess in enumerate(self._index.guesses(plan.match, plan.length)):
                if guess in self._sequence.end_ids or not admits(plan.match.confidence(place)):
                    break
                ids.append(guess)
        return Draft(np.array(ids, np.int64))

    def _check(self, draft: Draft) -> list[int]:
        """Read the draft, choose after each of its ids until a choice is another, forget the rest."""
        sequence, sampler = self._sequence, self._sampler
        first, count = sequence.length, len(draft.ids)
        self.rows = rows = sequence.read(draft).logits
        chosen: list[int] = []
        for row in range(count):
            chosen.append(sampler(rows[row], sequence.ids[: first + row + 1]))
            if row + 1 == count or chosen[-1] != draft.ids[row + 1] or chosen[-1] in sequence.end_ids:
                break
        sequence.roll_back(count - len(chosen))
        return chosen
