"""Attacks on constraints: schemas, patterns and grammars, as a request may bring them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from ...runtime.constraint import Constraint
from ...runtime.errors import OptionError
from ...runtime.guide import new_guide
from ...runtime.options import GenerationOptions
from ...runtime.vocabulary import EOS
from .hostile_constraints import COSTLY, REFUSED
from .mutate import spoil_bytes, spoil_json
from .targets import Files, Target

_STEPS = 24
_SCHEMAS: tuple[Any, ...] = (
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120, "multipleOf": 5},
            "tags": {"type": "array", "items": {"enum": ["a", "b", None, 3]}, "minItems": 1, "maxItems": 3},
            "when": {"type": "string", "format": "date-time"},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    },
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/tree"}}]}
        },
    },
    {"allOf": [{"type": "string", "pattern": "^(a|b)+[0-9]{2,5}$"}, {"maxLength": 9}]},
    {"oneOf": [{"const": {"k": [1, 2]}}, {"type": "number", "exclusiveMinimum": -1.5, "maximum": 1e6}]},
    {
        "type": "object",
        "patternProperties": {"^x_[a-z]*$": {"type": "boolean"}},
        "propertyNames": {"maxLength": 9},
        "additionalProperties": {"type": "integer"},
        "x-guidance": {"whitespace_flexible": True, "item_separator": ", ?", "key_separator": ":"},
    },
)
_KEYS = (
    *("$ref", "$defs", "$id", "$anchor", "type", "enum", "const", "anyOf", "allOf", "oneOf", "not", "if"),
    *(
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "multipleOf",
        "items",
        "prefixItems",
    ),
    *("minItems", "maxItems", "uniqueItems", "properties", "patternProperties", "additionalProperties"),
    *("required", "minProperties", "maxProperties", "x-guidance", "whitespace_pattern", "item_separator"),
)
_PATTERNS = (
    r"(the cat [a-z]{1,3} and )+the end",
    r"\d{4}-(0[1-9]|1[0-2])-\d{2}T?(?i:utc)?",
    r"[^\x00-\x1f\"\\]*\p{Lu}\w+(?:é|🐇)?",
    r"(a|aa|b{2,9})*(c{0,40}d?){3}$",
)
_GRAMMARS = (
    'start: line+\nline: "> " /[a-z ]{3,9}/ "\\n"\n%ignore / +/',
    'start: sum\nsum: sum "+" term | term\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]+/',
    'start: %json {"type": "object", "properties": {"a": {"type": "integer"}}} tail?\ntail[lazy]: /.*;/',
    "start: T{1,5}\nT: /[a-z]+/ & ~/(bad|worse)/\n// nothing\n",
    'root ::= object\nobject ::= "{" w ("\\"a\\":" value)? w "}"\nvalue ::= [0-9]+ | object\nw ::= [ \\t]*',
    'root ::= ("always" [a-d]{2,4} "the same")+ # as said',
)
_WORDS = (
    rb"( ) [ ] { } * + ? | ^ $ \ {0,9} {1000} {,} (?: (?i) (?P<a> \p{L} \w \b \x{41} .* & ~ : ::= start root"
    rb' / // # " %json %regex %ignore %import %llguidance [lazy] [stop="x"] [max_tokens=3] <a> <[3]> @a _ A'
).split()


class Constraints(Target):
    """A constraint of a request: checked, tried, compiled, and followed for some bytes."""

    name = "constraints"
    count, quick, seconds, memory = 10_000, 150, 10.0, 512 << 20
    processes = True
    valid: Mapping[str, bytes] = {"json_schema": json.dumps(_SCHEMAS[0]).encode()}

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        import llguidance  # noqa: F401 - else this shows nothing

        self._hostile: list[tuple[str, bytes]] = []
        for make in (*REFUSED.values(), *COSTLY.values()):
            try:
                constraint = make()
            except OptionError:
                continue
            if constraint.source:
                self._hostile.append((constraint.kind, constraint.source.encode()))

    def make(self, random: Random) -> Files:
        kind = random.choice(("json_schema", "json_schema", "regex", "grammar"))
        if random.random() < 0.15:
            kind, source = random.choice(self._hostile)
        elif kind == "json_schema":
            return {kind: spoil_json(random, random.choice(_SCHEMAS), keys=_KEYS)}
        else:
            source = random.choice(_PATTERNS if kind == "regex" else _GRAMMARS).encode()
        return {kind: spoil_bytes(random, source, _WORDS)}

    def attack(self, files: Files) -> None:
        ((kind, data),) = files.items()
        source = data if kind == "json_schema" else data.decode("utf-8", "replace")
        make = {
            "json_schema": Constraint.json_schema,
            "regex": Constraint.regex,
            "grammar": Constraint.grammar,
        }
        guide = new_guide(GenerationOptions(constraint=make[kind](source)))  # type: ignore[arg-type]
        assert guide is not None
        random = Random(data)
        for _ in range(_STEPS):
            allowed = [number for number in guide.mask().nonzero()[0].tolist() if number != EOS]
            if not allowed:
                break
            guide.advance(guide.forced(3) or [random.choice(allowed)])
