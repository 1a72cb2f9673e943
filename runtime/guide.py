"""Where a text stands in what it has to fit: which ids may come next, and which can only come next.

A guide goes with one text: it takes every chosen id, and is rolled back and forked as the text's sequence is.
What it does not know: logits, how ids are chosen, how drafts are made.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .constraint import Constraint
from .constraint_automata import ChoiceRule, Flags, Rule, Utf8Rule, cut_character
from .constraint_library import LibraryRule, compiled
from .errors import OptionError
from .options import GenerationOptions
from .vocabulary import BYTE_OFFSET, EOS, VOCAB_SIZE

__all__ = ["Guide", "Prepared", "new_guide", "prepare"]


class Prepared:
    """Keeps what `prepare` compiled, for as long as it is there itself."""

    def __init__(self, rule: LibraryRule) -> None:
        self._rule = rule

    @property
    def spent(self) -> bool:
        """Whether its texts have filled up so much of what they share that others should begin anew: it goes
        with who keeps it."""
        return self._rule.spent


def prepare(options: GenerationOptions) -> Prepared | None:
    """Compile the options' constraint, which may take a second: `new_guide` is quick while what is returned
    is kept, whatever else is compiled meanwhile. Any thread may call it.

    None where nothing needs compiling; that costs nothing. Raises OptionError as `new_guide` does.
    """
    constraint = options.constraint
    return None if constraint is None or constraint.kind == "choice" else Prepared(compiled(constraint))


def new_guide(
    options: GenerationOptions, end_ids: Iterable[int] = (EOS,), before: bytes = b""
) -> Guide | None:
    """A guide at the beginning of a new text; None where anything may come.

    end_ids: those that end a text. before: the last bytes of the text before the new one: where they end
    inside a character and there is no other constraint, UTF-8 begins with that character's other bytes.
    Raises OptionError for a constraint that can't be used.
    """
    rules: list[Rule] = []
    constraint = options.constraint
    if constraint is not None:
        rules.append(_rule(constraint))
    if options.utf8:
        rules.append(Utf8Rule(b"" if rules else cut_character(before)))
    return Guide(rules, end_ids) if rules else None


def _rule(constraint: Constraint) -> Rule:
    return ChoiceRule(constraint.texts) if constraint.kind == "choice" else compiled(constraint)


class Guide:
    """What may come next in one text. Its methods raise OptionError when a rule can't be followed further."""

    def __init__(self, rules: Iterable[Rule], end_ids: Iterable[int] = (EOS,)) -> None:
        """rules: each has to be kept; at least one. end_ids: ids that end the text; they are no bytes of it,
        and allowed where all rules accept the end."""
        self._rules, self._end_ids = list(rules), sorted(end_ids)
        self._mask: Flags | None = None
        self._length = 0

    def mask(self) -> Flags:
        """bool [260]: the ids that may come next, at least one; valid until the guide moves."""
        if self._mask is None:
            mask = np.zeros(VOCAB_SIZE, np.bool_)
            mask[BYTE_OFFSET:] = self._rules[0].allowed()
            for rule in self._rules[1:]:
                mask[BYTE_OFFSET:] &= rule.allowed()
            mask[self._end_ids] = self.accepts_end
            if not mask.any():
                raise OptionError(
                    f"constraint: after {self._length} bytes nothing can come next that fits it and is a "
                    "byte of this model's texts; change the constraint"
                )
            self._mask = mask
        return self._mask

    @property
    def accepts_end(self) -> bool:
        """Whether the text fits as it is."""
        return all(rule.accepts_end for rule in self._rules)

    @property
    def ended(self) -> bool:
        """Whether the text fits as it is, and nothing can be added to it."""
        if not self.accepts_end:
            return False
        return int(np.count_nonzero(self.mask())) == len(self._end_ids)

    def forced(self, most: int) -> list[int]:
        """Ids that can only come next, one after the other, at most so many; none is taken."""
        if most < 1:
            return []
        taken: list[int] = []
        try:
            while len(taken) < most and (ids := self._forced_now(most - len(taken))):
                taken += ids
                self.advance(ids)
        finally:
            self.roll_back(len(taken))
        return taken

    def _forced_now(self, most: int) -> list[int]:
        for number, rule in enumerate(self._rules):
            data = rule.forced()[:most]
            if not data:
                continue
            ids = [byte + BYTE_OFFSET for byte in data]
            if any(other in self._end_ids for other in ids):
                return []
            if len(self._rules) > 1:
                others = [other.fork() for index, other in enumerate(self._rules) if index != number]
                ids = ids[: min(_taken(other, data) for other in others)]
            return ids
        return []

    def advance(self, ids: Iterable[int]) -> None:
        """Take bytes' ids, each of which was allowed at its place."""
        for number in ids:
            for rule in self._rules:
                rule.advance(number - BYTE_OFFSET)
            self._length += 1
            self._mask = None

    def roll_back(self, count: int) -> None:
        """Take back the last `count` ids."""
        if count:
            for rule in self._rules:
                rule.roll_back(count)
            self._length -= count
            self._mask = None

    def fork(self) -> Guide:
        """Another guide at the same place; neither sees what the other takes."""
        other = Guide((rule.fork() for rule in self._rules), self._end_ids)
        other._mask, other._length = self._mask, self._length
        return other


def _taken(rule: Rule, data: bytes) -> int:
    """How many of the bytes a rule allows, one after the other; it moves on."""
    for count, byte in enumerate(data):
        if not rule.allowed()[byte]:
            return count
        rule.advance(byte)
    return len(data)
