"""What a chat's request may say, parameter by parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from blt_edge.runtime import GenerationOptions
from blt_edge.tools.server import chat_requests, requests
from blt_edge.tools.server.chat_requests import ChatRequest, parse_chat
from blt_edge.tools.server.refusals import ApiError
from blt_edge.tools.server.requests import CompletionRequest, ModelFacts, parse_completion
from hypothesis import given
from hypothesis import strategies as st

FACTS = ModelFacts("tiny", 500, GenerationOptions(temperature=1.0, draft="lookup", draft_length=3))
USER = {"role": "user", "content": "Once"}


def parse(facts: ModelFacts = FACTS, **document: Any) -> ChatRequest:
    return parse_chat({"messages": [USER], **document}, facts)


def refusal(status: int = 400, **document: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as refused:
        parse(**document)
    error: dict[str, Any] = refused.value.document["error"]
    assert (refused.value.status, error["type"]) == (status, "invalid_request_error")
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    return error


def test_defaults_are_those_of_completions() -> None:
    expected = parse_completion({"prompt": ""}, FACTS)
    assert parse() == ChatRequest((USER,), expected)


def test_everything_at_once() -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.2}
    told = {"logprobs": True, "top_logprobs": 5, "stream": True, "stream_options": {"include_usage": True}}
    neutral: dict[str, Any] = {name: values[-1] for name, values in chat_requests._NEUTRAL.items()}
    tools: dict[str, Any] = {name: values[-1] for name, values in chat_requests._TOOLS.items()}
    unused = dict.fromkeys(("user", *chat_requests._UNUSED), "somebody")
    request = parse(
        **{"model": "tiny", "max_completion_tokens": 9, "n": 3, "stop": ["\n", "é"], "seed": 7},
        **{"draft": "none", "draft_length": 2, "blt_details": True, **sampling, **told},
        **{**neutral, **tools, **unused},
    )
    assert request.completion == CompletionRequest(
        (b"",),
        GenerationOptions(9, 0.5, 40, 0.9, 0.05, 1.2, 7, (b"\n", "é".encode()), "none", 2, True, 5, True),
        n=3,
        stream=True,
        include_usage=True,
        blt_details=True,
    )


def test_conversations() -> None:
    said_back = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    for messages, expected in (
        ([USER], [USER]),
        ([{"role": "developer", "content": ""}], [{"role": "developer", "content": ""}]),
        ([{**USER, "name": "Ann"}], [{**USER, "name": "Ann"}]),
        ([{"role": "assistant", "content": "é", **said_back}], [{"role": "assistant", "content": "é"}]),
        ([{**USER, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
         [{**USER, "content": "a\nb"}]),
        ([{**USER, "content": []}], [{**USER, "content": ""}]),
        ([USER] * 2048, [USER] * 2048),
    ):  # fmt: skip
        assert list(parse(messages=messages).messages) == expected


@pytest.mark.parametrize(
    ("code", "param", "values"),
    [
        ("missing_required_parameter", "messages", [None]),
        ("invalid_type", "messages", ["Once", {"role": "user"}]),
        ("invalid_value", "messages", [[], [USER] * 2049]),
        ("model_not_found", "model", ["gpt-4"]),
        ("invalid_type", "max_tokens", ["9", True]),
        ("invalid_value", "max_tokens", [501, 0]),
        ("invalid_value", "max_completion_tokens", [501, 0, 9.0]),
        ("invalid_type", "logprobs", [1, 0, "yes"]),
        ("invalid_value", "top_logprobs", [1, 21, -1]),
        ("invalid_type", "top_logprobs", [True]),
        ("invalid_value", "n", [0, 129]),
        ("invalid_type", "stop", [5]),
        ("invalid_type", "stream", ["yes"]),
        ("invalid_type", "user", [5]),
        ("invalid_type", "prompt_cache_key", [5]),
        ("unsupported_parameter", "presence_penalty", [0.5, False]),
        ("unsupported_parameter", "tools", [[{"type": "function"}], {}]),
        ("unsupported_parameter", "tool_choice", ["required", {"type": "function"}]),
        ("unsupported_parameter", "functions", [[{"name": "f"}]]),
        ("unsupported_parameter", "function_call", [{"name": "f"}]),
        ("unsupported_parameter", "modalities", [["text", "audio"]]),
        ("unsupported_parameter", "store", [True, 0]),
        ("unsupported_parameter", "service_tier", ["flex"]),
        ("unknown_parameter", "prompt", ["Once"]),
        ("unknown_parameter", "echo", [True]),
        ("unknown_parameter", "chat_template", ["{{ 1 }}"]),
    ],
)
def test_refusals(code: str, param: str, values: list[Any]) -> None:
    for value in values:
        error = refusal(404 if code == "model_not_found" else 400, **{param: value})
        assert (error["param"], error["code"]) == (param, code), value


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ("Once", "", "'Once'; allowed is an object with role and content"),
        ({"content": "a"}, ".role", "is missing; allowed are system, developer, user, assistant"),
        ({"role": "boss", "content": "a"}, ".role", "'boss'; allowed are system"),
        ({"role": ["user"], "content": "a"}, ".role", "['user']; allowed are system"),
        ({"role": "tool", "content": "a", "tool_call_id": "x"}, ".role", "goes into a user's message"),
        ({"role": "function", "content": "a"}, ".role", "calls no tools"),
        ({"role": "user"}, ".content", "is missing; give a text"),
        ({"role": "assistant", "content": None}, ".content", "is missing; give a text"),
        ({"role": "user", "content": 5}, ".content", "is 5; allowed are a string and a list of text parts"),
        (
            {"role": "user", "content": "a\ud800"},
            ".content",
            r"has half a character, \ud800, at 1; leave it out",
        ),
        ({"role": "user", "content": ["a"]}, ".content[0]", '\'a\'; allowed is {"type": "text"'),
        ({"role": "user", "content": [{"text": "a"}]}, ".content[0]", 'allowed is {"type": "text"'),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text", "allowed is a string"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            ".content[0].type",
            "of type 'image_url'; this model reads text only",
        ),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, ".tool_calls", "calls no tools"),
        ({"role": "user", "content": "a", "name": 5}, ".name", "is 5; allowed is a string"),
        ({"role": "user", "content": "a", "weight": 1}, ".weight", "allowed are role, content, name"),
        (
            {"role": "assistant", "content": "a", "refusal": "b"},
            ".refusal",
            "allowed are role, content, name",
        ),
    ],
)
def test_messages_that_are_refused(message: Any, param: str, words: str) -> None:
    error = refusal(messages=[USER, message])
    assert error["param"] == f"messages[1]{param}"
    assert words in error["message"]


def test_two_names_of_a_length() -> None:
    for document in (
        {"max_tokens": 9},
        {"max_completion_tokens": 9},
        {"max_tokens": 9, "max_completion_tokens": 9},
    ):
        assert parse(**document).completion.options.max_new_bytes == 9
    error = refusal(max_tokens=9, max_completion_tokens=8)
    assert (error["param"], "is 8, and max_tokens, an older name of it, 9" in error["message"]) == (
        "max_tokens",
        True,
    )


def test_logprobs() -> None:
    assert parse(logprobs=False, top_logprobs=0).completion.options.logprobs is None
    assert parse(logprobs=True).completion.options.logprobs == 0
    assert parse(logprobs=True, top_logprobs=20).completion.options.logprobs == 20
    assert "give logprobs: true" in refusal(top_logprobs=2)["message"]


def test_null_is_not_given() -> None:
    names = [*requests.SHARED, *chat_requests._OWN, *chat_requests._NEUTRAL, *chat_requests._TOOLS]
    others = [*chat_requests._UNUSED, "what comes next year"]
    assert parse(**dict.fromkeys(name for name in [*names, *others] if name != "messages")) == parse()


def test_the_template_s_end_is_a_stop_string_beside_those_that_are_asked_for() -> None:
    own = GenerationOptions(900, stop=(b"\n\n",))
    facts = ModelFacts("tiny", 500, own, (b"<end>",))
    assert parse(facts).completion.options == GenerationOptions(500, stop=(b"\n\n", b"<end>"))
    assert parse(facts, stop=["a", "<end>"]).completion.options.stop == (b"a", b"<end>")
    assert parse(facts, stop="").completion.options.stop == (b"<end>",)
    assert parse_completion({"prompt": ""}, facts).options.stop == (b"\n\n",)


def test_what_is_known_with_the_prompt_alone() -> None:
    request = parse(n=128, logprobs=True, max_tokens=500)
    assert request.with_prompt(b"x" * 499, FACTS).prompts == (b"x" * 499,)
    for prompt, words in ((b"x" * 500, "messages make a prompt of 500 bytes, the model reads at most 499"),):
        with pytest.raises(ApiError, match=words) as refused:
            request.with_prompt(prompt, FACTS)
        assert refused.value.document["error"]["code"] == "context_length_exceeded"
    larger = ModelFacts("tiny", 70_000, GenerationOptions())
    with pytest.raises(ApiError, match="logprobs would be of up to 140000 bytes"):
        parse(larger, n=2, logprobs=True, max_tokens=70_000).with_prompt(b"", larger)


def assert_told(error: ApiError) -> None:
    json.dumps(error.document, allow_nan=False)
    assert "\n" not in error.document["error"]["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [*requests.SHARED, *chat_requests._OWN, *chat_requests._NEUTRAL, *chat_requests._TOOLS, "other"]
)
PARTS = st.fixed_dictionaries({}, optional={"type": st.just("text") | VALUES, "text": VALUES})
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from([*chat_requests.ROLES, "tool"]) | VALUES,
        "content": st.text() | VALUES | st.lists(PARTS, max_size=3),
        "name": VALUES,
        "tool_calls": VALUES,
        "other": VALUES,
    },
)


@given(st.dictionaries(NAMES, VALUES, max_size=4), st.lists(MESSAGES | VALUES, max_size=3))
def test_anything_is_a_request_or_refused(document: dict[str, Any], messages: list[Any]) -> None:
    try:
        request = parse_chat({"messages": messages, **document}, FACTS)
    except ApiError as error:
        assert_told(error)
        return
    assert 1 <= request.completion.n <= 128
    for message in request.messages:
        assert message["role"] in chat_requests.ROLES
        assert message.keys() <= {"role", "content", "name"}
        json.dumps(message).encode().decode("utf-8")
        "".join(message.values()).encode()
