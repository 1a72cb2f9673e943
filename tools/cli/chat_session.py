"""A text that a person and the model continue in turns, and the one sequence that has read it.

The sequence holds the text, or a beginning of it: then `unread` comes with the next turn. So a stopped
answer, a prompt that was interrupted and a state that had to be dropped are all the same case, and but for
the last nothing is ever read twice.
What it does not know: terminals, commands, lines (but for `typed_text`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ...runtime import BltModel, FinishReason, GenerationOptions, GenerationStats
from ...runtime.speculation import check_draft
from ...runtime.vocabulary import byte_ids, encode
from ..output import WholeCharacters

ADVICE = "/undo takes back the last turn, /reset starts over"
"""What to do when positions run out."""


class ChatError(Exception):
    """What can't be done now, in one line; nothing has changed."""


def typed_text(line: bytes, text: bytes) -> bytes:
    r"""What a typed line, given without its newline, adds to a text.

    The line stands on a line of its own: it ends with a newline, and one comes before it where the text does
    not end with one. A backslash at either end leaves that newline out; two are one that is meant. An
    empty line adds nothing; a single backslash adds just a newline.
    """
    if not line:
        return b""
    before, after = b"" if not text or text.endswith(b"\n") else b"\n", b"\n"
    if line.startswith(b"\\\\"):
        before, line = before + b"\\", line[2:]
    elif line.startswith(b"\\"):
        before, line = b"", line[1:]
    if line.endswith(b"\\\\"):
        line = line[:-1]
    elif line.endswith(b"\\"):
        line, after = line[:-1], b""
    return before + line + after


@dataclass(frozen=True)
class Turn:
    """What was added in one go, first by the person, then by the model."""

    start: int
    """Bytes of text before it."""
    typed: int
    """Bytes the person added; those of the model reach up to the next turn."""


@dataclass(frozen=True)
class Reply:
    """How a turn ended."""

    reason: FinishReason
    stats: GenerationStats
    patches: int
    """Patches that begin in the turn, without the one that BOS is alone in."""
    cut: bool
    """The last character lacks bytes, which the next turn may bring."""


class ChatSession:
    """The text, its turns and its state."""

    def __init__(self, model: BltModel, options: GenerationOptions, start: bytes = b"") -> None:
        """start: the text before the first turn. Raises OptionError when the model can't do what is asked."""
        self.model, self._start = model, start
        self.past: list[GenerationStats] = []
        """Figures of all turns, those taken back included."""
        self.reset()
        self.set_options(options)

    def reset(self) -> None:
        self._text = bytearray(self._start)
        self.turns: list[Turn] = []
        self._utf8 = WholeCharacters()
        self.drop_state()

    def drop_state(self) -> None:
        """Forget what was computed; the text is read again with the next turn."""
        self.sequence = self.model.sequence()

    def set_options(self, options: GenerationOptions) -> None:
        check_draft(options, self.sequence)
        self.options = options

    def change(self, **fields: Any) -> None:
        """Set some fields of the options. Raises OptionError, with nothing changed."""
        self.set_options(replace(self.options, **fields))

    @property
    def text(self) -> bytes:
        return bytes(self._text)

    @property
    def unread(self) -> bytes:
        """The end of the text that the sequence has not read."""
        return bytes(self._text[max(0, self.sequence.length - 1) :])

    @property
    def positions(self) -> int:
        """Positions the model has, that of BOS included."""
        return self.sequence.limits.max_positions

    @property
    def positions_left(self) -> int:
        """Bytes that can still be added."""
        return max(0, self.positions - 1 - len(self._text))

    def read(self) -> None:
        """Read what is unread now, instead of with the next turn. Raises PromptTooLongError."""
        data = self.unread
        with self._state_at_risk():
            for _ in self.sequence.extend(byte_ids(data) if self.sequence.length else encode(data)):
                pass

    def turn(self, typed: bytes, write: Callable[[bytes], None], cancel: threading.Event) -> Reply:
        """Add `typed`, let the model go on, and `write` its text as it comes, in whole characters, until
        `cancel` is set.

        Raises ChatError, with nothing changed, when no position is left. After any other exception the text
        keeps what was written.
        """
        if 1 + len(self._text) + len(typed) > self.positions:
            if self.positions_left == 0:
                raise ChatError(f"all {self.positions} positions of the model are used; {ADVICE}")
            raise ChatError(
                f"this needs {len(typed)} positions, {self.positions_left} of {self.positions} are left; "
                f"add less, or {ADVICE}"
            )
        prompt, new = self.unread + typed, self.sequence.length == 0
        self.turns.append(Turn(len(self._text), len(typed)))
        self._text += typed
        if typed:
            self._utf8.flush()  # what was cut stays cut
        reason, stats = None, None
        with self._state_at_risk():
            for chunk in self.model.stream(prompt, self.options, sequence=self.sequence, cancel=cancel):
                self._text += chunk.data
                reason, stats = chunk.finish_reason, chunk.stats
                write(self._utf8.push(chunk.data))
        assert reason is not None
        assert stats is not None
        self.past.append(stats)
        return Reply(reason, stats, stats.patches - new, self._utf8.pending > 0)

    def undo_reads(self) -> int:
        """Bytes that `undo` may have to read again."""
        start = self.turns[-1].start if self.turns else len(self._text)
        return start if self.sequence.length - 1 - start > self.sequence.limits.rollback else 0

    def undo(self) -> tuple[int, int]:
        """Take back the last turn: how many bytes were the person's and how many the model's.

        Raises ChatError when there is none.
        """
        if not self.turns:
            raise ChatError("there is no turn to take back")
        turn = self.turns.pop()
        made = len(self._text) - turn.start - turn.typed
        del self._text[turn.start :]
        self._utf8.flush()
        with self._state_at_risk():
            self.sequence.roll_back(max(0, self.sequence.length - 1 - turn.start))
        return turn.typed, made

    @contextmanager
    def _state_at_risk(self) -> Iterator[None]:
        # What a broken pass leaves is of no use.
        try:
            yield
        except BaseException:
            self.drop_state()
            raise
