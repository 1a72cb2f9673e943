"""Texts that must fit, asked for with OpenAI's own client: they do, and are what the runtime makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from blt_edge.runtime import BltModel, Constraint, GenerationOptions
from blt_edge.runtime.vocabulary import BYTE_OFFSET, EOS
from blt_edge.tools.fuzz.hostile_constraints import COSTLY
from support.fitting_texts import check_fits_pattern, check_fits_schema

from .conftest import Running, running

pytest.importorskip("llguidance")
openai = pytest.importorskip("openai", reason="needs openai: pip install 'blt-edge[dev]'")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name of it": {"type": "string", "maxLength": 5},
        "years": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "catfish", "dog"]},
    },
    "required": ["name of it", "years", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": SCHEMA}}
GBNF = 'root ::= ("yes" | "no") [.!?]'
SAMPLING = {"temperature": 0.9, "seed": 3}
PROMPT = "Once upon a time"


def fits_object(text: str) -> None:
    assert isinstance(json.loads(text), dict)


KINDS: dict[str, tuple[dict[str, Any], Constraint, Callable[[str], object]]] = {
    "openai's schema": (
        {"response_format": FORMAT},
        Constraint.json_schema(SCHEMA),
        lambda text: check_fits_schema(text, SCHEMA),
    ),
    "llama-server's schema": (
        {"json_schema": SCHEMA},
        Constraint.json_schema(SCHEMA),
        lambda text: check_fits_schema(text, SCHEMA),
    ),
    "vllm's schema": (
        {"structured_outputs": {"json": SCHEMA}},
        Constraint.json_schema(SCHEMA),
        lambda text: check_fits_schema(text, SCHEMA),
    ),
    "a pattern": (
        {"guided_regex": "(é|[ab]{2}){3}[0-9]{4}"},
        Constraint.regex("(é|[ab]{2}){3}[0-9]{4}"),
        lambda text: check_fits_pattern(text, "(é|[ab]{2}){3}[0-9]{4}"),
    ),
    "a choice": (
        {"guided_choice": ["rabbit", "rab", "猫"]},
        Constraint.choice(["rabbit", "rab", "猫"]),
        lambda text: check_fits_pattern(text, "rabbit|rab|猫"),
    ),
    "a grammar": (
        {"grammar": GBNF},
        Constraint.grammar(GBNF),
        lambda text: check_fits_pattern(text, "(yes|no)[.!?]"),
    ),
}

# 1. Of both endpoints.

Made = tuple[str, str, int]
"""Text, finish reason, bytes that were made."""


def completed(client: Any, stream: bool, **asked: Any) -> Made:
    made = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=90,
        stream=stream,
        extra_body={**SAMPLING, **asked},
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    parts = [*made] if stream else [made]
    choices = [part.choices[0] for part in parts if part.choices]
    return (
        "".join(choice.text for choice in choices),
        choices[-1].finish_reason,
        parts[-1].usage.completion_tokens,
    )


def chatted(client: Any, stream: bool, **asked: Any) -> Made:
    own = {"response_format": asked.pop("response_format")} if "response_format" in asked else {}
    made = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=90,
        stream=stream,
        extra_body={**SAMPLING, **asked},
        **({"stream_options": {"include_usage": True}} if stream else {}),
        **own,
    )
    if not stream:
        choice = made.choices[0]
        return choice.message.content, choice.finish_reason, made.usage.completion_tokens
    parts = [*made]
    choices = [part.choices[0] for part in parts if part.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, choices[-1].finish_reason, parts[-1].usage.completion_tokens


@pytest.fixture(scope="module", params=[completed, chatted])
def ask(request: pytest.FixtureRequest, server: Running) -> Iterator[Callable[..., Made]]:
    """`ask(stream, ...)` by one endpoint or the other."""
    with ExitStack() as stack:
        if request.param is chatted:
            try:
                model = request.getfixturevalue("chat_model")
            except pytest.FixtureLookupError:
                pytest.skip("no bundle of these tests has a chat template")
            server = stack.enter_context(running(model))
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        stack.enter_context(client)
        yield lambda stream, **asked: request.param(client, stream, **asked)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_fits_streamed_and_whole(ask, kind: str) -> None:
    asked, _, check = KINDS[kind]
    whole = ask(False, **asked)
    check(whole[0])
    assert whole[1] == "stop"
    assert ask(True, **asked) == whole
    # What is made beside the text: its end, and nothing else.
    assert whole[2] - len(whole[0].encode()) in (0, 1)


def test_an_object_and_no_object(ask) -> None:
    free = ask(False)
    assert ask(False, response_format={"type": "text"}) == free
    bias = {str(ord("}")): 60, str(ord('"')): 60}
    text, reason, _ = ask(False, response_format={"type": "json_object"}, logit_bias=bias)
    assert reason == "stop"
    fits_object(text)


def test_biases(ask) -> None:
    assert set(ask(False, logit_bias={"0": -100, "120": 100})[0]) == {"x"}
    text, reason, _ = ask(False, logit_bias={"256": 100})
    assert (text, reason) == ("", "stop")


def test_refusals_name_the_parameter(ask) -> None:
    for asked, field in (
        ({"guided_regex": "[a"}, "guided_regex"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": FORMAT, "guided_choice": ["a"]}, "guided_choice"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                ask(stream, **asked)
            assert refused.value.param == field


# 2. Of completions: what the runtime makes.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft", ["none", "auto", "lookup"])
def test_the_text_is_what_generate_makes(server: Running, model: BltModel, kind: str, draft: str) -> None:
    asked, constraint, _ = KINDS[kind]
    told = {"prompt": PROMPT, "max_tokens": 90, "temperature": 0.9, "seed": 5, "draft": draft, **asked}
    options = GenerationOptions(90, temperature=0.9, seed=5, constraint=constraint)
    expected = model.generate(PROMPT, options)
    for again in (False, True):  # then from a state that is kept
        answer = server.post(told).json()
        choice, usage = answer["choices"][0], answer["usage"]
        assert choice["text"] == expected.text
        assert usage["completion_tokens"] == expected.stats.new_bytes
        if again:
            assert usage["prompt_tokens_details"]["cached_tokens"] == len(PROMPT)


def test_each_choice_and_prompt_has_its_own_place(server: Running, model: BltModel) -> None:
    asked, constraint, check = KINDS["openai's schema"]
    prompts = ["a", "", "早い"]
    told = {"prompt": prompts, "n": 3, "max_tokens": 90, "temperature": 1, "seed": 9, **asked}
    found = [choice["text"] for choice in server.post(told).json()["choices"]]
    expected = [
        model.generate(prompt, GenerationOptions(90, temperature=1.0, seed=seed, constraint=constraint)).text
        for prompt in prompts
        for seed in (9, 10, 11)
    ]
    assert found == expected
    assert len(set(found)) > 5
    for text in found:
        check(text)


def test_with_the_prompt_in_front_it_is_the_new_text_that_fits(server: Running) -> None:
    told = {"prompt": "The year was ", "echo": True, "logprobs": 1, "max_tokens": 20, "temperature": 1}
    choice = server.post({**told, "guided_regex": "1[0-9]{3}"}).json()["choices"][0]
    assert re.fullmatch("The year was 1[0-9]{3}", choice["text"])
    assert len(choice["logprobs"]["tokens"]) == len(choice["text"])


def test_utf8_and_biases(server: Running, model: BltModel) -> None:
    told = {"prompt": PROMPT, "max_tokens": 60, "temperature": 2, "seed": 1}
    assert "\ufffd" in server.post(told).json()["choices"][0]["text"]
    kept = server.post({**told, "utf8": True}).json()["choices"][0]["text"]
    assert "\ufffd" not in kept[:-1]
    options = GenerationOptions(60, temperature=2, seed=1, utf8=True)
    assert kept == model.generate(PROMPT, options).text
    biases = {ord("e") + BYTE_OFFSET: 4.0, EOS: -100.0, ord("a") + BYTE_OFFSET: -3.5}
    sent = {str(ord("e")): 4, "256": -100, str(ord("a")): -3.5}
    options = GenerationOptions(60, temperature=2, seed=1, logit_bias=biases)
    assert server.post({**told, "logit_bias": sent}).json()["choices"][0]["text"] == (
        model.generate(PROMPT, options).text
    )


HOSTILE: dict[str, dict[str, Any]] = {
    "a reference to itself": {"guided_json": {"$ref": "#"}},
    "nothing fits": {"guided_json": {"type": "integer", "minimum": 2, "maximum": 1}},
    "unknown words": {
        "response_format": {"type": "json_object", "schema": {"type": "string", "format": "zip"}}
    },
    "a loop without a byte": {"grammar": "root ::= root"},
    "a rule that is not there": {"guided_grammar": "start: other"},
    "brackets": {"guided_regex": "[" * 60_000},
    "groups": {"guided_regex": "(" * 60_000},
    "look-around": {"guided_regex": "(?=a)b"},
    "deep": {"guided_json": "[" * 60_000},
    "names": {"guided_json": {"properties": {str(number): {} for number in range(1001)}}},
    "a line feed": {"grammar": "root ::= a\n\x1b[2J\x00"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_a_line_and_nothing_else(server: Running, name: str) -> None:
    answer = server.post(HOSTILE[name])
    told = answer.json()["error"]
    assert (answer.status_code, told["type"]) == (400, "invalid_request_error")
    assert told["param"] in HOSTILE[name]
    assert told["message"].isprintable()
    assert len(told["message"]) < 400
    assert server.post({}).status_code == 200


def test_others_are_answered_beside_what_is_costly(server: Running, model: BltModel) -> None:
    fields = {"json_schema": "guided_json", "regex": "guided_regex", "grammar": "guided_grammar"}
    costly = [make() for make in [*COSTLY.values()][::3]]
    hostile = [{fields[one.kind]: one.source, "max_tokens": 12, "seed": 1} for one in costly]
    plain = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1, "seed": 4}
    expected = model.generate(PROMPT, GenerationOptions(12, temperature=1.0, seed=4)).text
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.post, asked) for asked in hostile]
        while not all(answer.done() for answer in answers):
            assert server.post(plain).json()["choices"][0]["text"] == expected
            assert server.get("/healthz").status_code == 200
    assert {answer.result().status_code for answer in answers} <= {200, 400}
    for asked, answer in zip(hostile, answers, strict=True):
        if answer.result().status_code == 400:
            told = answer.result().json()["error"]
            assert told["param"] in asked
            assert told["message"].isprintable()
