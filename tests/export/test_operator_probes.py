"""What the probes say of the installed version, and of versions that do otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
from blt_edge.export import build_ort
from blt_edge.export.build_ort import check_version, multiplies_blocks, window_offset
from blt_edge.runtime.errors import BackendError

VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Each test asks anew, and leaves nothing for others."""
    window_offset.cache_clear()
    multiplies_blocks.cache_clear()
    yield
    window_offset.cache_clear()
    multiplies_blocks.cache_clear()


def test_the_window_of_this_version() -> None:
    # 1.22 and 1.23 let a window see one key more.
    assert window_offset() == (-1 if VERSION < (1, 24) else 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_this_version_multiplies_blocks(bits: int) -> None:
    assert multiplies_blocks(bits)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_window_of_another_meaning_is_found(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    here, attention = window_offset(), build_ort._attention
    assert here is not None
    window_offset.cache_clear()
    monkeypatch.setattr(
        build_ort,
        "_attention",
        lambda window: attention(window if window < 0 else window + here - shift),
    )
    assert window_offset() == shift


def test_a_window_that_nothing_explains_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = build_ort._attention
    monkeypatch.setattr(
        build_ort, "_attention", lambda window: attention(window if window < 0 else window + 5)
    )
    assert window_offset() is None


def test_wrong_attention_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    node = build_ort.attention_node

    def interleaved(*args: Any, **options: Any) -> Any:
        made = node(*args, **options)
        made.attributes["rotary_interleaved"] = build_ort.ir.AttrInt64("rotary_interleaved", 1)
        return made

    monkeypatch.setattr(build_ort, "attention_node", interleaved)
    assert window_offset() is None


def test_an_operator_that_is_refused_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    node = build_ort.attention_node

    def unknown(*args: Any, **options: Any) -> Any:
        made = node(*args, **options)
        made.op_type = "AttentionOfTomorrow"
        return made

    monkeypatch.setattr(build_ort, "attention_node", unknown)
    assert window_offset() is None


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_that_are_refused_or_wrong_are_left_alone(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    run = build_ort._saved_and_run

    def refuse(*_args: Any) -> None:
        raise BackendError("graph.onnx: ONNX Runtime 1.22.1 refused it: SystemError : 2")

    monkeypatch.setattr(build_ort, "save_optimized", refuse)
    assert not multiplies_blocks(bits)
    monkeypatch.undo()
    for wrong in (np.nan, 1.2):
        multiplies_blocks.cache_clear()
        monkeypatch.setattr(build_ort, "_saved_and_run", lambda *args, by=wrong: by * run(*args))
        assert not multiplies_blocks(bits)


@pytest.mark.parametrize("version", ["1.20.1", "1.21.0", "0.9", "1.21.1+cu12"])
def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(BackendError) as refused:
        check_version("building an engine")
    assert str(refused.value) == (
        f"building an engine needs ONNX Runtime 1.22 or newer, here it is {version}; "
        "pip install 'onnxruntime>=1.22', or run the portable graphs, which need no engine"
    )


@pytest.mark.parametrize("version", ["1.22.0", "1.32.0", "2.0", "main"])
def test_a_newer_version_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    check_version("building an engine")
