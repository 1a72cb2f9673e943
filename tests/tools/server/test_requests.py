"""What a completion request may say, parameter by parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from blt_edge.runtime import GenerationOptions
from blt_edge.tools.server import body as bodies
from blt_edge.tools.server import requests
from blt_edge.tools.server.body import parse_json
from blt_edge.tools.server.refusals import ApiError
from blt_edge.tools.server.requests import CompletionRequest, ModelFacts, parse_completion
from hypothesis import given
from hypothesis import strategies as st

FACTS = ModelFacts("tiny", 500, GenerationOptions(temperature=1.0, draft="lookup", draft_length=3))


def parse(**document: Any) -> CompletionRequest:
    return parse_completion({"prompt": "Once", **document}, FACTS)


def test_defaults_are_openais_but_for_the_length() -> None:
    request = parse()
    assert request.options == GenerationOptions(256, temperature=1.0, draft="lookup", draft_length=3)
    assert (request.n, request.echo, request.stream, request.blt_details) == (1, False, False, False)


def test_everything_at_once() -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.2}
    told = {"logprobs": 5, "echo": True, "stream": True, "stream_options": {"include_usage": True}}
    neutral = {"suffix": "", "logit_bias": {}, "best_of": 3, "presence_penalty": 0, "frequency_penalty": 0.0}
    request = parse(
        **{"model": "tiny", "max_tokens": 9, "n": 3, "stop": ["\n", "é"], "seed": 7, "user": "somebody"},
        **{"draft": "none", "draft_length": 2, "blt_details": True, **sampling, **told, **neutral},
    )
    assert request.options == GenerationOptions(
        9, 0.5, 40, 0.9, 0.05, 1.2, 7, (b"\n", "é".encode()), "none", 2, True, 5, True
    )
    assert request.n == 3
    assert (request.stream, request.include_usage, request.echo) == (True, True, True)


def test_prompts() -> None:
    for prompt, expected in (
        ("", (b"",)),
        ("é\x00", (b"\xc3\xa9\x00",)),
        (["a", "", "b"], (b"a", b"", b"b")),
        ([0, 255, 104], (b"\x00\xffh",)),
        ([[104], [105, 106]], (b"h", b"ij")),
        ([[]], (b"",)),
    ):
        assert parse(prompt=prompt).prompts == expected
    assert parse(prompt=["a", "b"], n=2).options.seed is None


@pytest.mark.parametrize(
    ("code", "param", "values"),
    [
        ("missing_required_parameter", "prompt", [None]),
        ("invalid_type", "prompt", [5, {"a": 1}, ["a", 1], [1, True], [1.0]]),
        ("invalid_value", "prompt", [[], [15496, 995], "a\ud800"]),
        ("context_length_exceeded", "prompt", ["x" * 500, ["a", "x" * 500]]),
        ("model_not_found", "model", ["gpt-4"]),
        ("invalid_type", "max_tokens", ["9", True]),
        ("invalid_value", "max_tokens", [501, 0, 9.0]),
        ("invalid_type", "temperature", ["hot"]),
        ("invalid_value", "temperature", [10**400]),
        ("invalid_value", "top_p", [-0.1, 1.1]),
        ("invalid_type", "top_p", [False]),
        ("invalid_value", "seed", [-(2**63) - 1, 2**63]),
        ("invalid_type", "logprobs", [True]),
        ("invalid_type", "draft", [["auto"]]),
        ("invalid_value", "draft", ["best"]),
        ("invalid_value", "n", [0, 129]),
        ("invalid_type", "stop", [5, ["a", None]]),
        ("invalid_value", "stop", [[""], ["a"] * 65, "\udc80"]),
        ("invalid_type", "stream", ["yes"]),
        ("invalid_type", "echo", [1]),
        ("invalid_value", "stream_options", [{"include_usage": True}]),
        ("invalid_type", "user", [5]),
        ("unsupported_parameter", "suffix", ["x"]),
        ("unsupported_parameter", "best_of", [2]),
        ("unsupported_parameter", "presence_penalty", [0.5]),
        ("unsupported_parameter", "frequency_penalty", [False]),
        ("unknown_parameter", "temprature", [1]),
    ],
)
def test_refusals(code: str, param: str, values: list[Any]) -> None:
    for value in values:
        error = refusal(404 if code == "model_not_found" else 400, **{param: value})
        assert (error["param"], error["code"]) == (param, code), value


def refusal(status: int = 400, **document: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as refused:
        parse(**document)
    error: dict[str, Any] = refused.value.document["error"]
    assert (refused.value.status, error["type"]) == (status, "invalid_request_error")
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    return error


def test_refusals_name_what_is_wrong() -> None:
    for document, param, words in (
        ({"prompt": [15496, 995]}, "prompt", "15496 at place 0"),
        ({"n": 65, "prompt": ["a", "b"]}, "n", "allowed are 128 choices"),
        ({"max_tokens": 0}, "max_tokens", "needs echo"),
        ({"draft": "best"}, "draft", "auto, none, decoder, patcher, lookup"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options", "include_usage"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "true"),
        ({"a\ud800": 1}, "a\\ud800", r"'a\ud800'"),
        ({"k" * 5000: 1}, "k" * 100, "no parameter 'kkk"),
    ):
        error = refusal(**document)
        assert error["param"] == param
        assert words in error["message"]


def test_null_is_not_given() -> None:
    names = [name for name in [*requests._ALLOWED, *requests._NEUTRAL] if name != "prompt"]
    others = ["best_of", "service_tier", "store", "metadata", "what comes next year"]
    assert parse(**dict.fromkeys([*names, *others])) == parse()
    inside = {"include_usage": None, "include_obfuscation": None, "other": None}
    assert parse(stream=True, stream_options=inside) == parse(stream=True)


def test_what_clients_send_to_say_nothing() -> None:
    for document in (
        {"logprobs": False},
        {"stop": ""},
        {"stop": []},
        {"seed": -1},
        {"suffix": "", "best_of": 1, "logit_bias": {}, "presence_penalty": 0.0},
    ):
        assert parse(**document) == parse(), document
    for told in (True, False):
        options = {"include_usage": True, "include_obfuscation": told}
        assert parse(stream=True, stream_options=options).include_usage


def test_openais_values_that_have_another_word_here() -> None:
    assert parse(top_p=0).options == parse(temperature=0).options
    assert parse(top_p=0.0, temperature=0.7, seed=5).options == parse(temperature=0, seed=5).options
    for wrong in (-5, "hot"):
        assert refusal(top_p=0, temperature=wrong) == refusal(temperature=wrong)
    stops = [f"stop {number}" for number in range(8)]
    assert parse(stop=stops).options.stop == tuple(stop.encode() for stop in stops)
    seeds = [parse(seed=seed, n=3) for seed in (-(2**63), -2, 0, 2**63 - 129)]
    assert len({request.options.seed + number for request in seeds for number in range(3)}) == 12


def test_the_checkpoint_s_own_defaults_are_the_request_s() -> None:
    own = GenerationOptions(900, temperature=0.6, top_k=50, stop=(b"\n\n",))
    request = parse_completion({"prompt": ""}, ModelFacts("tiny", 500, own))
    assert request.options == GenerationOptions(500, temperature=0.6, top_k=50, stop=(b"\n\n",))
    request = parse_completion({"prompt": "", "stop": "", "top_k": 0}, ModelFacts("tiny", 500, own))
    assert request.options == GenerationOptions(500, temperature=0.6)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*requests._ALLOWED, *requests._NEUTRAL, "best_of", "other"])


@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_anything_is_a_request_or_refused(document: dict[str, Any]) -> None:
    try:
        request = parse_completion(document, FACTS)
    except ApiError as error:
        json.dumps(error.document, allow_nan=False)
    else:
        assert 1 <= request.n * len(request.prompts) <= 128


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "line 1, column 1"),
        (b'{"prompt": "a"', "no JSON"),
        (b'{"prompt": "a"} x', "Extra data"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' * 100_000, "nested too deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "too many digits"),
        (b'{"a": "\n"}', "control character"),
    ],
)
def test_json_that_is_refused(body: bytes, words: str) -> None:
    assert parse_json('{"a": [1, 2.5, null, "é\\u00e9"]}'.encode()) == {"a": [1, 2.5, None, "éé"]}
    with pytest.raises(ApiError, match=words) as refused:
        parse_json(body)
    assert (refused.value.status, refused.value.document["error"]["code"]) == (400, "invalid_json")


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
        bodies._unique([*pairs, (_Compared(999), 1)])
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
