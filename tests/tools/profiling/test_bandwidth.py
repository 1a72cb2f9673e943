"""The caches that a buffer must be larger than, and that something is measured at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.profile import bandwidth
from blt_edge.tools.profile.bandwidth import (
    available_cores,
    last_level_cache,
    measure_bandwidth,
    measure_device_bandwidth,
)
from support.simulated_gpu import SimulatedDriver


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SECONDS", 0.01)


def write_cache(cpus: Path, cpu: int, index: int, level: int, size: str, shared: str) -> None:
    folder = cpus / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(text + "\n")


def test_last_level_caches_are_counted_once_each(tmp_path: Path) -> None:
    for cpu in range(4):
        write_cache(tmp_path, cpu, 0, 1, "32K", str(cpu))
        write_cache(tmp_path, cpu, 3, 3, "16M", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache(tmp_path) == 32 << 20


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) is None
    write_cache(tmp_path, 0, 0, 1, "unknown", "0")
    (tmp_path / "cpu1" / "cache" / "index0").mkdir(parents=True)
    assert last_level_cache(tmp_path) is None


def test_measuring_reads_the_buffer_it_says() -> None:
    measured = measure_bandwidth(2, buffer_bytes=1 << 20)
    assert (measured.threads, measured.buffer_bytes) == (2, 1 << 20)
    assert measured.bytes_per_second > 0
    assert f"best of {measured.passes} passes of 2 threads over 1 MB" in measured.method
    assert measured.to_dict()["method"] == measured.method


def test_no_number_of_threads_is_every_core() -> None:
    assert measure_bandwidth(None, buffer_bytes=1 << 16).threads == available_cores()


def test_a_gpu_is_measured_by_copies_on_it() -> None:
    driver = SimulatedDriver()
    measured = measure_device_bandwidth(driver, 1 << 20)
    assert measured.bytes_per_second > 0
    assert "copies of 1 MB on Simulated, bytes read and written" in measured.method
    assert driver.allocated == 0
