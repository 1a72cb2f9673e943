"""What the server remembers: nothing is read twice, what is told of it, and whose it is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from blt_edge.runtime import BltModel, GenerationOptions, OptionError
from blt_edge.runtime.prefix_folder import Loaded, PrefixFolder
from blt_edge.tools.server import stores
from blt_edge.tools.server.answers import token_text
from blt_edge.tools.server.stores import Stores

TEXT = "When the lamp was lit, the boats came in: " * 6  # 252 bytes
BYTES = {token_text(4 + byte): bytes([byte]) for byte in range(256)}
GREEDY = {"max_tokens": 4, "temperature": 0, "draft": "none"}


def cached(answer: httpx.Response) -> int:
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def read(server: Any) -> float:
    """Bytes of prompts that were read so far."""
    return server.metric("blt_edge_prompt_bytes_total")


def test_the_second_time_nothing_is_read_and_usage_tells(start, model: BltModel) -> None:
    server = start()
    asked = {**GREEDY, "prompt": TEXT}
    first, second = server.post(asked), server.post(asked)
    assert (cached(first), cached(second)) == (0, len(TEXT))
    text = model.generate(TEXT, GenerationOptions(4)).text
    assert first.json()["choices"] == second.json()["choices"]
    assert second.json()["choices"][0]["text"] == text
    assert second.json()["usage"]["prompt_tokens"] == len(TEXT)
    assert read(server) == len(TEXT)
    lines = server.post(
        {**asked, "stream": True, "stream_options": {"include_usage": True}}
    ).text.splitlines()
    usage = json.loads([line for line in lines if line][-2].removeprefix("data: "))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": len(TEXT)}
    told = server.post({**asked, "blt_details": True})  # which tells of each of the prompt's bytes
    assert cached(told) == 0
    assert told.json()["choices"][0]["blt"]["stats"]["reused_bytes"] == 0
    assert len(told.json()["choices"][0]["blt"]["prompt"]) == len(TEXT)
    figures = {name: server.metric(f"blt_edge_prefix_{name}") for name in ("states", "memory_bytes")}
    assert figures["states"] == 2
    assert 100_000 < figures["memory_bytes"] <= server.metric("blt_edge_prefix_memory_limit_bytes")
    counts = ("hits_total", "misses_total", "reused_bytes_total", "evictions_total")
    assert [server.metric(f"blt_edge_prefix_{name}") for name in counts] == [2, 2, 2 * len(TEXT), 0]


def test_a_conversation_that_sends_everything_again_reads_every_byte_once(start, model: BltModel) -> None:
    server, text, said = start(), b"", 0
    for turn in range(20):
        line = b"%d: go on\n" % turn
        text, said, before = text + line, said + len(line), len(text)
        answer = server.post({**GREEDY, "prompt": list(text), "logprobs": 0})
        # All of what was read and said before, but for the byte that was chosen last: nobody has read it yet.
        assert cached(answer) in ((before - 1, before) if turn else (0,))
        tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
        reply = b"".join(BYTES[token] for token in tokens if token in BYTES)
        assert reply == model.generate(text, GenerationOptions(4, draft="none")).data
        text += reply
    assert said <= read(server) <= said + 19
    assert server.metric("blt_edge_prefix_misses_total") == 1
    assert server.metric("blt_edge_prefix_hits_total") == 19


def test_choices_and_prompts_of_one_request_read_what_they_share_once(start, model: BltModel) -> None:
    prompts = [TEXT + end * 70 for end in "123"]
    asked = {**GREEDY, "prompt": prompts, "n": 2, "temperature": 1, "seed": 5}
    for settings, once in (({}, len(TEXT) + 210), ({"cache_memory": 0}, 3 * len(TEXT) + 210)):
        server = start(**settings)
        answer = server.post(asked)
        assert read(server) == once
        assert cached(answer) == 3 * len(TEXT) + 210 - once
        texts = [choice["text"] for choice in answer.json()["choices"]]
        assert texts == [
            model.generate(prompt, GenerationOptions(4, 1.0, seed=seed, draft="none")).text
            for prompt in prompts
            for seed in (5, 6)
        ]


def test_what_one_key_has_sent_makes_nothing_faster_for_another(start) -> None:
    server = start(api_keys=("one", "two"), cache_memory=4_000_000)

    def ask(key: str) -> int:
        asked = {**GREEDY, "prompt": TEXT}
        return cached(server.post(asked, headers={"Authorization": f"Bearer {key}"}))

    assert [ask(key) for key in ("one", "two", "one", "two")] == [0, 0, len(TEXT), len(TEXT)]
    # Nor does it take room from it.
    one, two = server.service.stores
    assert one.memory == two.memory == 2_000_000
    kept = two.figures
    for number in range(12):
        headers = {"Authorization": "Bearer one"}
        server.post({"prompt": f"{number}{TEXT}", "max_tokens": 1}, headers=headers)
    assert one.figures.evicted > 0
    assert two.figures == kept
    assert server.metric("blt_edge_prefix_memory_bytes") == one.figures.bytes + two.figures.bytes


def test_without_memory_nothing_is_kept(start) -> None:
    server = start(cache_memory=0)
    asked = {**GREEDY, "prompt": TEXT}
    assert [cached(server.post(asked)) for _ in range(2)] == [0, 0]
    assert server.metric("blt_edge_prefix_states") == 0
    assert server.metric("blt_edge_prefix_misses_total") == 0


def test_a_client_that_leaves_leaves_what_was_read(start, slow) -> None:
    server = start()
    slow(0.02)
    asked = {"prompt": TEXT, "max_tokens": 200, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60) as answer:
        next(answer.iter_lines())
    server.wait_idle()
    slow(0)
    assert cached(server.post({**GREEDY, "prompt": TEXT})) == len(TEXT)


def test_stores_refuse_what_is_no_memory(model: BltModel) -> None:
    with pytest.raises(OptionError, match="memory is -1"):
        Stores(model, -1)
    assert Stores(model, 10).memory == 10
    assert [store.memory for store in Stores(model, 10, ("a", "b", "c"))] == [3, 3, 3]


def test_new_states_are_written_now_and_then_and_an_error_is_told(
    model: BltModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stores, "SAVE_SECONDS", 0.02)
    errors: list[Exception] = []
    both = Stores(model, 10_000_000, ("one", "two"))
    assert both.open(tmp_path / "new", errors.append) == Loaded()
    both[1].generate(TEXT, max_new_bytes=0)
    for _ in range(500):
        if files := list((tmp_path / "new").glob("*/*.state")):
            break
        time.sleep(0.02)
    assert len(files) == 1
    monkeypatch.setattr(PrefixFolder, "save", lambda *given: 1 / 0)
    both[0].generate(TEXT, max_new_bytes=0)
    both.close()
    assert {type(error) for error in errors} == {ZeroDivisionError}
    again = Stores(model, 10_000_000, ("two", "three"))
    assert again.open(tmp_path / "new", errors.append) == Loaded(1)
    again.close()
    assert [store.figures.states for store in again] == [1, 0]


def test_one_key_s_folder_that_fails_costs_no_other_key_s(
    model: BltModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    errors: list[Exception] = []
    both, save = Stores(model, 10_000_000, ("one", "two")), PrefixFolder.save
    both.open(tmp_path / "new", errors.append)
    for store in both:
        store.generate(TEXT, max_new_bytes=0)
    broken = both._folders[0]
    monkeypatch.setattr(
        PrefixFolder, "save", lambda folder, store: 1 / 0 if folder is broken else save(folder, store)
    )
    both.close()
    assert [type(error) for error in errors] == [ZeroDivisionError]
    again = Stores(model, 10_000_000, ("one", "two"))
    assert again.open(tmp_path / "new", errors.append) == Loaded(1)
    again.close()
    assert [store.figures.states for store in again] == [0, 1]
