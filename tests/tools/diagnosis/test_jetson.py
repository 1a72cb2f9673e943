"""Jetsons that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.doctor.jetson import read_jetson
from blt_edge.tools.doctor.machine import System
from support.machines import ORIN, PC, PC_WITH_CARD, THOR, system


@pytest.mark.parametrize("files", [{}, PC, PC_WITH_CARD], ids=["nothing", "PC", "PC with a card"])
def test_none(tmp_path: Path, files: dict[str, str]) -> None:
    assert read_jetson(system(tmp_path, files)) is None


def test_orin_without_nvpmodel_in_the_path(tmp_path: Path) -> None:
    jetson = read_jetson(system(tmp_path, ORIN))
    assert jetson is not None
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
    assert list(jetson.warnings()) == [
        "the power mode is 25W, which limits clocks and cores: sudo nvpmodel -m 2 sets MAXN_SUPER",
        "clocks move with the load (GPU 306 to 918 MHz, CPU 730 to 1344 MHz): sudo jetson_clocks fixes them "
        "until the next start",
    ]


def test_nvpmodel_is_believed_first(tmp_path: Path) -> None:
    jetson = read_jetson(system(tmp_path, ORIN, nvpmodel="NV Power Mode: MAXN_SUPER\n2\n"))
    assert jetson is not None
    assert (jetson.power_mode, jetson.full_power) == ("MAXN_SUPER", True)
    assert len(list(jetson.warnings())) == 1


def test_thor(tmp_path: Path) -> None:
    jetson = read_jetson(system(tmp_path, THOR, nvpmodel="NV Power Mode: MAXN\n0\n"))
    assert jetson is not None
    assert (jetson.l4t, jetson.jetpack) == ("38.4.0", "7.1")
    assert (jetson.full_power, jetson.clocks_fixed) == (True, True)
    assert list(jetson.warnings()) == []


def test_what_cannot_be_read_is_not_warned_of(tmp_path: Path) -> None:
    files = {"proc/device-tree/model": "NVIDIA Jetson AGX Orin\0"}
    jetson = read_jetson(system(tmp_path, files))
    assert jetson is not None
    assert (jetson.l4t, jetson.jetpack, jetson.power_mode) == (None, None, None)
    assert jetson.full_power is jetson.clocks_fixed is jetson.memory is None
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
    jetson = read_jetson(system(tmp_path, files, nvpmodel=f"NV Power Mode: {said}\n"))
    assert jetson is not None
    assert jetson.full_power is full


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("R36 (release), REVISION: 4.4", "6.2.1"),
        ("R36 (release), REVISION: 4.0", "6.1"),
        ("R36 (release), REVISION: 3.0", "6.0"),
        ("R36 (release), REVISION: 5.1", "6.2.2"),
        ("R38 (release), REVISION: 2.1", "7.0"),
        ("R39 (release), REVISION: 2.0", "7.2"),
        ("R35 (release), REVISION: 4.1", "5"),
        ("R99 (release), REVISION: 1.0", None),
    ],
)
def test_jetpack_by_the_release(tmp_path: Path, release: str, jetpack: str | None) -> None:
    found = read_jetson(system(tmp_path, {"etc/nv_tegra_release": f"# {release}, GCID: 1\n"}))
    assert found is not None
    assert found.jetpack == jetpack


def test_of_several_clocks_the_one_that_moves_counts(tmp_path: Path) -> None:
    policy = "sys/devices/system/cpu/cpufreq/policy4/scaling"
    files = {**THOR, f"{policy}_min_freq": "100000", f"{policy}_max_freq": "2601000"}
    jetson = read_jetson(system(tmp_path, files))
    assert jetson is not None
    assert jetson.clocks_fixed is False


def test_this_machine_can_be_asked() -> None:
    found = read_jetson(System())
    assert found is None or found.board
