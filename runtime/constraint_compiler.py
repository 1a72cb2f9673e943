"""llguidance compiles schemas, patterns and grammars, with the 256 bytes as its whole vocabulary.

The library is imported by the first call, and nothing else that is slow to import: `tried` runs in a process
of its own (`constraint_library`). What may come in from strangers is bounded in size (`constraint`) and by
the library's own limits, for compiling and for each step. Nothing the library does ends in another error
than ours.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from .constraint import Constraint
from .errors import OptionError, first_line, requirement
from .names import BYTE_OFFSET, EOS, VOCAB_SIZE

__all__ = ["compile_matcher", "guarded", "require_library", "told_error", "tried"]

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
_MOST_AHEAD = 64
_STACK = 768 << 10  # musl's threads have 1 MiB; common schemas need less than 256 KiB
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def tried(request: Mapping[str, str]) -> None:
    """Compile a constraint of this kind and source, and drop it. Raises OptionError, one line.

    The stack is smaller than any thread's of ours: where the library calls itself too deep, as for rules that
    name each other in a row, it has to end a process here, not there.
    """
    raised: list[BaseException] = []

    def work() -> None:
        try:
            compile_matcher(Constraint(request["kind"], request["source"]))
        except BaseException as error:
            raised.append(error)

    threading.stack_size(_STACK)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def compile_matcher(constraint: Constraint) -> Any:
    """An LLMatcher at the beginning of a text, which some text fits.

    Raises OptionError, one line, where the library is not installed or refuses the constraint.
    """
    cant = f"constraint: {constraint.words} can't be used"
    matcher = guarded(cant, lambda: _matcher(constraint))
    told = told_error(matcher)
    if not told:
        # The first steps may take longer than all before them, and find out whether any text fits.
        told = guarded(cant, _first_steps, guarded(cant, matcher.deep_copy))
    if told:
        raise OptionError(f"{cant}: {told}")
    return matcher


def _first_steps(matcher: Any) -> str:
    """Go on to where there is a choice; what is wrong on the way, empty where nothing is."""
    ahead = [byte + BYTE_OFFSET for byte in matcher.compute_ff_bytes()[:_MOST_AHEAD]]
    for step in ([], ahead) if ahead else ([],):
        matcher.consume_tokens(step)
        flags = matcher.compute_logit_bias()
        if matcher.is_error() or not (any(flags[BYTE_OFFSET:]) or matcher.is_accepting()):
            return told_error(matcher) or "no text fits it"
    return ""


def guarded(cant: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call into the library returns.

    Raises OptionError, which begins with `cant`, in the place of what the library raises, and of its panics,
    which are no Exceptions.
    """
    try:
        return call(*arguments)
    except (KeyboardInterrupt, SystemExit, MemoryError, OptionError):
        raise
    except BaseException as error:
        raise OptionError(f"{cant}: {_told(str(error))}") from None


def told_error(matcher: Any) -> str:
    """What the library says went wrong; empty when nothing did."""
    told = str(matcher.get_error())
    if told.startswith("NoExtension"):
        return "no text fits it"
    return _told(told) if told else ""


def require_library() -> None:
    """Raises OptionError, with what to install, where the library is not there."""
    _tokenizer()


def _matcher(constraint: Constraint) -> Any:
    tokenizer = _tokenizer()
    import llguidance

    kind = llguidance.LLMatcher
    if constraint.kind == "regex":
        grammar = kind.grammar_from_regex(constraint.source)
    elif constraint.kind == "grammar":
        grammar = kind.grammar_from_lark(_lark(constraint.source))
    else:
        grammar = kind.grammar_from_json_schema(constraint.source or '{"type":"object"}', defaults=_JSON)
    return kind(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**_LIMITS))


def _lark(grammar: str) -> str:
    """A grammar in Lark's form. Raises ValueError."""
    from llguidance import gbnf_to_lark

    try:
        return str(gbnf_to_lark.any_to_lark(grammar))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # of many kinds, bare ones too
        raise ValueError(f"{error} (read as GBNF: it has no rule start, as Lark has)") from None


@cache
def _tokenizer() -> Any:
    """The library's view of our ids."""
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
