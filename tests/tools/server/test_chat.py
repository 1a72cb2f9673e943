"""Chats over loopback with OpenAI's own client: what the runtime makes of the rendered conversation."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from blt_edge.runtime import BltModel, BundleError, GenerationOptions, OptionError
from blt_edge.runtime.chat_template import ChatTemplate, TemplateError
from blt_edge.runtime.worker import WorkerBusyError
from blt_edge.tools.server.answers import token_text
from blt_edge.tools.server.service import Service
from blt_edge.tools.server.settings import ServerSettings
from support.chat_bundles import chat_bundle, chat_text

openai = pytest.importorskip("openai", reason="needs openai: pip install 'blt-edge[dev]'")

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Où"}, {"type": "text", "text": "est-il ?"}]},
]
PROMPT = chat_text("system: Be kind.", "user: Où\nest-il ?")
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
EXTRAS = {"top_k": 100, "draft": "lookup", "draft_length": 4}
OPTIONS = GenerationOptions(40, 0.9, 100, 0.95, seed=7)


@pytest.fixture(scope="module")
def ask(chats) -> Iterator[Callable[..., Any]]:
    """`ask(messages=..., ...)` -> what OpenAI's client makes of the answer."""
    with openai.OpenAI(base_url=f"{chats.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield partial(client.chat.completions.create, model="tiny")


def test_whole_and_streamed(ask, chat_model: BltModel) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 40, **SAMPLING, "extra_body": EXTRAS}
    answer = ask(**asked)
    expected = chat_model.generate(PROMPT, OPTIONS)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.finish_reason, choice.logprobs, choice.message.refusal) == ("length", None, None)
    read = len(PROMPT.encode())
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 40)
    assert answer.usage.total_tokens == read + 40
    first, *texts, end, counts = ask(**asked, stream=True, stream_options={"include_usage": True})
    assert {chunk.object for chunk in (first, *texts, end, counts)} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in (first, *texts, end, counts)}) == 1
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content for chunk in texts) == expected.text
    assert len(texts) > 5
    assert {chunk.choices[0].delta.role for chunk in texts} == {None}
    reasons = [chunk.choices[0].finish_reason for chunk in (first, *texts, end)]
    assert reasons == [None] * (len(texts) + 1) + ["length"]
    assert end.choices[0].delta.content is None
    assert {chunk.usage for chunk in (first, *texts, end)} == {None}
    assert (counts.choices, counts.usage.completion_tokens) == ([], 40)
    assert counts.usage.prompt_tokens_details.cached_tokens == read


