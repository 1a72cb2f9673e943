"""What a byte reads, against numbers computed by hand; and that bandwidth is measured at all."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.runtime.processors import usable_cores
from blt_edge.tools.profile import ceiling
from blt_edge.tools.profile.ceiling import (
    Cost,
    cost_of_a_byte,
    embedding_bytes,
    last_level_cache,
    measure_bandwidth,
    measure_device_bandwidth,
)
from support.bundles import write_bundle
from support.profiles import STAGES, demo_manifest
from support.simulated_gpu import SimulatedDriver

ONCE = dict.fromkeys(STAGES, 1.0)


def cost(positions: int = 577, bytes_per_patch: float | None = 4.0, **calls: float) -> Cost:
    sizes = {"positions": positions, "bytes_per_patch": bytes_per_patch, "state_bytes": 123}
    calls = calls or {**ONCE, "latent": 0.25}
    return cost_of_a_byte(demo_manifest(), calls_per_byte=calls, bandwidth=20e9, **sizes)


def test_the_demo_by_hand() -> None:
    found = cost()
    # The patcher's embedding, 260 x 128 float32, is left out.
    weights = dict(zip(STAGES, (1_873_920 - 133_120, 1_622_016, 10_665_984, 7_867_392), strict=True))
    assert {name: stage.weights for name, stage in found.stages.items()} == weights
    assert found.weights == sum(weights.values())
    # Keys and values in float32 x layers x heads x 32 x positions: 128 in a window, 577 / 4 patches.
    assert {name: stage.cache for name, stage in found.stages.items()} == {
        "patcher": 2 * 4 * 2 * 4 * 32 * 128,
        "encoder": 2 * 4 * 1 * 3 * 32 * 128,
        "latent": 2 * 4 * 3 * 4 * 32 * 577 // 4,
        "decoder": 2 * 4 * 4 * 3 * 32 * 128 + 4 * 1536,
    }
    assert found.stages["latent"].per_byte == (10_665_984 + 443_136) / 4
    assert found.weights_per_byte == 1_740_800 + 1_622_016 + 7_867_392 + 10_665_984 / 4
    assert found.cache_per_byte == 262_144 + 98_304 + 399_360 + 443_136 / 4
    # One byte row and six hash rows of 192 float16.
    assert (found.table_rows, found.row_bytes, found.tables_per_byte) == (7, 384, 2688)
    assert found.read_per_byte == found.weights_per_byte + found.cache_per_byte + 2688
    assert found.ceiling_bytes_per_second == pytest.approx(20e9 / 14_769_984)


def test_caches_in_8_bits_are_a_quarter() -> None:
    whole, narrow = (
        cost_of_a_byte(
            demo_manifest(),
            calls_per_byte=ONCE,
            bandwidth=20e9,
            positions=577,
            bytes_per_patch=4.0,
            state_bytes=123,
            caches=caches,
        )
        for caches in ("float32", "int8")
    )
    for name in ("patcher", "encoder", "latent"):
        assert whole.stages[name].cache == 4 * narrow.stages[name].cache
    assert narrow.stages["decoder"].cache == 2 * 4 * 3 * 32 * 128 + 4 * 1536


def test_what_reads_less() -> None:
    """Windows that are not full, texts without a patch, stages that never ran, drafts."""
    assert cost(positions=10).stages["encoder"].cache == 2 * 4 * 1 * 3 * 32 * 10
    assert cost(bytes_per_patch=None, **ONCE).stages["latent"].cache == 0
    assert list(cost(encoder=1.0, decoder=1.0).stages) == ["encoder", "decoder"]
    half = cost(**{**dict.fromkeys(STAGES, 0.5), "latent": 0.125})
    assert half.ceiling_bytes_per_second == pytest.approx(2 * cost().ceiling_bytes_per_second, rel=1e-3)


def test_the_embedding_is_the_patchers_own_width(tmp_path: Path) -> None:
    manifest = demo_manifest()
    assert embedding_bytes(manifest) == 260 * 128 * 4
    stages = {name: spec for name, spec in manifest.stages.items() if name != "patcher"}
    assert embedding_bytes(replace(manifest, stages=stages)) == 0
    assert embedding_bytes(write_bundle(tmp_path / "bundle")) == 0  # its config says nothing


# How fast memory is.


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_SECONDS", 0.01)


def write_cache(cpus: Path, cpu: int, index: int, level: int, size: str, shared: str) -> None:
    folder = cpus / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(text + "\n")


def test_last_level_caches_are_counted_once_each(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) is None
    write_cache(tmp_path, 9, 0, 1, "unknown", "0")
    (tmp_path / "cpu8" / "cache" / "index0").mkdir(parents=True)
    assert last_level_cache(tmp_path) is None
    for cpu in range(4):
        write_cache(tmp_path, cpu, 0, 1, "32K", str(cpu))
        write_cache(tmp_path, cpu, 3, 3, "16M", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache(tmp_path) == 32 << 20


def test_measuring_reads_the_buffer_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "last_level_cache", lambda: 2_000_000)
    measured = measure_bandwidth(2, buffer_bytes=1 << 20)
    assert (measured.threads, measured.buffer_bytes, measured.device) == (2, 1 << 20, "CPU")
    assert measured.bytes_per_second > 0
    assert re.search(rf"{measured.passes} passes of 2 threads over 1 MB.* 2 MB", measured.method)


def test_the_buffer_is_a_quarter_of_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "available_memory", lambda: 4 << 20)
    measured = measure_bandwidth(None)
    assert (measured.threads, measured.buffer_bytes) == (usable_cores(), 1 << 20)


def test_a_gpu_is_measured_by_copies_on_it() -> None:
    driver = SimulatedDriver()
    measured = measure_device_bandwidth(driver, 1 << 20)
    assert measured.bytes_per_second > 0
    assert "copies of 1 MB on Simulated, bytes read and written" in measured.method
    assert driver.allocated == 0
