"""Where guesses at the next bytes come from: the decoder, the patcher, or the text itself.

All three cost less than the bytes they stand for, and none decides anything: whoever reads a draft compares
every guess with what the model chooses there (`speculation`), and a guess comes with a confidence by which
guessing goes on or stops (`Admits`). A guess uses the random number that the choice will use
(`sampling.Sampler.guess`), so sampling accepts as greedy decoding does, and no text changes.

- decoder: encoder and decoder run byte by byte on the last closed patch, boundaries ignored, which leaves
  patcher and latent stage one pass over all guesses (BLT-S, arXiv 2605.08044).
- patcher: the entropy model's own next bytes; it has to read them anyway.
- lookup: what followed when the last bytes were in the text before. Free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .sampling import Sampler
from .sequence import Draft, Sequence

__all__ = ["Admits", "LookupIndex", "Match", "draft_with_decoder", "draft_with_patcher"]

Floats = npt.NDArray[np.float32]

Admits = Callable[[float], bool]
"""admits(confidence in 0..1): whether a guess of this confidence may join the draft."""


def draft_with_patcher(
    sequence: Sequence, pending: int, count: int, sampler: Sampler, admits: Admits
) -> Draft:
    """At most `count` guesses after the chosen id `pending`, by the entropy model, which reads them all."""
    assert sequence.patcher is not None, "patches of this model need no entropies"
    ids, entropies = [pending], []
    while True:
        entropies.append(float(sequence.patcher.extend(np.array(ids[-1:], np.int64))[0]))
        assert sequence.patcher.last_logits is not None
        if not _guess(sequence, sequence.patcher.last_logits[0], ids, count, sampler, admits):
            return Draft(np.array(ids, np.int64), entropies=np.array(entropies, np.float32))


def draft_with_decoder(
    sequence: Sequence, pending: int, count: int, sampler: Sampler, admits: Admits
) -> Draft:
    """At most `count` guesses after the chosen id `pending`, as if no patch ended among them."""
    first = sequence.length
    last_closed = np.array([len(sequence.boundaries.starts) - 2], np.int64)
    ids, states = [pending], sequence.draft_states(count + 1)
    while True:
        last = len(ids) - 1
        sequence.store_ids(first + last, np.array(ids[-1:], np.int64))
        states[last : last + 1] = sequence.encode(first + last, 1)
        if len(ids) > count:
            break
        logits = sequence.decode(states[last : last + 1], last_closed)
        if not _guess(sequence, logits[0], ids, count, sampler, admits):
            break
    # What it read of a stale patch must not be seen by the pass over the right ones.
    sequence.forget_decoded()
    return Draft(np.array(ids, np.int64), states=states[: len(ids)])


def _guess(
    sequence: Sequence, logits: Floats, ids: list[int], count: int, sampler: Sampler, admits: Admits
) -> bool:
    """Add a guess to `ids`, whose first was chosen; whether there is one. The text's end is never guessed."""
    if len(ids) > count or not np.isfinite(logits).all():
        return False  # what is wrong with a guess's logits must not end a text
    # What a repetition penalty looks at: the text, and the ids that are not in it yet.
    text = np.concatenate([sequence.ids, ids]) if sampler.reads_ids else sequence.ids
    guess = sampler.guess(logits, text, len(ids) - 1)
    with np.errstate(over="ignore"):
        confidence = float(1.0 / np.exp(logits - logits[guess]).sum())
    if guess in sequence.end_ids or not admits(confidence):
        return False
    ids.append(guess)
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
