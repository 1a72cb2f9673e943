"""Where guesses at the next bytes come from: the decoder, the patcher, or the text itself.

All three cost less than the bytes they stand for, and none decides anything: whoever reads a draft compares
every guess with what the model chooses there (`speculation`), and a guess comes with a confidence by which
guessing goes on or stops (`Admits`). A guess uses the random number that the choice will use
(`sampling.Sampler.guess`), so sampling accepts as greedy decoding does, and no text changes.

- decoder: encoder and decoder run byte by byte on the last closed patch, boundaries ignored, which leaves
  patcher and latent stage one pass over all guesses (BLT-S, arXiv 2605.08044).
- patcher: the entropy model's own next bytes; it has to read them anyway.
- lookup: what followed when the last bytes were in the text before. Free.

What a constraint lets only one byte come for is no guess: such bytes stand in a draft before guesses and
between them, and cost no confidence (`Ahead`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import OptionError
from .guide import Guide
from .sampling import Sampler
from .sequence import Draft, Sequence

__all__ = ["Admits", "Ahead", "LookupIndex", "Match", "draft_with_decoder", "draft_with_patcher"]

Floats = npt.NDArray[np.float32]

Admits = Callable[[float], bool]
"""admits(confidence in 0..1): whether a guess of this confidence may join the draft."""


class Ahead:
    """The ids of a draft while it is made, and where a constraint stands behind them."""

    def __init__(self, pending: int, room: int, guide: Guide | None = None) -> None:
        """pending: the chosen id, which the guide has taken already. room: ids after it, at most."""
        self.most, self._guide = room, guide
        self.broken = False
        """Whether the constraint could not be followed to some guess, which is the guess's fault: there are
        no more ids then, and the guide is of no more use."""
        self.ids = [pending]
        """The chosen id, then those that may come next."""
        self.certain: list[bool] = []
        """Of each id but the first: whether a constraint lets no other come."""
        self._force([])

    @property
    def full(self) -> bool:
        return self.broken or len(self.certain) >= self.most

    @property
    def guesses(self) -> int:
        return self.certain.count(False)

    @property
    def forced(self) -> list[int]:
        """The ids that the constraint forces before there is any guess, while there is none."""
        return self.ids[1:]

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """bool [260]: what may come next; None without a constraint, or when it turns out `broken`."""
        try:
            return None if self._guide is None else self._guide.mask()
        except OptionError:
            self.broken = True
            return None

    def add(self, guess: int) -> None:
        """A guess that is allowed, and what can only come after it."""
        self.ids.append(guess)
        self.certain.append(False)
        self._force([guess])

    def _force(self, taken: list[int]) -> None:
        if self._guide is None:
            return
        try:
            self._guide.advance(taken)
            forced = self._guide.forced(self.most - len(self.certain))
            self._guide.advance(forced)
        except OptionError:
            self.broken = True
            return
        self.ids += forced
        self.certain += [True] * len(forced)

    def rewind(self) -> None:
        """Let the guide stand behind the chosen id again, where it is not `broken`."""
        if self._guide is not None and not self.broken:
            self._guide.roll_back(len(self.certain))


def draft_with_patcher(
    sequence: Sequence, ahead: Ahead, count: int, sampler: Sampler, admits: Admits
) -> Draft:
    """At most `count` guesses after what is known, by the entropy model, which reads all of it."""
    assert sequence.patcher is not None, "patches of this model need no entropies"
    entropies: list[float] = []
    while True:
        new = np.array(ahead.ids[len(entropies) :], np.int64)
        entropies += sequence.patcher.extend(new).tolist()
        assert sequence.patcher.last_logits is not None
        if not _guess(sequence, sequence.patcher.last_logits[-1], ahead, count, sampler, admits):
            return Draft(np.array(ahead.ids, np.int64), entropies=np.array(entropies, np.float32))


def draft_with_decoder(
    sequence: Sequence, ahead: Ahead, count: int, sampler: Sampler, admits: Admits
) -> Draft:
    """At most `count` guesses after what is known, as if no patch ended among them."""
    first, ids = sequence.length, ahead.ids
    last_closed = len(sequence.boundaries.starts) - 2
    states, done = sequence.draft_states(ahead.most + 1), 0
    while True:
        new = np.array(ids[done:], np.int64)
        sequence.store_ids(first + done, new)
        states[done : len(ids)] = sequence.encode(first + done, len(new))
        if ahead.full or ahead.guesses >= count:
            break
        logits = sequence.decode(states[done : len(ids)], np.full(len(new), last_closed, np.int64))
        done = len(ids)
        if not _guess(sequence, logits[-1], ahead, count, sampler, admits):
            break
    # What it read of a stale patch must not be seen by the pass over the right ones.
    sequence.forget_decoded()
    return Draft(np.array(ids, np.int64), states=states[: len(ids)])


def _guess(
    sequence: Sequence, logits: Floats, ahead: Ahead, count: int, sampler: Sampler, admits: Admits
) -> bool:
    """Add a guess; whether there is one. The text's end is never guessed."""
    if ahead.full or ahead.guesses >= count or not np.isfinite(logits).all():
        return False  # what is wrong with a guess's logits must not end a text
    # What a repetition penalty looks at: the text, and the ids that are not in it yet.
    text = np.concatenate([sequence.ids, ahead.ids]) if sampler.reads_ids else sequence.ids
    allowed = ahead.allowed()
    if ahead.broken:
        return False
    guess = sampler.guess(logits, text, len(ahead.certain), allowed)
    with np.errstate(over="ignore"):
        weights = np.exp((logits if allowed is None else logits[allowed]) - logits[guess])
        confidence = float(1.0 / weights.sum())
    if guess in sequence.end_ids or not admits(confidence):
        return False
    ahead.add(guess)
    return True


@dataclass(frozen=True)
class Match:
    """An earlier place in the text that ends like the text does."""

    next: int
    """Position of the id that followed there."""
    length: int
    """Ids in common, up to `LookupIndex.LONGEST`."""

    def confidence(self, index: int) -> float:
        """Of the guess at `index`: the more ids are in common up to there, the likelier it is right."""
        return min(self.length + index, LookupIndex.LONGEST) / (LookupIndex.LONGEST + 1)


class LookupIndex:
    """The text so far, and where each of its n-grams was last."""

    SHORTEST = 4
    """Ids that must have been there before."""
    LONGEST = 24
    """A longer match says nothing more."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self._match: Match | None = None

    def extend(self, ids: list[int]) -> None:
        text, places, size = self._text, self._places, self.SHORTEST
        before: int | None = None
        for number in ids:
            text.append(number)
            if len(text) >= size:
                key = tuple(text[-size:])
                before = places.get(key)
                places[key] = len(text)
        self._match = None
        if before is not None:
            length, longest = size, min(self.LONGEST, before)
            while length < longest and text[before - length - 1] == text[-length - 1]:
                length += 1
            self._match = Match(before, length)

    def find(self) -> Match | None:
        """The last place but this one where the last `SHORTEST` ids stand."""
        return self._match

    def guesses(self, match: Match, count: int) -> list[int]:
        """`count` ids that may come next; at the text's end they go on with the first of them."""
        text, start = self._text, match.next
        period = len(text) - start
        return [text[start + index % period] for index in range(count)]
