"""Streams: what is emitted, when, and why they end."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.runtime.vocabulary import BYTE_OFFSET

PROMPT = b"Alice was beginning to get very tired"


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> BltModel:
    return BltModel.load(tiny_bundle, threads=1)


def greedy_by_full_runs(model: BltModel, prompt: bytes, count: int) -> bytes:
    """The same bytes without any cache: the whole text again for every byte."""
    data = b""
    for _ in range(count):
        row = model.logits(prompt + data)[-1].copy()
        row[[0, 1, 3]] = -np.inf
        chosen = int(row.argmax())
        if chosen == 2:
            break
        data += bytes([chosen - BYTE_OFFSET])
    return data


def test_greedy_equals_runs_without_state(model: BltModel) -> None:
    result = model.generate(PROMPT, GenerationOptions(max_new_bytes=60))
    assert result.data == greedy_by_full_runs(model, PROMPT, 60)


def test_stream_joins_to_the_result(model: BltModel) -> None:
    options = GenerationOptions(max_new_bytes=80, temperature=1.0, seed=3)
    chunks = list(model.stream(PROMPT, options))
    result = model.generate(PROMPT, options)
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert b"".join(chunk.data for chunk in chunks) == result.data
    assert result.text == result.data.decode("utf-8", "replace")
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == result.finish_reason


def test_same_seed_same_text_other_seed_other_text(model: BltModel) -> None:
    def run(seed: int) -> bytes:
        return model.generate(PROMPT, GenerationOptions(max_new_bytes=50, temperature=1.0, seed=seed)).data

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_no_prompt_and_str_prompts(model: BltModel) -> None:
    assert model.generate("", GenerationOptions(max_new_bytes=5)).stats.prompt_bytes == 0
    options = GenerationOptions(max_new_bytes=20)
    assert model.generate("é中", options).data == model.generate("é中".encode(), options).data


def test_length_and_figures(model: BltModel) -> None:
    result = model.generate(PROMPT, GenerationOptions(max_new_bytes=9, draft="none"))
    stats = result.stats
    if result.finish_reason == "length":
        assert stats.new_bytes == len(result.data) == 9
    assert stats.prompt_bytes == len(PROMPT)
    assert 0 < stats.prefill_seconds <= stats.first_byte_seconds
    assert set(stats.stage_seconds) == {"patcher", "encoder", "latent", "decoder"}
    # The last byte is never read back.
    assert stats.stage_calls["decoder"] == stats.new_bytes
    assert stats.state_bytes > 0


def test_stop_string_ends_the_text_and_is_not_part_of_it(model: BltModel) -> None:
    free = model.generate(PROMPT, GenerationOptions(max_new_bytes=60)).data
    stop = free[20:23]
    result = model.generate(PROMPT, GenerationOptions(max_new_bytes=60, stop=(stop,)))
    assert result.finish_reason == "stop"
    assert result.data == free[: free.index(stop)]


def test_a_full_model_ends_with_context(model: BltModel) -> None:
    result = model.generate(b"x" * 396, GenerationOptions(max_new_bytes=50, temperature=1.0, seed=0))
    assert result.finish_reason in ("context", "eos")
    if result.finish_reason == "context":
        # 396 bytes and BOS leave three positions; the byte after the last one needs none.
        assert result.stats.new_bytes == 4


def test_cancel_before_and_during(model: BltModel) -> None:
    cancel = threading.Event()
    chunks = []
    for chunk in model.stream(PROMPT, GenerationOptions(max_new_bytes=300), cancel=cancel):
        chunks.append(chunk)
        cancel.set()
    assert chunks[-1].finish_reason == "cancelled"
    assert chunks[-1].stats is not None
    assert chunks[-1].stats.new_bytes < 10
    assert model.generate(PROMPT, GenerationOptions(), cancel=cancel).finish_reason == "cancelled"
