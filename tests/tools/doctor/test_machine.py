"""Memory, driver and Jetsons that are not here, by the kernel's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.tools.doctor.machine import (
    Jetson,
    MachineMemory,
    NvidiaDriver,
    SwapSpace,
    System,
    read_driver,
    read_jetson,
    read_memory,
)
from support.machines import ORIN, PC, PC_WITH_CARD, PI_4, PI_5, THOR, system

MEMORY = MachineMemory(16_384_000_000, 8_192_000_000, 2_048_000_000, None)
CGROUP = "sys/fs/cgroup/memory.max"
OLD_CGROUP = "sys/fs/cgroup/memory/memory.limit_in_bytes"
POLICY = "sys/devices/system/cpu/cpufreq/policy4/scaling"


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, MachineMemory(None, None, None, None)),
        (PC, MEMORY),
        ({**PC, CGROUP: "4294967296\n"}, replace(MEMORY, container_limit=1 << 32)),
        ({**PC, CGROUP: "nonsense"}, MEMORY),
        ({**PC, OLD_CGROUP: "4294967296\n"}, replace(MEMORY, container_limit=1 << 32)),
        ({**PC, OLD_CGROUP: "9223372036854771712\n"}, MEMORY),
    ],
)
def test_memory_and_a_containers_limit(tmp_path: Path, files, memory: MachineMemory) -> None:
    assert read_memory(system(tmp_path, files)) == memory


@pytest.mark.parametrize(
    ("files", "driver"),
    [
        (PC, NvidiaDriver(None, 0, ())),
        (PC_WITH_CARD, NvidiaDriver("550.54.14", 1, ("NVIDIA GeForce RTX 3060",))),
        (ORIN, NvidiaDriver("540.4.0", 0, ())),
    ],
)
def test_driver(tmp_path: Path, files, driver: NvidiaDriver) -> None:
    assert read_driver(system(tmp_path, files)) == driver


def test_swap_spaces(tmp_path: Path) -> None:
    zram = SwapSpace("/dev/zram0", 2_097_136 * 1024, 1024 * 1024, compressed=True)
    file = SwapSpace("/var/swap", 524_284 * 1024, 0, compressed=False)
    assert read_memory(system(tmp_path / "5", PI_5)).swap_spaces == (zram,)
    assert read_memory(system(tmp_path / "4", PI_4)).swap_spaces == (file,)
    odd = {"proc/swaps": "Filename Type\n/dev/sda2\n\nx y z w\n"}
    assert read_memory(system(tmp_path / "odd", odd)).swap_spaces == ()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    fake = system(tmp_path, {})
    (tmp_path / "proc" / "meminfo").mkdir(parents=True)
    assert read_memory(fake).total is None
    assert fake.link("/proc/self/exe") == fake.link("/proc/meminfo") == ""


# Jetsons.


def jetson_of(root: Path, files: dict[str, str], mode: str | None = None) -> Jetson:
    commands = {} if mode is None else {"nvpmodel": f"NV Power Mode: {mode}\n"}
    found = read_jetson(system(root, files, **commands))
    assert found is not None
    return found


@pytest.mark.parametrize("files", [{}, PC, PC_WITH_CARD])
def test_no_jetson(tmp_path: Path, files: dict[str, str]) -> None:
    assert read_jetson(system(tmp_path, files)) is None


@pytest.mark.parametrize(
    ("files", "mode", "facts", "warnings"),
    [
        (ORIN, None, ("36.4.3", "6.2", "25W", False, False), ["sudo nvpmodel -m 2", "sudo jetson_clocks"]),
        (ORIN, "MAXN_SUPER\n2", ("36.4.3", "6.2", "MAXN_SUPER", True, False), ["sudo jetson_clocks"]),
        (THOR, "MAXN\n0", ("38.4.0", "7.1", "MAXN", True, True), []),
        ({"proc/device-tree/model": "NVIDIA Jetson AGX Orin\0"}, None, (None,) * 5, []),
        (  # Of several clocks the one that moves counts.
            {**THOR, f"{POLICY}_min_freq": "100000", f"{POLICY}_max_freq": "2601000"},
            "MAXN\n0",
            ("38.4.0", "7.1", "MAXN", True, False),
            ["sudo jetson_clocks"],
        ),
    ],
)
def test_what_is_read_and_warned_of(tmp_path: Path, files, mode, facts: tuple, warnings: list[str]) -> None:
    """What nvpmodel says is believed first; what cannot be read is not warned of."""
    jetson = jetson_of(tmp_path, files, mode)
    assert (jetson.l4t, jetson.jetpack, jetson.power_mode, jetson.full_power, jetson.clocks_fixed) == facts
    found = list(jetson.warnings())
    assert len(found) == len(warnings)
    assert all(command in line for command, line in zip(warnings, found, strict=True))


def test_a_jetson_in_json(tmp_path: Path) -> None:
    document = jetson_of(tmp_path, ORIN).to_dict()
    fields = "board l4t jetpack power_mode full_power clocks clocks_fixed unified_memory_bytes"
    assert list(document) == fields.split()
    assert document["clocks"]["CPU"] == {"lowest_hz": 729_600_000, "highest_hz": 1_344_000_000}
    assert document["unified_memory_bytes"] == 7_800_000 * 1024


@pytest.mark.parametrize(
    ("modes", "mode", "full"),
    [
        ("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >", "15W", True),
        ("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >", "7W", False),
        ("< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=MODE_15W >", "MODE_15W", False),
        ("", "MAXN", True),
        ("", "MODE_30W", False),
    ],
)
def test_the_mode_without_limits(tmp_path: Path, modes: str, mode: str, full: bool) -> None:
    assert jetson_of(tmp_path, {**ORIN, "etc/nvpmodel.conf": modes}, mode).full_power is full


@pytest.mark.parametrize(
    ("release", "revision", "jetpack"),
    [
        *((35, "4.1", "5"), (36, "2.0", None), (36, "4.0", "6.1"), (36, "4.3", "6.2"), (36, "4.4", "6.2.1")),
        *((36, "4.6", "6.2.1"), (36, "4.7", "6.2.1"), (36, "4.12", "6.2.1"), (36, "5.0", "6.2.2")),
        *(
            (38, "2.1", "7.0"),
            (38, "4.0", "7.1"),
            (39, "2.0", "7.2"),
            (39, "2.1", "7.2.1"),
            (99, "1.0", None),
        ),
        *((39, "3.0", None), (38, "4", "7.1")),
    ],
)
def test_jetpack_by_the_release(tmp_path: Path, release: int, revision: str, jetpack: str | None) -> None:
    files = {"etc/nv_tegra_release": f"# R{release} (release), REVISION: {revision}, GCID: 1\n"}
    assert jetson_of(tmp_path, files).jetpack == jetpack


def test_this_machine_can_be_asked() -> None:
    here = System()
    found = read_jetson(here)
    assert found is None or found.board
    assert here.run(["echo", "x"]) == "x\n"
    assert here.run(["false"]) is here.run(["no-such-command-of-ours"]) is None
