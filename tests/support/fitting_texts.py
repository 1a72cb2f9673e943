"""Schemas and patterns for texts that must fit, and what says whether a text does."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import strategies as st

jsonschema = pytest.importorskip("jsonschema")

NAMES = st.sampled_from(["name", "a", "kind of thing", "ä", "x1", 'q"', "é\n"])


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], few: int, closed: bool) -> dict[str, Any]:
        names = list(properties)
        schema: dict[str, Any] = {"type": "object", "properties": properties, "required": names[:few]}
        return {**schema, "additionalProperties": False} if closed else schema

    return st.builds(build, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3), st.just(True))


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(items: Any, least: int, more: int) -> dict[str, Any]:
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}

    return st.builds(build, inner, st.integers(0, 2), st.integers(0, 2))


_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "fixed"}, {"const": {"a": [1, None]}}]),
    st.builds(
        lambda least, more: {"type": "integer", "minimum": least, "maximum": least + more},
        st.integers(-1000, 1000),
        st.integers(0, 3000),
    ),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    st.builds(lambda values: {"enum": values}, st.lists(NAMES | st.integers(-5, 5), min_size=1, max_size=4)),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": "string", "format": "date"}]),
    st.just({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 500}),
)
SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        _objects(inner), _arrays(inner), st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner)
    ),
    max_leaves=5,
)

HAND_MADE: dict[str, Any] = {
    "references": {
        "$defs": {"point": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}}},
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "tuples": {
        "type": "array",
        "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "both": {"allOf": [{"type": "integer", "minimum": 10}, {"type": "integer", "maximum": 12}]},
    "types": {"type": ["boolean", "null"]},
    "a name with escapes": {
        "type": "object",
        "properties": {'"\\/\b': {"const": "\u2028\t"}},
        "required": ['"\\/\b'],
        "additionalProperties": False,
    },
    "bounds that exclude": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "recursion": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
        "additionalProperties": False,
    },
}


def check_fits_schema(text: str, schema: Any) -> None:
    """Raises where the text is no JSON, or not what the schema asks for."""
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


_ATOMS = st.sampled_from(
    ["a", "b", "é", "[a-c]", "[^a]", ".", r"\.", "[0-9]", "🐇", r"\n", "(?:ab|ac)", r"[\s\S]"]
)
PATTERNS: st.SearchStrategy[str] = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.builds("".join, st.lists(inner, min_size=1, max_size=3)),
        st.builds("(?:{})?".format, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?:{}){{1,3}}".format, inner),
        st.builds("({}){{2}}".format, inner),
        st.builds("(?:{})*".format, inner),
    ),
    max_leaves=6,
)


def check_fits_pattern(text: str, pattern: str) -> None:
    assert re.fullmatch(pattern, text), (pattern, text)
