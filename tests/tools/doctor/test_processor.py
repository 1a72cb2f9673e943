"""Processors that are not here, by /proc/cpuinfo: names, cores, and which features make products fast."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.doctor.machine import System
from blt_edge.tools.doctor.processor import Processor, read_processor
from support.machines import GRAVITON, ORIN, PC, PHONE, PI_4, PI_5, THOR, system

BOARD = {"proc/device-tree/model": "Board\0", "proc/cpuinfo": "processor: 0\nCPU part: 0x1\n"}
FOREIGN = {"proc/cpuinfo": PI_5["proc/cpuinfo"].replace("0x41", "0x51")}
HYBRID = {
    "proc/cpuinfo": "processor: 0\nmodel name: X\nflags: avx2 f16c avx_vnni avx512f\n\n"
    "processor: 1\nmodel name: X\nflags: avx2 f16c avx_vnni\n"
}
RISC_V = {"proc/cpuinfo": "processor: 0\nhart: 0\nisa: rv64imafdcv\nuarch: sifive,u74-mc\n"}
ARM = {"asimddp", "i8mm", "sve", "sve2", "asimdhp", "bf16"}
X86 = {"avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"}


def flags(processor: Processor, present: bool) -> set[str]:
    return {feature.flag for feature in processor.features if feature.present is present}


@pytest.mark.parametrize(
    ("files", "name", "cores", "present", "known"),
    [
        (PC, "Intel(R) Core(TM) i5", 4, {"avx2", "f16c"}, X86),
        (HYBRID, "X", 2, {"avx2", "f16c", "avx_vnni"}, X86),
        (PI_4, "Cortex-A72", 4, set(), ARM),
        (PI_5, "Cortex-A76", 4, {"asimddp", "asimdhp"}, ARM),
        (ORIN, "Cortex-A78AE", 6, {"asimddp", "asimdhp"}, ARM),
        (THOR, "Neoverse-V3AE", 1, {"sve", "sve2", "i8mm", "bf16"}, ARM),
        (GRAVITON, "Neoverse-V1", 2, {"asimddp", "asimdhp", "sve", "i8mm", "bf16"}, ARM),
        (PHONE, "4 x Cortex-A55, 3 x Cortex-A78, 1 x Cortex-X1", 8, {"asimddp"}, ARM),
        (FOREIGN, "unknown", 4, {"asimddp", "asimdhp"}, ARM),
        (BOARD, "Board", 1, set(), set()),
        (RISC_V, "unknown", 1, set(), set()),
        ({}, "unknown", 1, set(), set()),
    ],
    ids=["PC", "hybrid", "Pi 4", "Pi 5", "Orin", "Thor", "Graviton 3", "phone", *"abcd"],
)
def test_processor(
    tmp_path: Path, files: dict[str, str], name: str, cores: int, present: set[str], known: set[str]
) -> None:
    """A feature is there when every core has it; whoever makes a core may number its parts as they like."""
    processor = read_processor(system(tmp_path, files))
    assert (processor.name, processor.cores) == (name, cores)
    assert (flags(processor, True), flags(processor, False)) == (present, known - present)
    assert all(feature.name and feature.purpose for feature in processor.features)


def test_text_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_bytes(b"processor: 0\nmodel name: \xff\xfe\n")
    assert read_processor(system(tmp_path, {})).name == "\ufffd\ufffd"


def test_this_machine() -> None:
    """The oracle is a search for whole words in the file."""
    here, text = read_processor(System()), Path("/proc/cpuinfo").read_text()
    words = {*text.split()}
    assert here.cores >= 1
    assert flags(here, True) <= words
    assert not flags(here, False) & words or len({*text.split("\n\n")}) > 1
