"""Schemas, patterns and grammars, compiled by llguidance with the 256 bytes as its whole vocabulary.

The library is imported when the first constraint asks for it. What may come in from strangers is bounded: in
size (`constraint`), by the library's own limits, and in time. A compilation can't be stopped from outside,
so it runs in a thread that is left behind when it takes too long, and of those there are two at most.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

from .constraint import Constraint
from .constraint_automata import Flags
from .errors import OptionError, first_line, requirement
from .vocabulary import BYTE_OFFSET, EOS, VOCAB_SIZE

__all__ = ["LibraryRule", "compiled"]

PATIENCE = 1.0
"""Seconds that a compilation may take."""
_LEFT_BEHIND = 2
_KEPT = 32

# Smaller than the library's own where it takes seconds to reach them; the rest is as it comes.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_items_in_row": 1000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 30_000,
    "verbose_errors": False,
}
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class LibraryRule:
    """What llguidance says of one text, as a `Rule`."""

    def __init__(self, matcher: Any, words: str) -> None:
        """matcher: an LLMatcher of its own. words: what the constraint is, to begin an error with."""
        self._matcher, self._words = matcher, words

    @property
    def accepts_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    def allowed(self) -> Flags:
        flags: Flags = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[BYTE_OFFSET:] != 0
        # It does not raise: a limit that was reached ends the text, as far as it knows.
        self._check()
        return flags

    def forced(self) -> bytes:
        found: bytes = self._matcher.compute_ff_bytes()
        self._check()
        return found

    def advance(self, byte: int) -> None:
        if not self._matcher.consume_token(byte + BYTE_OFFSET):
            self._check()

    def roll_back(self, count: int) -> None:
        if not self._matcher.rollback(count):
            self._check()

    def fork(self) -> LibraryRule:
        return LibraryRule(self._matcher.deep_copy(), self._words)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OptionError(f"constraint: {self._words} can't be followed further: {self.error}")

    @property
    def error(self) -> str:
        """What the library says went wrong; empty when nothing did."""
        told = str(self._matcher.get_error())
        if told.startswith("NoExtension"):
            return "no text fits it"
        return _told(told) if told else ""


_rules: OrderedDict[Constraint, LibraryRule] = OrderedDict()
_lock = threading.Lock()
_running = threading.BoundedSemaphore(_LEFT_BEHIND)


def compiled(constraint: Constraint) -> LibraryRule:
    """A rule at the beginning of a text, of its own. Constraints used of late are kept compiled.

    Raises OptionError, one line, where the library is not installed, refuses the constraint, or takes longer
    than `PATIENCE`. Any thread may call it.
    """
    with _lock:
        rule = _rules.get(constraint)
        if rule is not None:
            _rules.move_to_end(constraint)
            return rule.fork()
    _tokenizer()  # what is missing is told before there is a thread
    rule = _in_time(lambda: _compile(constraint), constraint.words)
    with _lock:
        _rules[constraint] = rule
        while len(_rules) > _KEPT:
            _rules.popitem(last=False)
        return rule.fork()


def _in_time(work: Callable[[], LibraryRule], words: str) -> LibraryRule:
    if not _running.acquire(timeout=PATIENCE):
        raise OptionError("constraint: others are still being compiled, which take long; try again later")
    found: list[LibraryRule | Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)
        finally:
            _running.release()

    thread = threading.Thread(target=run, name="constraint", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not found:
        raise OptionError(f"constraint: {words} takes more than {PATIENCE:g} s to compile; make it simpler")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _compile(constraint: Constraint) -> LibraryRule:
    import llguidance

    matchers, words = llguidance.LLMatcher, constraint.words
    try:
        if constraint.kind == "regex":
            grammar = matchers.grammar_from_regex(constraint.source)
        elif constraint.kind == "grammar":
            grammar = matchers.grammar_from_lark(_lark(constraint.source))
        else:
            source = constraint.source or '{"type":"object"}'
            grammar = matchers.grammar_from_json_schema(source, defaults=_JSON)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"constraint: {words} can't be used: {_told(str(error))}") from None
    limits = llguidance.LLParserLimits(**_LIMITS)
    matcher = matchers(_tokenizer(), grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise OptionError(f"constraint: {words} can't be used: {_told(matcher.get_error())}")
    rule = LibraryRule(matcher, words)
    # The first step may take longer than all before it, and finds out whether there is any text that fits.
    with suppress(OptionError):
        rule.forced()
        if rule.allowed().any() or rule.accepts_end:
            return rule
    raise OptionError(f"constraint: {words} can't be used: {rule.error or 'no text fits it'}")


def _lark(grammar: str) -> str:
    """A grammar in Lark's form. Raises ValueError, RecursionError."""
    from llguidance import gbnf_to_lark

    try:
        return str(gbnf_to_lark.any_to_lark(grammar))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # of many kinds, bare ones too
        raise ValueError(f"{error} (read as GBNF: it has no rule start, as Lark has)") from None


@cache
def _tokenizer() -> Any:
    """The library's view of our ids. Raises OptionError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise OptionError(
            f"constraints need llguidance (but for choices and UTF-8); pip install {requirement('guide')}"
        ) from None
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), n_vocab=VOCAB_SIZE, slices=[])


class _Bytes:
    """A tokenizer in the library's words: an id is a byte."""

    eos_token_id = EOS
    bos_token_id = 1
    unk_token_id = None
    special_token_ids = list(range(BYTE_OFFSET))  # noqa: RUF012
    tokens = [  # noqa: RUF012
        *(b"\xff[%d]" % number for number in range(BYTE_OFFSET)),
        *(bytes([byte]) for byte in range(256)),
    ]

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [byte + BYTE_OFFSET for byte in data]


def _told(error: str) -> str:
    """What the library says, on one line, without where in its own text it is."""
    lines = error.strip().splitlines() or ["no reason was given"]
    told = next((line[len("error: ") :] for line in lines if line.startswith("error: ")), lines[0])
    return first_line(Exception(re.sub(r"^at \d+\(\d+\): ", "", told)))
