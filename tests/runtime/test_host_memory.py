"""Memory of this process, as the kernel tells it."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest
from blt_edge.runtime import host
from blt_edge.runtime.host import PrivatePeak, mapped_resident, peak_resident, reset_peak_resident

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
_MB = 1 << 20


def test_private_peak_is_seen_when_it_is_gone() -> None:
    with PrivatePeak() as nothing:
        pass
    with PrivatePeak() as watch:
        block = bytearray(os.urandom(1024)) * (100 * 1024)
        time.sleep(0.1)
        del block
    assert nothing.bytes is not None
    assert watch.bytes is not None
    assert 80 * _MB < watch.bytes - nothing.bytes < 150 * _MB
    resident = peak_resident()
    assert resident is not None
    assert resident >= watch.bytes - _MB


def test_mapped_file_is_not_private(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(bytes(64 * _MB))
    assert mapped_resident(path) == 0
    with PrivatePeak() as before:
        pass
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        with PrivatePeak() as watch:
            sum(memory[at] for at in range(0, 32 * _MB, 4096))
        mapped = mapped_resident(path)
    assert mapped is not None
    assert 32 * _MB <= mapped <= 64 * _MB
    assert before.bytes is not None
    assert watch.bytes is not None
    assert watch.bytes - before.bytes < 16 * _MB


def test_unknown_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(host, "_SMAPS", tmp_path / "none")
    with PrivatePeak() as watch:
        pass
    assert (watch.bytes, mapped_resident(tmp_path)) == (None, None)
    assert peak_resident() > 1_000_000  # what the process has had, by the system's own count


def test_the_peak_counts_from_a_reset_on() -> None:
    block = bytearray(os.urandom(1024)) * (100 * 1024)
    before = peak_resident()
    del block
    if not reset_peak_resident():
        pytest.skip("this kernel can't")
    after = peak_resident()
    assert before is not None
    assert after is not None
    assert after < before - 50 * _MB


def test_a_kernel_that_cannot_reset_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CLEAR", tmp_path / "gone" / "clear_refs")
    assert not reset_peak_resident()
