"""Completions over loopback with OpenAI's own client: the same bytes as the runtime makes in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.tools.server.answers import token_text

openai = pytest.importorskip("openai", reason="needs openai: pip install 'blt-edge[dev]'")

PROMPT = "Once upon a time"
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
EXTRAS = {"top_k": 100, "min_p": 0.001, "repetition_penalty": 1.1, "draft": "lookup", "draft_length": 4}
OPTIONS = GenerationOptions(40, 0.9, 100, 0.95, 0.001, 1.1, 7)


@pytest.fixture(scope="module")
def client(server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def complete(client) -> Callable[..., Any]:
    """`complete(prompt="Once", ...)` -> what OpenAI's client makes of the answer."""
    return partial(client.completions.create, model="tiny")


def test_whole_and_streamed(complete, model: BltModel) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 40, **SAMPLING, "extra_body": EXTRAS}
    answer = complete(**asked)
    expected = model.generate(PROMPT, OPTIONS)
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "tiny", "cmpl-")
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (16, 40)
    assert answer.usage.total_tokens == 56
    chunks = list(complete(**asked, stream=True, stream_options={"include_usage": True}))
    *texts, counts = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == expected.text
    assert len(texts) > 5
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    reasons = [chunk.choices[0].finish_reason for chunk in texts]
    assert reasons == [None] * (len(texts) - 1) + ["length"]
    assert {chunk.usage for chunk in texts} == {None}
    assert (counts.choices, counts.usage.completion_tokens) == ([], 40)


def test_temperature_is_one_unless_given_and_without_a_seed_texts_differ(complete, model: BltModel) -> None:
    seeded = complete(prompt="a", max_tokens=30, seed=3)
    expected = model.generate("a", GenerationOptions(30, temperature=1.0, seed=3))
    assert seeded.choices[0].text == expected.text
    assert len({complete(prompt="a", max_tokens=30).choices[0].text for _ in "ab"}) == 2


