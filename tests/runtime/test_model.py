"""The public API on a small exported model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, BundleError, OptionError, PromptTooLongError
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.vocabulary import BYTE_OFFSET
from support.model_store import altered

EVERY_BYTE = bytes(range(256))


@pytest.mark.parametrize("data", [b"", b"a", b"\x00", "é中🐇".encode(), EVERY_BYTE])
def test_shapes_and_sums(model: BltModel, data: bytes) -> None:
    rows = 1 + len(data)
    logits, entropies = model.logits(data), model.entropies(data)
    assert (logits.shape, logits.dtype) == ((rows, 260), np.float32)
    assert (entropies.shape, entropies.dtype) == ((rows,), np.float32)
    lengths = model.patch_lengths(data)
    assert sum(lengths) == rows
    assert min(lengths) > 0


def test_a_model_without_a_patcher_has_patches_but_no_entropies(model: BltModel) -> None:
    other = altered(model, PatchingRule("static", patch_size=3))
    other._backends = {name: stage for name, stage in model._backends.items() if name != "patcher"}
    assert other.patch_lengths(b"abcdefgh") == [1, 3, 3, 2]
    assert set(other.trace(b"abc")) == {"byte_states", "patch_values", "logits"}
    with pytest.raises(BundleError, match="no entropy patcher"):
        other.entropies(b"abc")


def test_a_score_is_the_mean_log_loss_of_windows_from_bos(model: BltModel) -> None:
    def bits(data: bytes) -> float:
        wide = model.logits(data)[:-1].astype(np.float64)
        targets = np.frombuffer(data, np.uint8).astype(int) + BYTE_OFFSET
        log_sum = np.log(np.exp(wide).sum(axis=1))
        return float((log_sum - wide[np.arange(len(data)), targets]).sum() / np.log(2))

    result = model.score(EVERY_BYTE, context=100)
    parts = [EVERY_BYTE[:99], EVERY_BYTE[99:198], EVERY_BYTE[198:]]
    assert result.bits_per_byte == pytest.approx(sum(map(bits, parts)) / 256, rel=1e-9)
    assert (result.bytes, result.windows) == (256, 3)
    assert result.patches == sum(len(model.patch_lengths(part)) for part in parts)


def test_a_score_s_window_is_the_trained_context_unless_one_is_given(model: BltModel) -> None:
    assert model.score(b"ab").context == model.manifest.model.trained_context
    assert model.score(b"abc", context=2).windows == 3
    assert model.score(b"ab", context=400).windows == 1
    with pytest.raises(OptionError, match="empty"):
        model.score(b"")


@pytest.mark.parametrize("context", [1, 0, -5, 401, True, 3.0, "9"])
def test_a_context_without_room_is_refused(model: BltModel, context: Any) -> None:
    with pytest.raises(OptionError, match=r"context is .*a whole number from 2 to 400"):
        model.score(b"abc", context=context)


def test_texts_longer_than_the_model_are_refused(model: BltModel) -> None:
    with pytest.raises(PromptTooLongError, match=r"401 positions .* 400"):
        model.logits(b"x" * 400)
    for read in (model.generate, model.entropies, model.patch_lengths):
        with pytest.raises(PromptTooLongError):
            read(b"x" * 400)
    assert model.logits(b"x" * 399).shape == (400, 260)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"threads": 0}, "threads is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"prefill_chunk": 10**6}, "prefill_chunk is 1000000"),
        ({"rollback": -1}, "rollback is -1"),
    ],
)
def test_bad_load_options_name_the_range(tiny_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BltModel.load(tiny_bundle, **options)


HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "transformers",
    "safetensors",
    "click",
    "rich",
    "ml_dtypes",
)


@pytest.mark.parametrize(
    ("run", "absent"),
    [("", (*HEAVY, "onnxruntime")), ("runtime.BltModel.load({!r}, threads=1).generate(b'ab')", HEAVY)],
    ids=["import", "generate"],
)
def test_the_runtime_imports_no_heavy_package(tiny_bundle: Path, run: str, absent: tuple[str, ...]) -> None:
    script = f"import sys, blt_edge.runtime as runtime\n{run.format(str(tiny_bundle))}\n"
    script += f"print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
