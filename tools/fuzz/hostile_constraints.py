"""Schemas, patterns and grammars that somebody wrote to hurt: the ways of doing so that we know, each once.

`REFUSED` end in one line: when the constraint is made, compiled, or followed for some bytes. `COSTLY` do
compile, and are followed: what a byte of them costs is measured by `tools.bench.hostile`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ...runtime.constraint import Constraint

__all__ = ["COSTLY", "REFUSED"]

Make = Callable[[], Constraint]


def _schema(schema: Any) -> Make:
    return lambda: Constraint.json_schema(schema)


def _regex(pattern: str) -> Make:
    return lambda: Constraint.regex(pattern)


def _grammar(*lines: str) -> Make:
    return lambda: Constraint.grammar("\n".join(lines))


def _doubled(count: int, name: str, end: str) -> str:
    """name0 is two of name1, which is two of name2 and so on."""
    return "\n".join(
        [f"{name}{i}: {name}{i + 1} {name}{i + 1}" for i in range(count)] + [f"{name}{count}: {end}"]
    )


def _row(count: int, rule: str, end: str) -> str:
    """Each rule names the next one: `rule` with its own number and the next one's."""
    return "\n".join([*(rule.format(i, i + 1) for i in range(count)), end.format(count)])


def _references(count: int, inner: Callable[[str], Any]) -> Any:
    names = {f"a{i}": inner(f"#/$defs/a{i + 1}") for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**names, f"a{count}": {"type": "null"}}}


def _nested(depth: int, inner: str = "1") -> str:
    return '{"a":' * depth + inner + "}" * depth


_MANY: dict[str, Any] = {f"k{number}": {} for number in range(900)}
_PAIRS = [
    {"anyOf": [{"properties": {f"a{i}": {}}}, {"properties": {f"b{i}": {"type": "null"}}}]} for i in range(14)
]

