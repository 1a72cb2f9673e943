"""Rounds of guessing and checking: several bytes for one pass over the stages, and the same bytes.

A round reads the chosen byte that the sequence has not seen yet together with guesses after it, chooses after
each of them as it would have anyway, and stops at the first choice that is not the guess. The sequence is
rolled back to there, so the text and its random numbers are those of decoding byte by byte, to the rounding
of the engine's sums. One pass is enough: a patch that closes among accepted bytes is the same in the draft,
and no accepted byte reads a patch that the correction cuts short (arXiv 2605.08044).

Where the text has to fit something, a guide says at each place what may be chosen; what can only come next
joins the round without being guessed, unless there are to be no drafts at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .costs import CostTable
from .drafting import Ahead, LookupIndex, Match, draft_with_decoder, draft_with_patcher
from .errors import BackendError, OptionError
from .guide import new_guide
from .lanes import own_seconds
from .options import GenerationOptions
from .planning import Plan, Planner
from .sampling import Sampler
from .sequence import Draft, Sequence
from .vocabulary import decode

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
    forced: int = 0
    """Bytes that could only come next, read together with others; they are no guesses."""


def check_draft(options: GenerationOptions, sequence: Sequence) -> None:
    """Raise OptionError when the sequence can't be read on, or its model cannot draft as the options ask."""
    sequence.check_readable()
    if options.draft == "patcher" and sequence.patcher is None:
        raise OptionError(
            "draft: got 'patcher', but this model's patches need no entropy model; "
            "take auto, decoder or lookup"
        )


class Speculator:
    """Chooses the ids of one text, one or several at a time. Raises OptionError as `check_draft` does, and
    as `new_guide`; later where a constraint can't be followed further."""

    def __init__(
        self, sequence: Sequence, sampler: Sampler, options: GenerationOptions, costs: CostTable
    ) -> None:
        check_draft(options, sequence)
        self._sequence, self._sampler, self._options = sequence, sampler, options
        self._guide = new_guide(options, sequence.end_ids)
        self._begun = 0  # ids before the text that is chosen
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
        self._begun = len(ids)
        # Again: what was read since may end inside a character.
        self._guide = new_guide(self._options, self._sequence.end_ids, decode(ids[-3:]))
        chosen = self._choose(logits, ids)
        if self._index is not None:
            self._index.extend([*ids.tolist(), chosen])
        return chosen

    @property
    def ended(self) -> bool:
        """Whether nothing can be added, because the text fits what it has to as it is."""
        return self._guide is not None and self._guide.ended

    def _choose(self, logits: Floats, ids: npt.NDArray[np.int64]) -> int:
        guide = self._guide
        if guide is None:
            return self._sampler(logits, ids)
        chosen = self._sampler(logits, ids, guide.mask())
        if chosen not in self._sequence.end_ids:
            guide.advance([chosen])
        return chosen

    def round(self, pending: int, most: int) -> list[int]:
        """Read the chosen id `pending`; returns the next ids, 1 to `most`, the last of which is not read."""
        started, staged = own_seconds(), self._sequence.stage_seconds
        room = self._room(most)
        ahead = Ahead(pending, room, None if self._options.draft == "none" else self._guide)
        plan = self._plan(room, ahead.forced)
        try:
            draft = self._draft(plan, ahead)
        except BackendError as error:
            self._sequence.recover(error)
            draft = Draft(np.array([pending], np.int64))
        finally:
            ahead.rewind()
            if ahead.broken:
                self._follow_again(pending)
        chosen = self._check(draft)
        if self._index is not None:
            self._index.extend(chosen)
        certain, right = ahead.certain[: len(draft.ids) - 1], ahead.certain[: len(chosen) - 1]
        drafted, accepted = certain.count(False), right.count(False)
        self.figures.forced += right.count(True)
        if drafted:
            self.figures.rounds += 1
            self.figures.drafted += drafted
            self.figures.accepted += accepted
            self.figures.missed += accepted < drafted
        seconds = own_seconds() - started
        host_seconds = seconds - (self._sequence.stage_seconds - staged)
        if certain.count(True):
            self._planner.learn_guesses(plan, accepted)
        else:
            self._planner.learn(plan, drafted, accepted, seconds, host_seconds)
        return chosen

    def _follow_again(self, pending: int) -> None:
        """A guide in the place of one that is of no more use."""
        ids = self._sequence.ids
        self._guide = new_guide(self._options, self._sequence.end_ids, decode(ids[: self._begun][-3:]))
        if self._guide is not None:
            self._guide.advance([*ids[self._begun :].tolist(), pending])

    def _room(self, most: int) -> int:
        """Ids after the chosen one that a round may read."""
        sequence, limits = self._sequence, self._sequence.limits
        left = limits.max_positions - sequence.length - 1
        return min(most - 1, left, limits.rollback, limits.prefill_chunk - 1)

    def _plan(self, room: int, forced: list[int]) -> Plan:
        sequence = self._sequence
        match = self._index.find() if self._index is not None else None
        if match is not None and forced and self._index.guesses(match, len(forced)) != forced:  # type: ignore[union-attr]
            match = None
        patches = sequence.patches_closed / max(1, sequence.length)
        return self._planner.plan(match, room - len(forced), patches)

    def _draft(self, plan: Plan, ahead: Ahead) -> Draft:
        admits = plan.gate.admits
        if plan.source == "decoder":
            return draft_with_decoder(self._sequence, ahead, plan.length, self._sampler, admits)
        if plan.source == "patcher":
            return draft_with_patcher(self._sequence, ahead, plan.length, self._sampler, admits)
        if plan.source == "lookup":
            assert plan.match is not None
            self._look_up(plan, plan.match, ahead)
        return Draft(np.array(ahead.ids, np.int64))

    def _look_up(self, plan: Plan, match: Match, ahead: Ahead) -> None:
        # As far as what followed earlier may come now, and is what has to come where something has to.
        assert self._index is not None
        found = self._index.guesses(match, plan.length if self._guide is None else ahead.most)
        while not ahead.full and ahead.guesses < plan.length:
            place = len(ahead.certain)
            guess, allowed = found[place], ahead.allowed()
            if guess in self._sequence.end_ids or (allowed is not None and not allowed[guess]):
                return
            if ahead.broken or not plan.gate.admits(match.confidence(place)):
                return
            ahead.add(guess)
            if ahead.ids[place + 1 :] != found[place : len(ahead.certain)]:
                return

    def _check(self, draft: Draft) -> list[int]:
        """Read the draft, choose after each of its ids until a choice is another, forget the rest."""
        sequence = self._sequence
        first, count = sequence.length, len(draft.ids)
        self.rows = rows = sequence.read(draft).logits
        chosen: list[int] = []
        for row in range(count):
            chosen.append(self._choose(rows[row], sequence.ids[: first + row + 1]))
            if row + 1 == count or chosen[-1] != draft.ids[row + 1] or chosen[-1] in sequence.end_ids:
                break
            if self.ended:
                break
        sequence.roll_back(count - len(chosen))
        return chosen
