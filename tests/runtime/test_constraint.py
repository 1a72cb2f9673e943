"""What a constraint is, is checked when it is made: one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from blt_edge.runtime import Constraint, GenerationOptions, OptionError
from blt_edge.runtime.constraint import LONGEST_SOURCE, _pieces, _tokens
from hypothesis import given
from hypothesis import strategies as st


def test_a_constraint_is_a_value() -> None:
    made = [Constraint.regex("a+"), Constraint.choice(["b", b"a", "b"]), Constraint.json_object()]
    assert len({*made, Constraint.regex("a+"), Constraint.choice(["a", "b"])}) == 3
    assert made[1].texts == (b"a", b"b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made[0].kind = "x"  # type: ignore[misc]
    assert GenerationOptions(constraint=made[0]) == GenerationOptions(constraint=Constraint.regex("a+"))


def test_a_schema_is_the_same_as_text_and_as_object() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {"type": "string"}}}
    made = Constraint.json_schema(schema)
    assert made == Constraint.json_schema(json.dumps(schema, indent=3))
    assert made == Constraint.json_schema(json.dumps(schema).encode())
    assert list(json.loads(made.source)["properties"]) == ["b", "a"]  # in which order they are written
    assert Constraint.json_schema(True) == Constraint.json_schema({})


WRONG: dict[str, Callable[[], Any]] = {
    "no JSON": lambda: Constraint.json_schema("{"),
    "allowed is an object": lambda: Constraint.json_schema("[1]"),
    "False; allowed is an object": lambda: Constraint.json_schema(False),
    "allowed is JSON": lambda: Constraint.json_schema({"a": {1}}),  # type: ignore[dict-item]
    "nested too deep": lambda: Constraint.json_schema("[" * 5000 + "]" * 5000),
    "allowed are 65536": lambda: Constraint.regex("a" * 70000),
    "ends with a backslash": lambda: Constraint.regex("a\\"),
    "repeats a part 1000000 times": lambda: Constraint.regex("((a{1000}b){1000})"),
    "repeats a part 999999999 times": lambda: Constraint.regex("a{2,9999999999}"),
    "repeats a part 30000 times": lambda: Constraint.json_schema({"items": {"pattern": "^a{30000}$"}}),
    "repeats a part 25000 times": lambda: Constraint.json_schema({"patternProperties": {"a{25000}": {}}}),
    "multipleOf 1000003": lambda: Constraint.json_schema({"anyOf": [{"multipleOf": 1000003}]}),
    "multipleOf 7907": lambda: Constraint.json_schema(
        {"allOf": [{"type": "integer", "multipleOf": 7919}, {"multipleOf": 7907}]}
    ),
    'has "multipleOf"': lambda: Constraint.grammar('start: %json {"multipleOf": 7}'),
    "an object of 1001 properties": lambda: Constraint.json_schema(
        {"properties": {f"k{number}": {} for number in range(1001)}}
    ),
    "names a token, '<\\[5\\]>'": lambda: Constraint.grammar('start: "<a>" <[5]>'),
    "the grammar is empty": lambda: Constraint.grammar(" \n"),
    "the regex is 5; allowed is a text": lambda: Constraint.regex(5),  # type: ignore[arg-type]
    "not valid UTF-8": lambda: Constraint.json_schema(b"\xff"),
    "not valid Unicode": lambda: Constraint.regex("\udcff"),
    "has no texts": lambda: Constraint.choice([]),
    "the choice is 'abc'; allowed is a list": lambda: Constraint.choice("abc"),
    "a choice is 5": lambda: Constraint.choice([5]),  # type: ignore[list-item]
    "10001 texts": lambda: Constraint.choice(str(number) for number in range(10001)),
    "kind is 'xml'; allowed are json_schema": lambda: Constraint("xml"),
    "texts belong to a choice": lambda: Constraint("regex", "a", (b"a",)),
    "json_object has no source": lambda: Constraint("json_object", "a"),
    "constraint is 'a'; allowed is a Constraint": lambda: GenerationOptions(constraint="a"),  # type: ignore[arg-type]
    "utf8 is 1; allowed is true or false": lambda: GenerationOptions(utf8=1),  # type: ignore[arg-type]
    "logit_bias is 3; allowed is a mapping": lambda: GenerationOptions(logit_bias=3),  # type: ignore[arg-type]
    "an id is 260; allowed is a whole number from 0 to 259": lambda: GenerationOptions(logit_bias={260: 1}),
    "logit_bias is 101; allowed": lambda: GenerationOptions(logit_bias={5: 101}),
}


@pytest.mark.parametrize("told", WRONG)
def test_what_is_wrong_is_told_in_a_line(told: str) -> None:
    with pytest.raises(OptionError, match=told) as caught:
        WRONG[told]()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "pattern",
    [
        "a{20000}",
        "[a{99999}]",
        r"a\{99999\}",
        "(a{100}b{100}){100}",
        "(a{10}){10}(b{1000}){10}",
        "a{,3}",
        "x)y{3}",
        r"[a-z]\u{100000}\x{99999}",
    ],
)
def test_repeats_that_are_none_or_few_are_allowed(pattern: str) -> None:
    assert Constraint.regex(pattern).source == pattern


def test_multiples_of_few_digits_are_allowed() -> None:
    for number in (1, 7919, 1e-9, 0.25, 10**15, 12300000):
        Constraint.json_schema({"multipleOf": number})
    Constraint.json_schema({"anyOf": [{"multipleOf": 700}, {"multipleOf": 0.14}, {"multipleOf": 5000}]})


def test_a_token_in_a_string_a_pattern_or_a_comment_is_text() -> None:
    for grammar in ('start: "<[5]>"', "start: /<a>/", 'start: "a" // <b>', 'root ::= "a" # <b>'):
        Constraint.grammar(grammar)


GRAMMARS = st.lists(st.sampled_from(['"', "/", "//", "<", ">", "#", "\\", "\n", " ", "a"]), max_size=14)


@given(GRAMMARS.map("".join))
def test_tokens_are_those_outside_of_strings_patterns_and_comments(grammar: str) -> None:
    simple = r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])*/|(<[^\s>]*>)'
    assert [*_tokens(grammar)] == [*filter(None, re.findall(simple, grammar))]


@given(
    st.lists(
        st.sampled_from(["[", "]", "\\", "(", ")", "{", "}", "1", ",", "a", "x", "{3}", "{20,}"]), max_size=14
    ).map("".join)
)
def test_pieces_of_a_pattern_are_found_where_they_are(pattern: str) -> None:
    simple = re.compile(
        r"\\[xuUpP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|\(|\)|\\$", re.DOTALL
    )
    assert [piece.span() for piece in _pieces(pattern)] == [
        piece.span() for piece in simple.finditer(pattern)
    ]


def test_what_opens_again_and_again_is_looked_along_once() -> None:  # it took minutes
    most = LONGEST_SOURCE - 20
    for opening in ("<", '\\"', "\\/", "/\\"):
        for before in ("", '"', "/"):
            Constraint.grammar(f"root ::= {before}{opening * (most // len(opening))}")
    for opening in ("[", "[\\]", "[(", "\\p{"):
        Constraint.regex(opening * (most // len(opening)))


def test_biases_are_kept_sorted_and_hashable() -> None:
    options = GenerationOptions(logit_bias={70: 1, 5: -2.5})
    assert options.logit_bias == ((5, -2.5), (70, 1.0))
    assert dataclasses.replace(options, seed=1).logit_bias == options.logit_bias
    assert hash(options) == hash(GenerationOptions(logit_bias=[(5, -2.5), (70, 1)]))  # type: ignore[arg-type]
