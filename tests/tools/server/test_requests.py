"""What a completion request may say, parameter by parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from blt_edge.runtime import GenerationOptions
from blt_edge.tools.server import requests
from blt_edge.tools.server.requests import (
    ApiError,
    CompletionRequest,
    ModelFacts,
    parse_completion,
    parse_json,
)
from hypothesis import given
from hypothesis import strategies as st

FACTS = ModelFacts("tiny", 500, GenerationOptions(temperature=1.0, draft="lookup", draft_length=3))


def parse(**document: Any) -> CompletionRequest:
    return parse_completion({"prompt": "Once", **document}, FACTS)


def test_defaults_are_openais_but_for_the_length() -> None:
    request = parse()
    assert request.prompts == (b"Once",)
    assert request.options == GenerationOptions(256, temperature=1.0, draft="lookup", draft_length=3)
    assert (request.n, request.echo, request.stream, request.blt_details) == (1, False, False, False)


def test_everything_at_once() -> None:
    request = parse(
        model="tiny",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.2,
        n=3,
        stop=["\n", "é"],
        seed=7,
        logprobs=5,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
        user="somebody",
        draft="none",
        draft_length=2,
        blt_details=True,
        suffix="",
        logit_bias={},
        best_of=3,
        presence_penalty=0,
        frequency_penalty=0.0,
    )
    assert request.options == GenerationOptions(
        9, 0.5, 40, 0.9, 0.05, 1.2, 7, (b"\n", "é".encode()), "none", 2, True, 5, True
    )
    assert [options.seed for _, options in request.choices] == [7, 8, 9]
    assert request.stream
    assert request.include_usage
    assert request.echo
    assert request.options.prompt_details


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", (b"",)),
        ("é\x00", (b"\xc3\xa9\x00",)),
        (["a", "", "b"], (b"a", b"", b"b")),
        ([0, 255, 104], (b"\x00\xffh",)),
        ([[104], [105, 106]], (b"h", b"ij")),
        ([[]], (b"",)),
    ],
)
def test_prompts(prompt: Any, expected: tuple[bytes, ...]) -> None:
    assert parse(prompt=prompt).prompts == expected


def test_choices_of_several_prompts_without_a_seed() -> None:
    choices = list(parse(prompt=["a", "b"], n=2).choices)
    assert [prompt for prompt, _ in choices] == [b"a", b"a", b"b", b"b"]
    assert {options.seed for _, options in choices} == {None}


@pytest.mark.parametrize(
    ("document", "param", "code", "words"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter", "give a text"),
        ({"prompt": []}, "prompt", "invalid_value", "empty list"),
        ({"prompt": 5}, "prompt", "invalid_type", "5; allowed are a string"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_type", "a list of byte values"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type", "'a'"),
        ({"prompt": [1, True]}, "prompt", "invalid_type", "True"),
        ({"prompt": [1.0]}, "prompt", "invalid_type", "1.0"),
        ({"prompt": [15496, 995]}, "prompt", "invalid_value", "has 15496 at place 0; a list of numbers"),
        ({"prompt": "x" * 500}, "prompt", "context_length_exceeded", "500 bytes, the model reads at most"),
        ({"prompt": ["a", "x" * 500]}, "prompt", "context_length_exceeded", "499; shorten it"),
        ({"prompt": "a\ud800"}, "prompt", "invalid_value", "half a character, \\ud800, at 1"),
        ({"model": "gpt-4"}, "model", "model_not_found", "no model 'gpt-4'; this server has 'tiny'"),
        ({"max_tokens": 501}, "max_tokens", "invalid_value", "from 0 to 500"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "needs echo"),
        ({"max_tokens": "9"}, "max_tokens", "invalid_type", "'9'; allowed is a whole number"),
        ({"max_tokens": 9.0}, "max_tokens", "invalid_value", "9.0"),
        ({"max_tokens": True}, "max_tokens", "invalid_type", "True"),
        ({"temperature": "hot"}, "temperature", "invalid_type", "'hot'; allowed is a finite number >= 0"),
        ({"temperature": 10**400}, "temperature", "invalid_value", "allowed is a finite number"),
        ({"top_p": 0}, "top_p", "invalid_value", "> 0 and <= 1"),
        ({"seed": -1}, "seed", "invalid_value", ">= 0"),
        ({"seed": 2**63}, "seed", "invalid_value", "seed is"),
        ({"logprobs": True}, "logprobs", "invalid_type", "True"),
        ({"draft": "best"}, "draft", "invalid_value", "auto, none, decoder, patcher, lookup"),
        ({"draft": ["auto"]}, "draft", "invalid_type", "auto, none"),
        ({"n": 0}, "n", "invalid_value", "from 1 to 128"),
        ({"n": 65, "prompt": ["a", "b"]}, "n", "invalid_value", "allowed are 128 choices"),
        ({"stop": [""]}, "stop", "invalid_value", "is empty"),
        ({"stop": 5}, "stop", "invalid_type", "a string and a list of strings"),
        ({"stop": ["a", None]}, "stop", "invalid_type", "a string and a list"),
        ({"stop": list("abcde")}, "stop", "invalid_value", "has 5 strings; allowed are 4"),
        ({"stop": "\udc80"}, "stop", "invalid_value", "half a character"),
        ({"stream": "yes"}, "stream", "invalid_type", "'yes'; allowed is true or false"),
        ({"echo": 1}, "echo", "invalid_type", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "without stream"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options", "invalid_value", "include_usage"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "invalid_type", "true"),
        ({"user": 5}, "user", "invalid_type", "allowed is a string"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter", "not supported; leave it out"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "unsupported_parameter", "not supported"),
        ({"best_of": 2}, "best_of", "unsupported_parameter", "give n, which is 1"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "give 0"),
        ({"frequency_penalty": False}, "frequency_penalty", "unsupported_parameter", "give 0"),
        ({"temprature": 1}, "temprature", "unknown_parameter", "'temprature'; allowed are model"),
        ({"a\ud800": 1}, "a\\ud800", "unknown_parameter", r"'a\ud800'"),
        ({"k" * 5000: 1}, "k" * 100, "unknown_parameter", "no parameter 'kkk"),
    ],
)
def test_refusals(document: dict[str, Any], param: str, code: str, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(**document)
    error = refused.value.document["error"]
    assert refused.value.status == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400


def test_null_is_not_given() -> None:
    names = [name for name in [*requests._ALLOWED, *requests._NEUTRAL] if name != "prompt"]
    assert parse(**dict.fromkeys(names)) == parse()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*requests._ALLOWED, *requests._NEUTRAL, "best_of", "other"])


@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_anything_is_a_request_or_refused(document: dict[str, Any]) -> None:
    told = b""
    try:
        request = parse_completion(document, FACTS)
    except ApiError as error:
        told = json.dumps(error.document, allow_nan=False).encode()
        count = None
    else:
        count = len(list(request.choices))
    assert told if count is None else 1 <= count <= 128


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no JSON: Expecting value at line 1, column 1"),
        (b'{"prompt": "a"', "no JSON"),
        (b'{"prompt": "a"} x', "no JSON: Extra data"),
        (b'{"a": NaN}', "NaN, which JSON has no number for"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' * 100_000, "nested too deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "too many digits"),
        (b'{"a": "\n"}', "control character"),
    ],
)
def test_json_that_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(ApiError, match=words) as refused:
        parse_json(body)
    assert refused.value.status == 400
    assert refused.value.document["error"]["code"] == "invalid_json"


class _Compared(str):
    times = 0

    def __eq__(self, other: object) -> bool:
        _Compared.times += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_key_that_is_there_twice_is_found_among_many() -> None:
    """Without comparing each with each, which takes minutes for the keys that a body has room for."""
    pairs = [(_Compared(number), 0) for number in range(1000)]
    with pytest.raises(ApiError, match="'999' twice"):
        requests._unique([*pairs, (_Compared(999), 1)])
    assert _Compared.times < 10_000


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"prompt": "x" * 499, "echo": True, "max_tokens": 1, "n": 128, "logprobs": 0}, 64_000),
        ({"prompt": ["x" * 499] * 128, "blt_details": True, "max_tokens": 9}, 64_000),
        ({"prompt": "x", "max_tokens": 500, "n": 128, "logprobs": 20}, 63_872),
        ({"prompt": ["", "x" * 9], "max_tokens": 100, "n": 64, "logprobs": 20, "blt_details": True}, 13_376),
        ({"prompt": "x", "max_tokens": 0, "echo": True, "logprobs": 1}, 1),
    ],
)
def test_how_much_may_be_told_byte_by_byte(
    monkeypatch: pytest.MonkeyPatch, document: dict[str, Any], told: int
) -> None:
    monkeypatch.setattr(requests, "MOST_TOLD", max(told, 500))
    assert parse(**document).prompts
    monkeypatch.setattr(requests, "MOST_TOLD", told - 1)
    if told <= 500:  # as much as the model has positions always may
        assert parse(**document).prompts
        return
    with pytest.raises(ApiError, match=f"would be of up to {told} bytes.* allowed are {told - 1}; ask for"):
        parse(**document)
    bare = {name: value for name, value in document.items() if name not in ("logprobs", "blt_details")}
    assert parse(**bare).prompts


def test_json_that_is_read() -> None:
    assert parse_json('{"a": [1, 2.5, null, "é\\u00e9"]}'.encode()) == {"a": [1, 2.5, None, "éé"]}
