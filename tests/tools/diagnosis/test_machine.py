"""Processor, memory and driver, by the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.doctor.machine import Memory, NvidiaDriver, read_driver, read_memory, read_processor
from support.machines import ORIN, PC, PC_WITH_CARD, THOR, system


@pytest.mark.parametrize(
    ("files", "name", "cores", "features"),
    [
        (PC, "Intel(R) Core(TM) i5", 4, ("AVX2", "FMA", "F16C")),
        (ORIN, "Cortex-A78AE", 6, ("NEON", "NEON FP16", "NEON dot product")),
        (THOR, "Neoverse-V3AE", 1, ("NEON", "NEON INT8 matrix", "NEON BF16", "SVE", "SVE2")),
        (
            {"proc/device-tree/model": "Board\0", "proc/cpuinfo": "processor: 0\nCPU part: 0x1\n"},
            "Board",
            1,
            (),
        ),
        ({}, "unknown", 1, ()),
    ],
    ids=["PC", "Orin", "Thor", "board", "nothing"],
)
def test_processor(tmp_path: Path, files, name: str, cores: int, features: tuple[str, ...]) -> None:
    processor = read_processor(system(tmp_path, files))
    assert (processor.name, processor.cores, processor.features) == (name, cores, features)


def test_memory(tmp_path: Path) -> None:
    assert read_memory(system(tmp_path / "pc", PC)) == Memory(
        16_384_000_000, 8_192_000_000, 2_048_000_000, None
    )
    assert read_memory(system(tmp_path / "none", {})) == Memory(None, None, None, None)


@pytest.mark.parametrize(
    ("path", "text", "limit"),
    [
        ("sys/fs/cgroup/memory.max", "4294967296\n", 1 << 32),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4294967296\n", 1 << 32),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("sys/fs/cgroup/memory.max", "nonsense", None),
    ],
)
def test_a_containers_limit(tmp_path: Path, path: str, text: str, limit: int | None) -> None:
    assert read_memory(system(tmp_path, {**PC, path: text})).container_limit == limit


def test_driver(tmp_path: Path) -> None:
    assert read_driver(system(tmp_path / "pc", PC)) == NvidiaDriver(None, 0, ())
    card = read_driver(system(tmp_path / "card", PC_WITH_CARD))
    assert card == NvidiaDriver("550.54.14", 1, ("NVIDIA GeForce RTX 3060",))
    assert read_driver(system(tmp_path / "orin", ORIN)) == NvidiaDriver("540.4.0", 0, ())


def test_files_that_are_no_text(tmp_path: Path) -> None:
    fake = system(tmp_path, {})
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_bytes(b"processor: 0\nmodel name: \xff\xfe\n")
    (tmp_path / "proc" / "meminfo").mkdir()
    assert read_processor(fake).name == "\ufffd\ufffd"
    assert read_memory(fake).total is None
