"""What a text has to fit: a small value that options carry, checked when made, compiled when used.

What this does not know: the library that compiles schemas, patterns and grammars (`constraint_library`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .errors import OptionError
from .fields import checked_bytes, parse_json, shown

__all__ = ["CONSTRAINTS", "LONGEST_SOURCE", "MOST_CHOICES", "Constraint"]

CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choice")
"""Kinds of constraints."""

LONGEST_SOURCE = 65536
"""Bytes of a schema, pattern or grammar, at most; of all texts of a choice, sixteen times that."""

MOST_CHOICES = 10000
"""Texts of a choice, at most."""

# Repeats are unrolled where they overlap others, and a multiple's remainders are states: both are many in a
# few characters.
_MOST_REPEATS = 20000
_LARGEST_MULTIPLE = 20000
# Their order is free where none is required: the time to compile grows with the square.
_MOST_PROPERTIES = 1000
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([0-9.eE+-]+)')

_COMMENT = re.compile(r"(?://|#)[^\n]*")
# Up to where each ends, or could not go on; the group says that it ends.
_SPANS = {
    '"': re.compile(r'"(?:\\.|[^"\\\n])*("?)'),
    "/": re.compile(r"/(?:\\.|[^/\\\n])*(/?)"),
    "<": re.compile(r"<[^\s>]*(>?)"),
}
_OPENS = re.compile('["/<#]')


@dataclass(frozen=True)
class Constraint:
    """What the new text, alone and whole, has to be. Make one with the functions below.

    Texts that fit are valid UTF-8 (of a choice, where its texts are). Raises OptionError, one line, for what
    is too long, or plainly wrong; what a library finds wrong is told when a text begins.
    """

    kind: str
    """One of `CONSTRAINTS`."""

    source: str = ""
    """The schema as JSON, the pattern, or the grammar."""

    texts: tuple[bytes, ...] = ()
    """Of a choice: its texts."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in CONSTRAINTS:
            raise OptionError(f"constraint: kind is {shown(self.kind)}; allowed are {', '.join(CONSTRAINTS)}")
        if self.kind == "choice":
            object.__setattr__(self, "texts", _checked_texts(self.texts))
        elif self.texts:
            raise OptionError(f"constraint: texts belong to a choice, not to {self.kind}; leave them out")
        if self.kind in ("choice", "json_object"):
            if self.source:
                raise OptionError(f"constraint: {self.kind} has no source; leave it out")
            return
        object.__setattr__(self, "source", _checked_source(self.kind, self.source))

    @classmethod
    def json_schema(cls, schema: str | bytes | Mapping[str, Any] | bool) -> Constraint:
        """JSON that a schema describes, given as JSON text or as the object that it says.

        The text is written as `json.dumps` writes it by default: a space after each comma and colon and no
        other white space outside strings; properties come in the schema's order. The schema's own
        "x-guidance" goes before that: "whitespace_flexible", "item_separator", "key_separator".
        """
        if not isinstance(schema, (str, bytes)):
            try:
                schema = json.dumps(schema)
            except (TypeError, ValueError, RecursionError):
                raise OptionError(
                    f"constraint: the JSON schema is {shown(schema)}; allowed is JSON"
                ) from None
        return cls("json_schema", _text("json_schema", schema))

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that the pattern matches from its first to its last byte.

        In the syntax of Rust's crate `regex`, which is Python's without look-around and references.
        """
        return cls("regex", _text("regex", pattern))

    @classmethod
    def grammar(cls, grammar: str) -> Constraint:
        """Text of a grammar in llguidance's kind of Lark (its first rule is `start`), or llama.cpp's GBNF
        (`root`)."""
        return cls("grammar", _text("grammar", grammar))

    @classmethod
    def choice(cls, texts: Iterable[str | bytes]) -> Constraint:
        """One of some texts. A str is taken as UTF-8. Needs no library."""
        return cls("choice", texts=texts)  # type: ignore[arg-type]

    @property
    def words(self) -> str:
        """What it is, to begin an error with."""
        return {"json_schema": "the JSON schema", "json_object": "the JSON object"}.get(
            self.kind, f"the {self.kind}"
        )


def _text(kind: str, source: object) -> str:
    try:
        return source.decode() if isinstance(source, bytes) else source  # type: ignore[return-value]
    except UnicodeDecodeError:
        raise OptionError(f"constraint: the {kind} is not valid UTF-8") from None


def _checked_source(kind: str, source: object) -> str:
    if not isinstance(source, str):
        raise OptionError(f"constraint: the {kind} is {shown(source)}; allowed is a text")
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        raise OptionError(f"constraint: the {kind} is not valid Unicode: {shown(source)}") from None
    if size > LONGEST_SOURCE:
        raise OptionError(
            f"constraint: the {kind} has {size} bytes; allowed are {LONGEST_SOURCE}, so shorten it"
        )
    if kind == "json_schema":
        return _checked_schema(source)
    if kind == "regex":
        _check_pattern(source)
    elif not source.strip():
        raise OptionError("constraint: the grammar is empty; give a rule start (Lark) or root (GBNF)")
    elif _MULTIPLE.search(source):
        raise OptionError('constraint: the grammar has "multipleOf"; give a JSON schema by itself for that')
    else:
        for token in _tokens(source):
            raise OptionError(
                f"constraint: the grammar names a token, {shown(token)}; here are bytes only; give a string"
            )
    return source


def _tokens(grammar: str) -> Iterator[str]:
    """What is written like a token's name, outside of strings, patterns and comments.

    What opens and is not closed is looked along once, as nothing that opens inside of it is closed either:
    else a grammar of 64 KB takes a minute.
    """
    at, open_until = 0, dict.fromkeys(_SPANS, 0)
    while opening := _OPENS.search(grammar, at):
        at, kind = opening.end(), opening[0]
        if comment := _COMMENT.match(grammar, opening.start()):
            at = comment.end()
        elif opening.start() >= open_until[kind]:
            span = _SPANS[kind].match(grammar, opening.start())
            assert span is not None
            if not span[1]:
                open_until[kind] = span.end()
                continue
            at = span.end()
            if kind == "<":
                yield span[0]


def _checked_texts(texts: object) -> tuple[bytes, ...]:
    found: list[bytes] = []
    with suppress(TypeError):
        if not isinstance(texts, (str, bytes, bytearray)) and isinstance(texts, Iterable):
            found = [checked_bytes("constraint: a choice", text) for text in texts]
            if not found:
                raise OptionError("constraint: the choice has no texts; give one at least")
    if not found:
        raise OptionError(f"constraint: the choice is {shown(texts)}; allowed is a list of texts")
    if len(found) > MOST_CHOICES or sum(map(len, found)) > 16 * LONGEST_SOURCE:
        raise OptionError(
            f"constraint: the choice has {len(found)} texts of {sum(map(len, found))} bytes; allowed are "
            f"{MOST_CHOICES} of {16 * LONGEST_SOURCE}"
        )
    return tuple(sorted(set(found)))


def _checked_schema(source: str) -> str:
    try:
        schema = parse_json(source)
    except ValueError as error:
        raise OptionError(f"constraint: the JSON schema is no JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise OptionError(f"constraint: the JSON schema is {shown(schema)}; allowed is an object, or true")
    multiple = 1
    for key, value in _members(schema):
        if key in ("pattern", "whitespace_pattern") and isinstance(value, str):
            _check_pattern(value)
        elif key == "patternProperties" and isinstance(value, dict):
            for pattern in value:
                _check_pattern(pattern)
        elif key == "properties" and isinstance(value, dict) and len(value) > _MOST_PROPERTIES:
            raise OptionError(
                f"constraint: the JSON schema has an object of {len(value)} properties; allowed are "
                f"{_MOST_PROPERTIES}"
            )
        elif key == "multipleOf" and isinstance(value, (int, float)) and not isinstance(value, bool):
            multiple = math.lcm(multiple, _digits(value))
            if multiple > _LARGEST_MULTIPLE:
                raise OptionError(
                    f"constraint: the JSON schema has multipleOf {shown(value)}; allowed are numbers whose "
                    f"digits, but for zeros at the end, have {_LARGEST_MULTIPLE} or less as a common multiple"
                )
    return json.dumps(schema, separators=(",", ":"))


def _digits(number: float) -> int:
    return int("".join(map(str, Decimal(str(number)).normalize().as_tuple().digits))) or 1


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """All names of all objects, at any depth, with what they stand for."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _members(inner)


