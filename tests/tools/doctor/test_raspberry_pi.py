"""Raspberry Pis that are not here: what is read of them, and what is warned of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.tools.doctor.machine import System
from blt_edge.tools.doctor.raspberry_pi import RaspberryPi, Throttling, read_raspberry_pi
from hypothesis import given
from hypothesis import strategies as st
from support.machines import ORIN, PC, PI_4, PI_5, PI_5_ANSWERS, system

MODEL = "proc/device-tree/model"


def board_of(root: Path, files: dict[str, str], **answers: str) -> RaspberryPi:
    found = read_raspberry_pi(system(root, files, **answers))
    assert found is not None
    return found


def held_by(bits: int) -> RaspberryPi:
    """A Pi whose firmware answers these bits."""
    files = {f"/{name}": text for name, text in PI_5.items()}

    class Fake(System):
        def text(self, path: str) -> str:
            return files.get(path, "").strip("\0 \n")

    answers = {**PI_5_ANSWERS, "vcgencmd get_throttled": f"throttled={bits:#x}\n"}
    board = read_raspberry_pi(Fake(Path("/nowhere"), lambda command: answers.get(" ".join(command))))
    assert board is not None
    return board


@pytest.mark.parametrize("files", [{}, PC, ORIN, {MODEL: "Radxa ROCK 5B\0"}])
def test_none(tmp_path: Path, files: dict[str, str]) -> None:
    assert read_raspberry_pi(system(tmp_path, files)) is None


def test_a_pi_5(tmp_path: Path) -> None:
    board = board_of(tmp_path, PI_5, **PI_5_ANSWERS)
    assert board == RaspberryPi(
        board="Raspberry Pi 5 Model B Rev 1.0",
        throttling=Throttling((), ()),
        temperature_celsius=51.0,
        governor="ondemand",
        fan_levels=(1, 4),
        kernel="aarch64",
        userland_bits=64,
        page_bytes=16384,
    )
    assert list(board.warnings()) == []
    assert json.loads(json.dumps(board.to_dict()))["throttling"] == {"now": [], "since_start": []}


def test_a_pi_4_whose_firmware_cannot_be_asked(tmp_path: Path) -> None:
    """Temperatures are the kernel's, then; governor and userland are as bad as they get."""
    answers = {"getconf LONG_BIT": "32\n", "getconf PAGESIZE": "4096\n", "uname": "aarch64\n"}
    board = board_of(tmp_path, PI_4, **answers)
    assert (board.throttling, board.fan_levels, board.temperature_celsius) == (None, None, 48.199)
    assert (board.kernel, board.userland_bits) == ("aarch64", 32)
    ((governor, tee),) = board.warnings()
    assert "powersave" in governor
    assert tee == ("echo ondemand | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor",)


@pytest.mark.parametrize(
    ("answer", "throttling"),
    [
        ("throttled=0x50005", Throttling(("under-voltage", "throttled"), ("under-voltage", "throttled"))),
        (
            "throttled=0xe0008",
            Throttling(("soft temperature limit",), ("clock capped", "throttled", "soft temperature limit")),
        ),
        ("throttled=0xzz", None),
        ("throttled=0x" + "f" * 5000, None),
        ("Can't open device file: /dev/vcio", None),
        ("", None),
    ],
)
def test_what_the_firmware_says(tmp_path: Path, answer: str, throttling: Throttling | None) -> None:
    """The bits are as Raspberry Pi's documentation of get_throttled has them."""
    assert board_of(tmp_path, PI_5, vcgencmd=answer).throttling == throttling


@given(st.integers(0, 0xFFFFF))
def test_every_pattern_of_bits_is_told_and_warned_of(bits: int) -> None:
    board = held_by(bits)
    held = board.throttling
    assert held is not None
    assert len(held.now) == (bits & 0xF).bit_count()
    assert len(held.since_start) == (bits >> 16 & 0xF).bit_count()
    told = " ".join(reason for reason, _ in board.warnings())
    assert ("voltage is too low" in told) == bool(bits & 0x10001)
    assert ("slowed down now" in told) == bool(bits & 0xE)
    assert ("has been slowed down since" in told) == bool(bits & 0xE0000 and not bits & 0xE)


def test_odd_answers_are_unknown(tmp_path: Path) -> None:
    answers = {"getconf LONG_BIT": "sixty-four", "getconf PAGESIZE": "", "uname": " \n"}
    board = board_of(tmp_path, {MODEL: "Raspberry Pi 400 Rev 1.0\0"}, **answers, vcgencmd="temp=99999'C")
    assert (board.userland_bits, board.page_bytes, board.kernel) == (None, None, None)
    assert (board.temperature_celsius, board.governor, board.fan_levels) == (None, None, None)
    assert list(board.warnings()) == []