def test_several_prompts_and_choices(complete, model: BltModel) -> None:
    asked = {"prompt": ["a", "", "早い"], "n": 2, "max_tokens": 20, "temperature": 1, "seed": 5}
    answer = complete(**asked)
    assert [choice.index for choice in answer.choices] == list(range(6))
    expected = [
        model.generate(prompt, GenerationOptions(20, temperature=1.0, seed=seed))
        for prompt in asked["prompt"]
        for seed in (5, 6)
    ]
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.completion_tokens == sum(one.stats.new_bytes for one in expected)
    streamed = [""] * 6
    for chunk in complete(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [one.text for one in expected]


def test_stop_strings(complete, model: BltModel) -> None:
    whole = model.generate(PROMPT, GenerationOptions(60)).text
    stop = next(letter for letter in whole[10:] if letter != "\ufffd")
    answer = complete(prompt=PROMPT, max_tokens=60, temperature=0, stop=stop)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_room_for_one_more_byte(complete) -> None:
    answer = complete(prompt="x" * 499, max_tokens=9, temperature=0)
    assert answer.usage.completion_tokens <= 1
    assert answer.choices[0].finish_reason in ("length", "stop")


def likelihoods(model: BltModel, text: bytes) -> np.ndarray:
    """Natural log probabilities [n + 1, 260], by numpy from the model's logits."""
    logits = model.logits(text).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_with_the_prompt_in_front(complete, model: BltModel, stream: bool) -> None:
    asked = {"prompt": "h\u00e9", "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": True}
    parts = complete(**asked, stream=True) if stream else [complete(**asked)]
    choices = [part.choices[0] for part in parts]
    made = model.generate("h\u00e9", GenerationOptions(12))
    assert "".join(choice.text for choice in choices) == "h\u00e9" + made.text
    data = "h\u00e9".encode() + made.data
    logs = likelihoods(model, data)
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert tokens == [token_text(byte + 4) for byte in data]
    told = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert told == pytest.approx([logs[place, byte + 4] for place, byte in enumerate(data)], abs=1e-4)
    tops = [top for choice in choices for top in choice.logprobs.top_logprobs]
    for place, top in enumerate(tops):
        best = np.sort(logs[place])[::-1][:3]
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
        assert 3 <= len(top) <= 4
        assert tokens[place] in top


def test_what_clients_send_beside_the_text(complete, model: BltModel) -> None:
    told = {"include_usage": True, "include_obfuscation": False}
    others = {"service_tier": None, "logprobs": False, "stop": [f"stop {number}" for number in range(8)]}
    asked = {"prompt": PROMPT, "max_tokens": 20, "top_p": 0, "seed": -1, "extra_body": others}
    chunks = list(complete(**asked, stream=True, stream_options=told))
    assert (
        "".join(chunk.choices[0].text for chunk in chunks[:-1])
        == model.generate(PROMPT, GenerationOptions(20)).text
    )
    assert complete(prompt="a", max_tokens=5, stop="", logit_bias=None).usage.completion_tokens == 5


def test_scoring_alone(complete, model: BltModel) -> None:
    text = b"It was the best of times"
    asked = {"max_tokens": 0, "echo": True, "logprobs": 0, "extra_body": {"blt_details": True}}
    answer = complete(prompt=text.decode(), **asked)
    choice = answer.choices[0]
    assert choice.text == text.decode()
    bits = -sum(choice.logprobs.token_logprobs) / np.log(2) / len(text)
    assert bits == pytest.approx(model.score(text).bits_per_byte, abs=1e-4)
    assert answer.usage.completion_tokens == 0
    assert choice.blt["stats"]["patches"] == len(model.patch_lengths(text)) - 1


def test_details_tell_patches_entropies_and_figures(server, model: BltModel) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0.8, "seed": 1, "stream": True}
    lines = server.post({**asked, "blt_details": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    plain = server.post({**asked, "stream": False}).json()["choices"][0]["text"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == plain
    new = [byte for chunk in chunks for byte in chunk["blt"]["bytes"]]
    whole = chunks[0]["blt"]["prompt"] + new
    data = bytes(byte["byte"] for byte in whole)
    expected = model.generate(PROMPT, GenerationOptions(60, temperature=0.8, seed=1))
    assert data == PROMPT.encode() + expected.data
    assert [byte["position"] for byte in whole] == list(range(len(data)))
    assert not any(byte["guessed"] for byte in whole[:16])
    entropies = model.entropies(data)[:-1].tolist()
    assert [byte["entropy"] for byte in whole] == pytest.approx(entropies, abs=1e-4)
    starts = np.cumsum(model.patch_lengths(data)).tolist()
    assert [place + 1 for place, byte in enumerate(whole) if byte["starts_patch"]] == starts[:-1]
    stats = chunks[-1]["blt"]["stats"]
    counts = (16, expected.stats.new_bytes, expected.stats.patches - 1)
    assert (stats["prompt_bytes"], stats["new_bytes"], stats["patches"]) == counts
    assert 0 < stats["prefill_seconds"] <= stats["first_byte_seconds"]
    assert set(stats["stage_seconds"]) == {"patcher", "encoder", "latent", "decoder"}
    assert stats["accepted"] <= stats["drafted"]


def test_errors_as_the_client_knows_them(complete) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(prompt="a", extra_body={"temprature": 1})
    told = (refused.value.code, refused.value.param, refused.value.type)
    assert told == ("unknown_parameter", "temprature", "invalid_request_error")
    assert refused.value.request_id.startswith("req-")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        complete(model="gpt-4", prompt="a")


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    model = client.models.retrieve("tiny")
    assert (model.owned_by, model.blt["max_positions"]) == ("blt-edge", 500)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


@pytest.mark.parametrize(
    ("request_line", "code", "words"),
    [
        ("GET /v1/completions", (405, "method_not_allowed"), "allowed is POST"),
        ("DELETE /v1/models", (405, "method_not_allowed"), "GET"),
        (
            "POST /v1/chat/completions",
            (404, "not_found"),
            "this model's bundle has no chat template: send a text as prompt to /v1/completions",
        ),
        ("POST /v1/responses", (404, "not_found"), "knows no chat"),
        ("POST /completions", (404, "not_found"), "a base URL that ends in /v1"),
        ("POST /v1/completions/", (404, "not_found"), "completions are at /v1/completions"),
        ("GET /v1/embeddings", (404, "not_found"), "there are /v1/completions,"),
        ("GET /nothing%1b[31m", (404, "not_found"), "nothing"),
    ],
)
def test_wrong_paths_and_methods(server, request_line: str, code: tuple[int, str], words: str) -> None:
    method, path = request_line.split()
    answer = httpx.request(method, server.url + path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == code
    assert words in error["message"]
    assert "\x1b" not in answer.text + server.lines[-1]


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"[" * 200_000, "application/json", "invalid_json"),
        (b'"prompt"', "application/json; charset=utf-8", "invalid_json"),
        (b'{"prompt": "a"}', "text/plain", "invalid_content_type"),
        (b'{"prompt": "a"}', "", "invalid_content_type"),
        (b'{"prompt": "a", "seed": 1e999}', "application/json", "invalid_value"),
    ],
)
def test_bodies_that_are_no_request(server, body: bytes, kind: str, code: str) -> None:
    answer = server.post(content=body, headers={"Content-Type": kind} if kind else {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_every_request_leaves_a_line_and_counts(server) -> None:
    before = server.metric("blt_edge_generated_bytes_total")
    answer = server.post({"max_tokens": 7, "temperature": 0})
    made = answer.json()["usage"]["completion_tokens"]
    server.wait_until(lambda: server.lines and server.lines[-1].startswith("POST /v1/completions 200 "))
    assert f" 200 {len(answer.content)} bytes " in server.lines[-1]
    assert server.metric("blt_edge_generated_bytes_total") == before + made
    assert "queue;dur=" in answer.headers["server-timing"]
    text = server.get("/metrics").text
    assert 'blt_edge_http_requests_total{route="/v1/completions",status="200"}' in text
    assert "process_resident_memory_bytes" in text or not text.count("process_")
    for path in ("/healthz", "/health"):
        assert server.get(path).json() == {"status": "ok"}
