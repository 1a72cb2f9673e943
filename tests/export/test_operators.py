"""What the installed version's operators do, and those of versions that do otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from blt_edge.export import operators
from blt_edge.export.operators import check_version, multiplies_blocks, multiplies_integers, window_offset
from blt_edge.runtime import BackendError
from support.ort_versions import VERSION


def _forget() -> None:
    for probe in (window_offset, multiplies_blocks, multiplies_integers):
        probe.cache_clear()


@pytest.fixture
def forgetful() -> Iterator[None]:
    """The operators are asked anew, and nothing is left for others."""
    _forget()
    yield
    _forget()


@pytest.mark.usefixtures("forgetful")
def test_the_window_of_this_version() -> None:
    # 1.22 and 1.23 let a window see one key more.
    assert window_offset() == (-1 if VERSION < (1, 24) else 0)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("bits", [4, 8])
def test_this_version_multiplies_blocks(bits: int) -> None:
    assert multiplies_blocks(bits)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(("shift", "found"), [(-1, -1), (0, 0), (1, 1), (-5, None)])
def test_a_window_of_another_meaning_is_found(
    monkeypatch: pytest.MonkeyPatch, shift: int, found: int | None
) -> None:
    here, attention = window_offset(), operators._attention
    assert here is not None
    window_offset.cache_clear()
    shifted = lambda window: attention(window if window < 0 else window + here - shift)  # noqa: E731
    monkeypatch.setattr(operators, "_attention", shifted)
    assert window_offset() == found


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.attributes.update(rotary_interleaved=ir.AttrInt64("rotary_interleaved", 1)),
        lambda node: setattr(node, "op_type", "AttentionOfTomorrow"),
    ],
)
def test_attention_that_is_wrong_or_refused_is_not_used(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[ir.Node], None]
) -> None:
    make = operators.attention_node

    def changed(*args: Any, **options: Any) -> ir.Node:
        node = make(*args, **options)
        change(node)
        return node

    monkeypatch.setattr(operators, "attention_node", changed)
    assert window_offset() is None


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_that_are_refused_or_wrong_are_left_alone(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    run = operators._saved_and_run

    def refuse(*_args: Any) -> None:
        raise BackendError("graph.onnx: ONNX Runtime 1.22.1 refused it: SystemError : 2")

    monkeypatch.setattr(operators, "save_optimized", refuse)
    assert not multiplies_blocks(bits)
    monkeypatch.undo()
    for wrong in (np.nan, 1.2):
        multiplies_blocks.cache_clear()
        monkeypatch.setattr(operators, "_saved_and_run", lambda *args, by=wrong: by * run(*args))
        assert not multiplies_blocks(bits)


@pytest.mark.parametrize("version", ["1.20.1", "1.21.0", "0.9", "1.21.1+cu12"])
def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(
        BackendError, match=r"ONNX Runtime 1\.22 or newer, here it is .*; pip install '[^\n]*"
    ):
        check_version("building an engine")


@pytest.mark.parametrize("version", ["1.22.0", "1.32.0", "2.0", "main"])
def test_a_newer_version_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    check_version("building an engine")


@pytest.mark.usefixtures("forgetful")
def test_this_version_multiplies_integers() -> None:
    assert multiplies_integers()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.skipif(not operators.int8_saturates(), reason="this processor adds products in 32 bits")
def test_products_that_overflow_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "prefill_bits", lambda: 8)
    assert not multiplies_integers()


@pytest.mark.usefixtures("forgetful")
def test_products_of_integers_that_are_refused_or_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise BackendError("graph.onnx: ONNX Runtime 1.22.1 refused it: SystemError : 2")

    monkeypatch.setattr(operators, "save_optimized", refuse)
    assert not multiplies_integers()
    monkeypatch.undo()
    load = operators._loaded

    class Wrong:
        def __init__(self, *args: Any) -> None:
            self._session = load(*args)

        def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
            return [1.01 * each for each in self._session.run(names, feeds)]

    multiplies_integers.cache_clear()
    monkeypatch.setattr(operators, "_loaded", Wrong)
    assert not multiplies_integers()
