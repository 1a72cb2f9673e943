"""A text that a person and the model continue in turns, and the sequence that has read it.

The sequence holds the text, or a beginning of it: then `unread` comes with the next turn. So a stopped
answer, a prompt that was interrupted and a state that had to be dropped are all the same case. Of each turn
the state before it is kept, a fork, as long as memory allows: taking turns back, however many, reads nothing
again, and of a turn that broke nothing but the turn is.
What it does not know: terminals, commands, lines (but for `typed_text`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...runtime import (
    BackendError,
    BltModel,
    FinishReason,
    GenerationOptions,
    GenerationStats,
    OptionError,
    Sequence,
)
from ...runtime.errors import ran_out_of_memory
from ...runtime.prefix_store import spare_memory
from ...runtime.speculation import check_draft
from ...runtime.state import memory_of
from ...runtime.vocabulary import byte_ids, decode, encode
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

    def __init__(
        self,
        model: BltModel,
        options: GenerationOptions,
        start: bytes | Sequence = b"",
        memory: Callable[[], int] | None = None,
    ) -> None:
        """start: the text before the first turn, or a sequence that has read it. memory: bytes that states
        before turns may take, asked at each turn; None: what the runtime says is to spare. Raises OptionError
        when the model can't do what is asked, or the sequence's text has ids that are no bytes.
        """
        self.model, self._engine = model, model.engine
        self._memory = partial(spare_memory, model) if memory is None else memory
        self.sequence = model.sequence() if isinstance(start, bytes) else start
        self._start = start if isinstance(start, bytes) else decode(start.ids)
        if 1 + len(self._start) < self.sequence.length:
            raise OptionError("the text of the state has ids that are no bytes; chat goes on with bytes only")
        self.past: list[GenerationStats] = []
        """Figures of all turns, those taken back included."""
        self.turns: list[Turn] = []
        self._text, self._utf8 = bytearray(self._start), WholeCharacters()
        self._kept: deque[Sequence] = deque()  # of beginnings of the text, the shortest first
        self.set_options(options)

    def reset(self) -> None:
        """Go back to the text before the first turn."""
        self.turns.clear()
        self._go_back(len(self._start))

    def drop_state(self) -> None:
        """Forget what was computed since the last state that was kept; it is read with the next turn."""
        self._drop_useless()
        self.sequence = self._kept[-1].fork() if self._kept else self.model.sequence()

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
    def kept(self) -> int:
        """States of earlier turns that can be gone back to."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Memory that they take beside the state of now, in bytes."""
        now = self.sequence.state
        return memory_of([*(kept.state for kept in self._kept), now]) - now.bytes

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

    def save(self, path: Path) -> None:
        """Write the text's state to a file, whole or not at all; what is unread is read first.

        Raises ChatError where there is no state of the whole text, WriteError.
        """
        if not self._text:
            raise ChatError("there is no text yet")
        if 1 + len(self._text) > self.positions:
            raise ChatError(f"the last byte has no position, so there is no state of it; {ADVICE}")
        if self.unread:
            self.read()
        self.sequence.save(path)

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
        self._keep_state()
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
        self._drop_useless()  # what they share with the state of now became less
        return Reply(reason, stats, stats.patches - new, self._utf8.pending > 0)

    def undo(self) -> tuple[int, int]:
        """Take back the last turn: how many bytes were the person's and how many the model's.

        Runs no stage: where the state before the turn was dropped, the text is `unread`. Raises ChatError
        when there is no turn.
        """
        if not self.turns:
            raise ChatError("there is no turn to take back")
        turn = self.turns.pop()
        made = len(self._text) - turn.start - turn.typed
        self._go_back(turn.start)
        return turn.typed, made

    def _go_back(self, length: int) -> None:
        """Let the text end after so many bytes."""
        del self._text[length:]
        self._utf8.flush()
        while self._kept and self._kept[-1].length > 1 + length:
            self._kept.pop()
        if self.sequence.length <= 1 + length:
            return
        if not self.sequence.state.can_roll_back(1 + length):
            self.drop_state()
            return
        with self._state_at_risk():
            self.sequence.roll_back(self.sequence.length - 1 - length)

    def _keep_state(self) -> None:
        """Keep the state of now, before a turn, and as many earlier ones as there is memory for."""
        kept = self._kept
        if not self.sequence.length or (kept and kept[-1].length == self.sequence.length):
            return
        with suppress(BackendError, MemoryError):  # a state that can't be kept is one that was dropped
            kept.append(self.sequence.fork())
        self._drop_useless()

    def _drop_useless(self) -> None:
        # States of an engine that has failed since, and the oldest beyond what there is memory for.
        if self.model.engine is not self._engine:
            self._kept.clear()
            self._engine = self.model.engine
        most = self._memory()
        while self._kept and self.kept_bytes > most:
            self._kept.popleft()

    @contextmanager
    def _state_at_risk(self) -> Iterator[None]:
        # What a broken pass leaves is of no use.
        try:
            yield
        except BaseException as error:
            if self._kept and ran_out_of_memory(error):
                self.sequence = self._kept.pop()  # no fork of it: the others' memory is needed
                self._kept.clear()
            else:
                self.drop_state()
            raise