_PLAIN = r"\\[xuUpP]\{[^}]{0,99}\}|\\.|\{(\d+)(?:,(\d*))?\}|\(|\)|\\$"
_PLAIN_PIECES = re.compile(_PLAIN, re.DOTALL)
_PIECES = re.compile(_PLAIN + r"|\[(?:\\.|[^\]\\])*(\]?)", re.DOTALL)


def _pieces(pattern: str) -> Iterator[re.Match[str]]:
    """Escapes, classes, counts and groups. Behind a class that nothing closes there are no others."""
    at, pieces = 0, _PIECES
    while piece := pieces.search(pattern, at):
        if piece[0][0] == "[" and not piece[3]:
            at, pieces = piece.start() + 1, _PLAIN_PIECES
            continue
        yield piece
        at = piece.end()


def _check_pattern(pattern: str) -> None:
    """Refuse what repeats a part too often, repeats of repeats multiplied."""
    groups: list[int] = [1]  # how often what stands in each open group is repeated inside of it, at most
    last, end = 1, 0  # the same of what a count would repeat, which stands directly before it
    for piece in _pieces(pattern):
        text, last, end = piece[0], last if piece.start() == end else 1, piece.end()
        if text == "\\":
            raise OptionError(f"constraint: the pattern {shown(pattern)} ends with a backslash")
        if text == "(":
            groups.append(1)
        elif text == ")":
            last = groups.pop() if len(groups) > 1 else 1
            groups[-1] = max(groups[-1], last)
            continue
        elif piece[1]:
            count = max(int(number[:9]) for number in (piece[1], piece[2]) if number)
            last *= max(1, count)
            groups[-1] = max(groups[-1], last)
            if last > _MOST_REPEATS:
                raise OptionError(
                    f"constraint: a pattern repeats a part {last} times or more; allowed are {_MOST_REPEATS} "
                    "times, repeats of repeats multiplied"
                )
            continue
        last = 1
