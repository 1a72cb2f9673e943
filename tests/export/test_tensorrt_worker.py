"""A stage built in a process of its own: results, errors and deaths come through."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from blt_edge.export import tensorrt_worker
from blt_edge.export.tensorrt_worker import Moment, PlanOptions, build_in_child
from blt_edge.runtime.child import Outcome
from blt_edge.runtime.errors import BackendError
from support.onnx_graphs import FEW, plain_product

needs_rtx = pytest.mark.usefixtures("rtx")


@pytest.fixture
def rtx() -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )


@needs_rtx
def test_a_child_builds_and_reports(tmp_path: Path) -> None:
    moments: list[Moment] = []
    facts = build_in_child(
        "tensorrt-rtx",
        plain_product(tmp_path),
        FEW,
        tmp_path / "x.plan",
        PlanOptions(("8.6",)),
        moments.append,
    )
    assert facts.bytes == (tmp_path / "x.plan").stat().st_size
    assert moments
    assert all(0 <= moment.done <= moment.steps for moment in moments)


@needs_rtx
def test_a_childs_errors_come_through(tmp_path: Path, capfd: Any) -> None:
    path, options = plain_product(tmp_path), PlanOptions(("8.6",))
    with pytest.raises(BackendError, match="the profile's range of bytes is 4, 2, 1"):
        build_in_child("tensorrt-rtx", path, ({"bytes": (4, 2, 1)},), tmp_path / "x", options)
    with pytest.raises(FileNotFoundError, match="none/x"):
        build_in_child("tensorrt-rtx", path, FEW, tmp_path / "none" / "x", options)
    assert capfd.readouterr() == ("", "")


def test_a_child_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_worker, "run_child", lambda *_: Outcome(death="crashed (SIGSEGV)"))
    with pytest.raises(BackendError, match=r"broken\.onnx: .* crashed \(SIGSEGV\); close other programs"):
        build_in_child("tensorrt-rtx", plain_product(tmp_path), FEW, tmp_path / "x", PlanOptions(("8.6",)))