REFUSED: dict[str, Make] = {
    # Schemas: much from little.
    "many properties": _schema({"type": "object", "properties": _MANY}),
    "too many properties": _schema({"properties": {f"k{number}": {} for number in range(1001)}}),
    "products of choices": _schema({"allOf": _PAIRS}),
    "multiples of primes": _schema({"allOf": [{"multipleOf": 7919}, {"multipleOf": 7907}]}),
    "a multiple of many digits": _schema({"multipleOf": 1.0000001}),
    "a multiple that is none": _schema({"type": "integer", "multipleOf": 0}),
    "too long": _schema('{"const":"' + "x" * 70000 + '"}'),
    "nested too deep": _schema("[" * 5000 + "]" * 5000),
    "objects too deep": _schema(_nested(2000)),
    "patterns of properties that overlap": _schema(
        {"patternProperties": {f"^a{{{i}}}.*b": {"type": "string"} for i in range(20)}}
    ),
    "a pattern of many repeats": _schema({"items": {"pattern": "^a{30000}$"}}),
    "a pattern of repeats of repeats": _schema({"items": {"pattern": "(((x{90}){90}){90}){90}"}}),
    # Schemas: without end, from elsewhere, wrong.
    "refers to itself": _schema({"$ref": "#"}),
    "refers in a ring": _schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "refers to nothing": _schema({"$ref": "#/$defs/none"}),
    "refers to another host": _schema({"$ref": "http://127.0.0.1:9/x.json"}),
    "refers to a file": _schema({"$ref": "file:///etc/passwd"}),
    "contains itself without end": _schema(
        {
            "type": "object",
            "properties": {"a": {"$ref": "#"}},
            "required": ["a"],
            "additionalProperties": False,
        }
    ),
    "fits nothing": _schema({"type": "string", "enum": [1]}),
    "a range of none": _schema({"type": "integer", "minimum": 5, "maximum": 4}),
    "has what is not done": _schema({"not": {"type": "string"}}),
    "conditions": _schema({"if": {"type": "string"}, "then": {"minLength": 3}}),
    "unique items": _schema({"type": "array", "uniqueItems": True}),
    "a type that is none": _schema({"type": "strange"}),
    "a type that is a number": _schema({"type": 7}),
    "properties that are a list": _schema({"properties": [1, 2]}),
    "required that is a number": _schema({"type": "object", "required": 3}),
    "an empty choice": _schema({"anyOf": []}),
    "an empty enumeration": _schema({"enum": []}),
    "a length below nothing": _schema({"type": "string", "minLength": -1}),
    "a length that is no number": _schema({"type": "string", "maxLength": "many"}),
    "a format that is none": _schema({"type": "string", "format": "\x1b[2J"}),
    "white space that is no pattern": _schema({"x-guidance": {"whitespace_pattern": "("}}),
    "options that are none": _schema({"x-guidance": {"run": "rm"}}),
    "no JSON": _schema("{"),
    "false": _schema(False),
    # Patterns.
    "deep groups": _regex("(" * 9000 + "a" + ")" * 9000),
    "look-around": _regex("(?=a)b"),
    "looks behind": _regex("(?<!a)b"),
    "a reference": _regex(r"(a)\1"),
    "no class": _regex("[a"),
    "an empty class": _regex("[^\\s\\S]"),
    "a range upside down": _regex("[z-a]"),
    "no end of a repeat": _regex("a{2,1}"),
    "nothing to repeat": _regex("**"),
    "a backslash at the end": _regex("a\\"),
    "repeats of repeats": _regex("((a{1000}b){1000})"),
    "repeats without number": _regex("a{2,9999999999}"),
    "optional, then needed": _regex("a?" * 3000 + "a" * 3000),
    "no character": _regex("\\u{110000}"),
    "a word that is no property": _regex(r"\p{Klingon}"),
    "all of Unicode counted and counted": _regex(r"((\w{0,60}\W{0,60}){0,60}x?){0,60}"),
    # Grammars.
    "many words": _grammar("start: " + " | ".join(f'"w{i}"' for i in range(4000))),
    "no end": _grammar("start: start"),
    "no end, further": _grammar('start: "a" b', "b: start"),
    "doubled terminals": _grammar("start: A0", _doubled(30, "A", '"x" | "y"')),
    "doubled rules": _grammar("start: a0", _doubled(40, "a", '"x"')),
    "a terminal of itself": _grammar("start: A", 'A: "a" A | "b"'),
    "deep brackets": _grammar("start: " + "(" * 9000 + '"a"' + ")" * 9000),
    "deep brackets of GBNF": _grammar("root ::= " + "(" * 9000 + '"a"' + ")" * 9000),
    # What the library follows call by call, until its stack is full: in a process of its own.
    "rules in a row": _grammar("start: r0", _row(3000, 'r{0}: r{1} | "{0}"', 'r{0}: "x"')),
    "terminals in a row": _grammar("start: R0", _row(3000, 'R{0}: R{1} | "{0}"', 'R{0}: "x"')),
    "GBNF's rules in a row": _grammar("root ::= r0", _row(1500, 'r{0} ::= (r{1} | "{0}")', 'r{0} ::= "x"')),
    "references in a row": _schema(_references(1500, lambda name: {"$ref": name})),
    "arrays in a row": _schema(_references(900, lambda name: {"type": "array", "items": {"$ref": name}})),
    "all of one in a row": _schema(_references(1200, lambda name: {"allOf": [{"$ref": name}]})),
    "no rule": _grammar("hello"),
    "a rule that is not there": _grammar("start: nowhere"),
    "a rule twice": _grammar('start: "a"', 'start: "b"'),
    "an import": _grammar('%import "/etc/passwd"', "start: A"),
    "a token": _grammar("start: <|endoftext|>"),
    "another grammar": _grammar("start: @other"),
    "a schema in it without end": _grammar('start: %json {"$ref": "#"}'),
    "a schema in it with a multiple": _grammar('start: %json {"multipleOf": 7}'),
    "a repeat too large": _grammar('start: "a"{4294967295}'),
    "optional many times": _grammar("start: " + "x? " * 2000, 'x: "a" | "b" x'),
    "empty many times": _grammar("start: " + "x* " * 300, "x: y*", 'y: "a"* "b"*'),
    "rules for everything": _grammar(
        "start: " + " | ".join(f"r{i}" for i in range(200)),
        *(f'r{i}: "a" r{(i * 7 + 1) % 200} | r{(i * 3 + 2) % 200} "a" | "a"' for i in range(200)),
    ),
    "GBNF without root": _grammar('a ::= "b"'),
    "GBNF of repeats": _grammar("root ::= (" * 60 + '"a"' + "){0,9}" * 60),
    "no characters": _grammar("start: \x00"),
    "options that are no JSON": _grammar("%llguidance {", 'start: "a"'),
    # Choices.
    "too many texts": lambda: Constraint.choice(str(number) for number in range(10001)),
    "no texts": lambda: Constraint.choice([]),
}
"""Each says no, in one line."""

