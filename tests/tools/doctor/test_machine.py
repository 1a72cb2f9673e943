"""Processor, memory, driver and Jetsons that are not here, by the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.doctor.machine import (
    Jetson,
    MachineMemory,
    NvidiaDriver,
    System,
    read_driver,
    read_jetson,
    read_memory,
    read_processor,
)
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
)
def test_processor(tmp_path: Path, files, name: str, cores: int, features: tuple[str, ...]) -> None:
    processor = read_processor(system(tmp_path, files))
    assert (processor.name, processor.cores, processor.features) == (name, cores, features)


def test_memory(tmp_path: Path) -> None:
    whole = MachineMemory(16_384_000_000, 8_192_000_000, 2_048_000_000, None)
    assert read_memory(system(tmp_path / "pc", PC)) == whole
    assert read_memory(system(tmp_path / "none", {})) == MachineMemory(None, None, None, None)


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


# Jetsons.


def jetson_of(root: Path, files: dict[str, str], **commands: str) -> Jetson:
    found = read_jetson(system(root, files, **commands))
    assert found is not None
    return found


@pytest.mark.parametrize("files", [{}, PC, PC_WITH_CARD])
def test_no_jetson(tmp_path: Path, files: dict[str, str]) -> None:
    assert read_jetson(system(tmp_path, files)) is None


def test_orin_without_nvpmodel_in_the_path(tmp_path: Path) -> None:
    jetson = jetson_of(tmp_path, ORIN)
    assert jetson.to_dict() == {
        "board": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "l4t": "36.4.3",
        "jetpack": "6.2",
        "power_mode": "25W",
        "full_power": False,
        "clocks": {
            "GPU": {"lowest_hz": 306_000_000, "highest_hz": 918_000_000},
            "CPU": {"lowest_hz": 729_600_000, "highest_hz": 1_344_000_000},
        },
        "clocks_fixed": False,
        "unified_memory_bytes": 7_800_000 * 1024,
    }
    mode, clocks = jetson.warnings()
    assert mode == "the power mode is 25W, which limits clocks and cores: sudo nvpmodel -m 2 sets MAXN_SUPER"
    assert clocks.startswith(
        "clocks move with the load (GPU 306 to 918 MHz, CPU 730 to 1344 MHz): sudo jetson_"
    )


def test_nvpmodel_is_believed_first(tmp_path: Path) -> None:
    jetson = jetson_of(tmp_path, ORIN, nvpmodel="NV Power Mode: MAXN_SUPER\n2\n")
    assert (jetson.power_mode, jetson.full_power) == ("MAXN_SUPER", True)
    assert len(list(jetson.warnings())) == 1


def test_thor(tmp_path: Path) -> None:
    jetson = jetson_of(tmp_path, THOR, nvpmodel="NV Power Mode: MAXN\n0\n")
    assert (jetson.l4t, jetson.jetpack) == ("38.4.0", "7.1")
    assert (jetson.full_power, jetson.clocks_fixed) == (True, True)
    assert list(jetson.warnings()) == []


def test_what_cannot_be_read_is_not_warned_of(tmp_path: Path) -> None:
    files = {"proc/device-tree/model": "NVIDIA Jetson AGX Orin\0"}
    jetson = jetson_of(tmp_path, files)
    assert (jetson.l4t, jetson.jetpack, jetson.power_mode) == (None, None, None)
    assert jetson.full_power is jetson.clocks_fixed is jetson.unified_memory_bytes is None
    assert list(jetson.warnings()) == []


@pytest.mark.parametrize(
    ("modes", "said", "full"),
    [
        ("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >", "15W", True),
        ("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >", "7W", False),
        ("< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=MODE_15W >", "MODE_15W", False),
        ("", "MAXN", True),
        ("", "MODE_30W", False),
    ],
)
def test_the_mode_without_limits(tmp_path: Path, modes: str, said: str, full: bool) -> None:
    files = {**ORIN, "etc/nvpmodel.conf": modes}
    jetson = jetson_of(tmp_path, files, nvpmodel=f"NV Power Mode: {said}\n")
    assert jetson.full_power is full


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("R36 (release), REVISION: 4.4", "6.2.1"),
        ("R36 (release), REVISION: 4.0", "6.1"),
        ("R39 (release), REVISION: 2.0", "7.2"),
        ("R35 (release), REVISION: 4.1", "5"),
        ("R99 (release), REVISION: 1.0", None),
    ],
)
def test_jetpack_by_the_release(tmp_path: Path, release: str, jetpack: str | None) -> None:
    files = {"etc/nv_tegra_release": f"# {release}, GCID: 1\n"}
    assert jetson_of(tmp_path, files).jetpack == jetpack


def test_of_several_clocks_the_one_that_moves_counts(tmp_path: Path) -> None:
    policy = "sys/devices/system/cpu/cpufreq/policy4/scaling"
    files = {**THOR, f"{policy}_min_freq": "100000", f"{policy}_max_freq": "2601000"}
    jetson = jetson_of(tmp_path, files)
    assert jetson.clocks_fixed is False


def test_this_machine_can_be_asked() -> None:
    here = System()
    found = read_jetson(here)
    assert found is None or found.board
    assert here.run(["echo", "x"]) == "x\n"
    assert here.run(["false"]) is here.run(["no-such-command-of-ours"]) is None
