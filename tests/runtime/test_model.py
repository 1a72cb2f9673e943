"""The public API on a small exported model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import BltModel, OptionError, PromptTooLongError
from blt_edge.runtime.vocabulary import BYTE_OFFSET

EVERY_BYTE = bytes(range(256))


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> BltModel:
    return BltModel.load(tiny_bundle, device="cpu", threads=1)


@pytest.mark.parametrize("data", [b"", b"a", b"\x00", "é中🐇".encode(), EVERY_BYTE])
def test_shapes_and_sums(model: BltModel, data: bytes) -> None:
    rows = 1 + len(data)
    logits, entropies = model.logits(data), model.entropies(data)
    assert logits.shape == (rows, 260)
    assert logits.dtype == entropies.dtype == np.float32
    assert entropies.shape == (rows,)
    lengths = model.patch_lengths(data)
    assert sum(lengths) == rows
    assert min(lengths) > 0


def test_score_is_the_mean_log_loss_of_the_logits(model: BltModel) -> None:
    wide = model.logits(EVERY_BYTE)[:-1].astype(np.float64)
    targets = np.frombuffer(EVERY_BYTE, np.uint8).astype(int) + BYTE_OFFSET
    log_sum = np.log(np.exp(wide).sum(axis=1))
    expected = (log_sum - wide[np.arange(256), targets]).mean() / np.log(2)
    result = model.score(EVERY_BYTE, context=257)
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-9)
    assert (result.bytes, result.windows) == (256, 1)
    assert result.patches == len(model.patch_lengths(EVERY_BYTE))


def test_score_windows_each_start_from_bos(model: BltModel) -> None:
    data = EVERY_BYTE[:100]
    parts = [data[:39], data[39:78], data[78:]]
    expected = sum(model.score(part, context=40).bits_per_byte * len(part) for part in parts) / 100
    result = model.score(data, context=40)
    assert result.windows == 3
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-9)


def test_score_refuses_nothing_and_bad_contexts(model: BltModel) -> None:
    with pytest.raises(OptionError, match="empty"):
        model.score(b"")
    for context in (1, 401, 0, -3, True):
        with pytest.raises(OptionError, match="from 2 to 400"):
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
        ({"threads": 0}, "threads: got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk: got 0"),
        ({"prefill_chunk": 10**6}, "prefill_chunk: got 1000000"),
        ({"rollback": -1}, "rollback: got -1"),
    ],
)
def test_bad_load_options_name_the_range(tiny_bundle: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BltModel.load(tiny_bundle, **options)  # type: ignore[arg-type]


def test_importing_the_runtime_imports_no_heavy_package(tiny_bundle: Path) -> None:
    script = (
        "import sys; import blt_edge.runtime as runtime; "
        f"runtime.BltModel.load({str(tiny_bundle)!r}, threads=1).generate(b'ab'); "
        "print([name for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'transformers', 'safetensors', "
        "'click', 'rich', 'ml_dtypes') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_runtime_does_not_import_the_engine() -> None:
    script = "import sys, blt_edge.runtime; print('onnxruntime' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
