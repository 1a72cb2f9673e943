"""What a machine calls itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.runtime import host


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def named(cpuinfo: str, board: str) -> str:
        for path, text in (("cpuinfo", cpuinfo), ("board", board)):
            (tmp_path / path).write_text(text)
        monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(host, "_BOARD", tmp_path / "board")
        return host.processor_name()

    return named


def test_the_model_name(name) -> None:
    assert name("processor : 0\nmodel name\t: Xeon\nmodel name\t: Other\n", "Board\0") == "Xeon"


def test_a_board_without_one(name) -> None:
    assert name("processor : 0\nmodel name\t:\n", "NVIDIA Jetson Orin Nano\0") == "NVIDIA Jetson Orin Nano"


def test_neither(name, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    monkeypatch.setattr(host.platform, "machine", lambda: "abacus")
    assert name("", "") == "abacus"


def test_everything_a_figure_needs() -> None:
    described = host.describe_machine(3)
    assert list(described) == ["processor", "system", "cpus", "threads", "onnxruntime"]
    assert described["threads"] == 3