COSTLY: dict[str, Make] = {
    "counts that overlap": _regex("(a|aa|aaa){0,5000}"),
    "counts that overlap, 20000": _regex("(a|aa|aaa){0,20000}"),
    "a count below a star": _regex("(a{0,20000})*"),
    "a count behind a choice": _regex("(a|b)*a[ab]{0,20000}b"),
    "subsets, 14": _regex("(a|b)*a(a|b){14}"),
    "subsets, 2000": _regex("(a|b)*a(a|b){2000}"),
    "subsets of characters": _regex(".*a.{5000}"),
    "unions of anything": _regex("|".join(f".*{chr(97 + i)}.{{{50 + i}}}" for i in range(26))),
    "unions of words": _regex("(" + "|".join(f".*word{i}.*" for i in range(300)) + ")"),
    "letters counted": _regex(r"(\w{1,300}|\W{2,400}|\p{L}{3,500})*"),
    "words counted": _regex(r"(\w{0,200}\s){0,90}"),
    "optional letters": _regex("(a?b?c?d?e?f?){0,2000}"),
    "a long string": _schema({"type": "string", "minLength": 9000, "maxLength": 19999}),
    "a pattern in an object": _schema(
        {"additionalProperties": {"pattern": "(a|b)*a(a|b){100}", "type": "string"}}
    ),
    "any JSON": _schema({}),
    "many alike": _schema(
        {"type": "array", "minItems": 500, "items": {"enum": [f"value {i}" for i in range(3000)]}}
    ),
    "palindromes": _grammar("start: p", 'p: "a" p "a" | "b" p "b" | "a" | "b" | '),
    "every sum": _grammar("start: s", 's: s s | "a"'),
    "every sum of eight": _grammar("start: s", "s: " + " | ".join("s " * k for k in range(1, 9)) + '| "a"'),
    "all of many": _grammar(
        "start: T", "T: " + " & ".join(f"/(.|\\n)*{chr(97 + i)}(.|\\n)*/" for i in range(26))
    ),
    "ways without number": _grammar("start: s", 's: s s | "a" | s s s | '),
    "many terminals": _grammar("start: (" + " | ".join(f"/[a-z]{{1,{i + 1}}}/" for i in range(100)) + ")*"),
    "what is not": _grammar("start: T", "T: ~/(.|\\n)*a(.|\\n){20}b(.|\\n)*/"),
    "parts of a text": _grammar('start: %regex {"substring_chars": ' + json.dumps("abbaabab" * 700) + "}"),
    "lazy": _grammar("start: (x | y)*", "x[lazy]: /.*a.{30}b/", "y[lazy]: /[^z]*z/"),
}
"""Each has texts; some end when a limit of the library is reached."""