def test_choices(ask, chat_model: BltModel) -> None:
    asked = {"messages": MESSAGES, "n": 3, "max_completion_tokens": 20, "temperature": 1, "seed": 5}
    expected = [
        chat_model.generate(PROMPT, GenerationOptions(20, temperature=1.0, seed=seed)) for seed in (5, 6, 7)
    ]
    answer = ask(**asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [one.text for one in expected]
    assert answer.usage.prompt_tokens == len(PROMPT.encode())
    streamed, roles = [""] * 3, [0] * 3
    for chunk in ask(**asked, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
    assert (streamed, roles) == ([one.text for one in expected], [1, 1, 1])


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(ask, chat_model: BltModel, stream: bool) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choices = [chunk.choices[0] for chunk in ask(**asked, stream=True)] if stream else ask(**asked).choices
    told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    made = chat_model.generate(PROMPT, GenerationOptions(12, logprobs=3))
    assert bytes(token.bytes[0] for token in told) == made.data
    for token, detail in zip(told, made.details, strict=True):
        assert token.token == token_text(detail.byte + 4)
        assert token.logprob == pytest.approx(detail.logprob, abs=1e-4)
        assert len(token.top_logprobs) == 3
        for one, (number, logprob) in zip(token.top_logprobs, detail.top, strict=True):
            assert (one.token, one.bytes) == (token_text(number), [number - 4] if number >= 4 else None)
            assert one.logprob == pytest.approx(logprob, abs=1e-4)


def test_details(chats, chat_model: BltModel) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 30, "temperature": 0, "blt_details": True}
    (choice,) = chats.chat(asked).json()["choices"]
    made = chat_model.generate(PROMPT, GenerationOptions(30))
    assert bytes(one["byte"] for one in choice["blt"]["prompt"]) == PROMPT.encode()
    assert bytes(one["byte"] for one in choice["blt"]["bytes"]) == made.data
    lines = chats.chat({**asked, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    told = [chunk["blt"] for chunk in chunks if "blt" in chunk]
    assert bytes(one["byte"] for blt in told for one in blt["bytes"]) == made.data
    assert len([blt for blt in told if "prompt" in blt]) == len([blt for blt in told if "stats" in blt]) == 1
    assert told[-1]["stats"]["new_bytes"] == made.stats.new_bytes


def test_a_conversation_that_sends_everything_again_reads_every_byte_once(
    serve, chat_model: BltModel
) -> None:
    server = serve(chat_model)
    # What is no text can't be sent back: ASCII only, as of a model that has learnt some.
    ascii_only = tuple((number, -100.0) for number in (*range(4), *range(132, 260)))
    defaults = replace(server.service.facts.defaults, logit_bias=ascii_only)
    server.service.facts = replace(server.service.facts, defaults=defaults)
    turns: list[dict[str, str]] = []
    before = said = 0
    for turn in range(8):
        turns.append({"role": "user", "content": f"And {turn}?"})
        asked = {"messages": turns, "max_tokens": 9, "temperature": 0, "draft": "none"}
        answer = server.chat(asked).json()
        prompt = chat_text(*(f"{one['role']}: {one['content']}" for one in turns))
        options = GenerationOptions(9, draft="none", logit_bias=ascii_only)
        content = answer["choices"][0]["message"]["content"]
        assert content == chat_model.generate(prompt, options).text
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        # All of what was read and said before, but for the byte that was chosen last: nobody has read it yet.
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached in ((before - 1, before) if turn else (0,))
        before, said = len(prompt) + len(content), said + len(content)
        turns.append({"role": "assistant", "content": content})
    read = server.metric("blt_edge_prompt_bytes_total")
    assert len(prompt) - said <= read <= len(prompt) - said + 8 + 9


def test_the_template_s_end_ends_an_answer(serve, tiny_model, model: BltModel, tmp_path: Path) -> None:
    whole = model.generate("Once upon", GenerationOptions(60)).text
    end = next(letter for letter in whole[5:] if letter.isascii() and letter.isprintable())
    bundle = chat_bundle(tiny_model.bundle, tmp_path / "b", "{{ messages[0].content }}", end)
    asked = {"messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 60, "temperature": 0}
    server = serve(BltModel.load(bundle, threads=1))
    (choice,) = server.chat(asked).json()["choices"]
    assert choice["message"]["content"] == whole[: whole.index(end)]
    assert choice["finish_reason"] == "stop"
    plain = server.post({"prompt": "Once upon", "max_tokens": 60, "temperature": 0}).json()
    assert plain["choices"][0]["text"] == whole


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("no", "invalid_value", "the chat template refuses these messages: I take no no"),
        ("wrong", "invalid_value", "the chat template fails on these messages: UndefinedError"),
        ("long", "context_length_exceeded", "messages make a prompt of 10"),
    ],
)
def test_conversations_that_the_template_does_not_take(ask, content: str, code: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(messages=[{"role": "user", "content": content}])
    assert (refused.value.code, refused.value.param) == (code, "messages")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TemplateError("the chat template takes more than 2 s"), (500, "model_error", "false")),
        (OptionError("chat templates need jinja2"), (500, "model_error", "false")),
        (WorkerBusyError("is busy with others' calls"), (503, "template_busy", None)),
    ],
)
def test_a_template_that_fails(serve, chat_model: BltModel, monkeypatch, error: Exception, told: Any) -> None:
    def fail(self: ChatTemplate, messages: Any) -> bytes:
        raise error

    server = serve(chat_model)
    monkeypatch.setattr(ChatTemplate, "render", fail)
    answer = server.chat({})
    status, code, again = told
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert str(error).removeprefix("the chat template ") in answer.json()["error"]["message"]
    assert answer.headers.get("x-should-retry") == again
    assert (answer.headers.get("retry-after") is not None) == (status == 503)
    assert server.errors == []


def test_others_are_answered_while_a_template_takes_its_time(
    serve, chat_model: BltModel, monkeypatch
) -> None:
    before, goes_on = ChatTemplate.render, threading.Event()

    def wait(self: ChatTemplate, messages: Any) -> bytes:
        assert goes_on.wait(30)
        return before(self, messages)

    server = serve(chat_model)
    monkeypatch.setattr(ChatTemplate, "render", wait)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.chat({})))
    thread.start()
    assert server.post({}).status_code == 200
    goes_on.set()
    thread.join(30)
    assert answers[0].status_code == 200


def test_whether_it_chats_is_told(chats, server) -> None:
    assert chats.get("/v1/models").json()["data"][0]["blt"]["chat"] is True
    assert server.get("/v1/models").json()["data"][0]["blt"]["chat"] is False
    chats.chat({})
    route = 'blt_edge_http_requests_total{route="/v1/chat/completions",status="200"}'
    assert route in chats.get("/metrics").text


@pytest.mark.parametrize(
    ("request_line", "status", "words"),
    [
        ("GET /v1/chat/completions", 405, "allowed is POST"),
        ("POST /chat/completions", 404, "chats are at /v1/chat/completions"),
        ("POST /v1/responses", 404, "chats are at /v1/chat/completions"),
        ("POST /v1/messages", 404, "chats are at /v1/chat/completions"),
        ("POST /completions", 404, "completions are at /v1/completions"),
        ("GET /v1/embeddings", 404, "there are /v1/completions, /v1/chat/completions,"),
    ],
)
def test_wrong_paths_and_methods(chats, request_line: str, status: int, words: str) -> None:
    method, path = request_line.split()
    answer = httpx.request(method, chats.url + path)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_without_a_template_one_line_says_what_to_do(server) -> None:
    answer = server.chat({})
    message = answer.json()["error"]["message"]
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "/v1/completions" in message
    assert "blt-edge export --chat-template FILE" in message


def test_a_bundle_whose_template_does_not_work_is_not_served(tiny_model, tmp_path: Path) -> None:
    bundle = chat_bundle(tiny_model.bundle, tmp_path / "b", "{% if %}")
    with pytest.raises(
        BundleError, match=r"^chat_template.jinja: .*TemplateSyntaxError.*export the checkpoint"
    ):
        Service(BltModel.load(bundle, threads=1), ServerSettings("tiny"), print)
