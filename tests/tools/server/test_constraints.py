"""What a request may ask its texts to fit, parameter by parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from blt_edge.runtime import Constraint, GenerationOptions
from blt_edge.runtime.vocabulary import EOS
from blt_edge.tools.server import constraints
from blt_edge.tools.server.constraints import text_rules
from blt_edge.tools.server.refusals import ApiError
from blt_edge.tools.server.requests import CompletionRequest, ModelFacts, parse_completion
from hypothesis import given
from hypothesis import strategies as st

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OPENAI = {"name": "reply", "description": "what is said", "strict": True, "schema": SCHEMA}
GBNF = 'root ::= ("yes" | "no") [.!?]'


def parse(**document: Any) -> CompletionRequest:
    return parse_completion({"prompt": "Once", **document}, ModelFacts("tiny", 500, GenerationOptions()))


def schema_format(**told: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": told}


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("response_format", schema_format(**OPENAI), Constraint.json_schema(SCHEMA)),
        ("response_format", schema_format(schema=SCHEMA, strict=None), Constraint.json_schema(SCHEMA)),
        ("response_format", schema_format(schema=True, strict=False), Constraint.json_schema({})),
        ("response_format", {"type": "json_object"}, Constraint.json_object()),
        ("response_format", {"type": "json_object", "json_schema": None}, Constraint.json_object()),
        ("response_format", {"type": "json_object", "schema": SCHEMA}, Constraint.json_schema(SCHEMA)),
        ("json_schema", SCHEMA, Constraint.json_schema(SCHEMA)),
        ("json_schema", {}, Constraint.json_schema({})),
        ("grammar", GBNF, Constraint.grammar(GBNF)),
        ("guided_json", SCHEMA, Constraint.json_schema(SCHEMA)),
        ("guided_json", json.dumps(SCHEMA, indent=2), Constraint.json_schema(SCHEMA)),
        ("guided_regex", "é{2}", Constraint.regex("é{2}")),
        ("guided_choice", ["b", "a", "b"], Constraint.choice(["a", "b"])),
        ("guided_grammar", 'start: "a"', Constraint.grammar('start: "a"')),
        ("structured_outputs", {"json": SCHEMA, "regex": None}, Constraint.json_schema(SCHEMA)),
        ("structured_outputs", {"regex": "a+"}, Constraint.regex("a+")),
        ("structured_outputs", {"choice": ["x"]}, Constraint.choice(["x"])),
        ("structured_outputs", {"grammar": GBNF, "json_object": False}, Constraint.grammar(GBNF)),
        ("structured_outputs", {"json_object": True}, Constraint.json_object()),
    ],
)
def test_each_client_s_words(field: str, value: Any, constraint: Constraint) -> None:
    request = parse(**{field: value, "utf8": True})
    assert (request.options.constraint, request.constraint_field) == (constraint, field)
    assert request.options.utf8


def test_what_asks_for_nothing() -> None:
    says_nothing = {"response_format": {"type": "text", "schema": None}, "grammar": "", "utf8": False}
    assert parse(**says_nothing, logit_bias={}) == parse()
    assert parse(**says_nothing, guided_regex="a").constraint_field == "guided_regex"
    assert parse(**dict.fromkeys(constraints.NAMES)) == parse()
    assert parse().constraint_field is None


REFUSALS: list[tuple[str, Any, str, str]] = [
    ("response_format", "json", "invalid_type", "response_format is 'json'; allowed is an object"),
    ("response_format", {}, "invalid_value", "has no type; allowed are text, json_object, json_schema"),
    ("response_format", {"type": ["text"]}, "invalid_value", "has the type ['text']; allowed are text,"),
    (
        "response_format",
        {"type": "text", "a": 1},
        "unknown_parameter",
        "response_format has 'a'; allowed are",
    ),
    (
        "response_format",
        {"type": "text", "schema": {}},
        "invalid_value",
        "has schema, which does not go with",
    ),
    (
        "response_format",
        {"type": "json_schema"},
        "missing_required_parameter",
        "json_schema.schema is missing",
    ),
    (
        "response_format",
        schema_format(name="a"),
        "missing_required_parameter",
        "json_schema.schema is missing",
    ),
    (
        "response_format",
        schema_format(schema={}, name=1),
        "invalid_type",
        "json_schema.name is 1; allowed is",
    ),
    (
        "response_format",
        schema_format(schema={}, strict=1),
        "invalid_type",
        "strict is 1; allowed is true or",
    ),
    ("response_format", schema_format(schema={}, x=1), "unknown_parameter", "has 'x'; allowed are name,"),
    ("response_format", schema_format(schema=[]), "invalid_value", "response_format: the JSON schema is []"),
    ("json_schema", False, "invalid_value", "json_schema: the JSON schema is False; allowed is an object"),
    ("json_schema", {"x": "y" * 70_000}, "invalid_value", "allowed are 65536"),
    ("guided_json", "{1}", "invalid_value", "guided_json: the JSON schema is no JSON"),
    ("guided_regex", 5, "invalid_value", "guided_regex: the regex is 5; allowed is a text"),
    ("guided_regex", "(a{1000}){1000}", "invalid_value", "guided_regex: a pattern repeats a part 1000000"),
    ("guided_regex", "\ud800", "invalid_value", "guided_regex: the regex is not valid Unicode"),
    ("grammar", ["a"], "invalid_value", "grammar: the grammar is ['a']; allowed is a text"),
    ("grammar", " ", "invalid_value", "grammar: the grammar is empty; give a rule"),
    ("guided_grammar", "start: <[5]>", "invalid_value", "guided_grammar: the grammar names a token, '<[5]>'"),
    (
        "guided_choice",
        "ab",
        "invalid_value",
        "guided_choice: the choice is 'ab'; allowed is a list of strings",
    ),
    ("guided_choice", [1], "invalid_value", "the choice is [1]; allowed is a list of strings"),
    ("guided_choice", [], "invalid_value", "the choice has no texts; give one at least"),
    ("structured_outputs", {}, "invalid_value", "has nothing that a text can fit; allowed is one of json,"),
    (
        "structured_outputs",
        {"json": {}, "regex": "a"},
        "invalid_value",
        "structured_outputs has json and regex",
    ),
    ("structured_outputs", {"json_object": 1}, "invalid_value", "structured_outputs: json_object is 1"),
    ("structured_outputs", {"structural_tag": "x"}, "unknown_parameter", "has 'structural_tag'; allowed are"),
    ("utf8", "yes", "invalid_type", "utf8 is 'yes'; allowed is true or false"),
    ("logit_bias", [1], "invalid_type", "logit_bias is [1]; allowed is an object of token ids"),
    ("logit_bias", {"256": 101}, "invalid_value", "allowed is a finite number >= -100 and <= 100"),
    ("logit_bias", {"0": None}, "invalid_value", "allowed is a finite number"),
    ("logit_bias", {"0": True}, "invalid_value", "allowed is a finite number"),
    *(
        (
            "logit_bias",
            {key: 1},
            "invalid_value",
            "allowed are byte values, 0 to 255, and 256, the end of the",
        )
        for key in ("257", "-1", "01", "1.0", "a", "", "٣", " 1", "1\n", "9" * 30, "\ud800")
    ),
]


@pytest.mark.parametrize(("field", "value", "code", "words"), REFUSALS)
def test_refusals(field: str, value: Any, code: str, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(**{field: value})
    error = refused.value.document["error"]
    assert (refused.value.status, error["param"], error["code"]) == (400, field, code)
    assert words in error["message"]
    assert "constraint:" not in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 250


def test_a_text_can_fit_one_thing_only() -> None:
    with pytest.raises(ApiError, match=r"^response_format and guided_choice are given; a text can fit one"):
        parse(response_format={"type": "json_object"}, guided_choice=["a"], utf8=True)


def test_biases_are_of_bytes_and_the_end() -> None:
    request = parse(logit_bias={"0": 1, "255": -100, "256": 2.5, "104": 0})
    assert dict(request.options.biases) == {4: 1.0, 259: -100.0, EOS: 2.5, 108: 0.0}


SOURCES = st.sampled_from(
    [SCHEMA, {}, True, json.dumps(SCHEMA), GBNF, 'start: "a"', "a+", "(", "", ["a", "b"]]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | SOURCES
KEYS = st.sampled_from(
    ["type", "json_schema", "schema", "strict", "name", "json", "regex", "choice", "grammar", "7", "256", "x"]
)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["text", "json_object", "json_schema"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(constraints.NAMES), VALUES, max_size=4))
def test_anything_is_understood_or_refused_by_name(given: dict[str, Any]) -> None:
    given = {name: value for name, value in given.items() if value is not None}
    refusal = None
    try:
        rules = text_rules(given)
    except ApiError as error:
        refusal = error
    if refusal is not None:
        assert refusal.status == 400
        assert refusal.document["error"]["param"] in given
        json.dumps(refusal.document, allow_nan=False)
    else:
        GenerationOptions(**rules.options)
        assert (rules.constraint_field is None) == ("constraint" not in rules.options)
        assert rules.constraint_field in (None, *given)
