"""What engines take this machine for."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.runtime import host

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Xeon
cpu MHz\t\t: {mhz}
flags\t\t: fpu sse sse4_2 ssse3 {flags} fma hypervisor

"""
ARM = """processor\t: {core}
Features\t: fp asimd asimddp fphp {flags}
CPU implementer\t: 0x41
CPU variant\t: 0x1
CPU part\t: {part}

"""


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def describe(text: str | None) -> dict[str, str]:
        path = tmp_path / "cpuinfo"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(host, "_CPUINFO", path)
        return host.describe_processor()

    return describe


def test_speed_and_number_of_cores_do_not_matter(described) -> None:
    one = described(INTEL.format(mhz=2000, flags="avx2"))
    assert one["processor"] == "GenuineIntel 6 85"
    assert one["features"] == "avx2 fma sse sse4_2 ssse3"
    assert described(INTEL.format(mhz=3, flags="avx2 xtopology") + INTEL.format(mhz=4, flags="avx2")) == one


def test_instructions_matter(described) -> None:
    assert described(INTEL.format(mhz=1, flags="avx2")) != described(
        INTEL.format(mhz=1, flags="avx2 avx512_vnni")
    )


def test_every_kind_of_core_counts(described) -> None:
    small = ARM.format(core=0, part="0xd05", flags="")
    large = ARM.format(core=1, part="0xd0b", flags="i8mm")
    both = described(small + large)
    assert both["processor"] == "0x41 0x1 0xd05,0xd0b"
    assert "i8mm" in both["features"].split()
    assert both == described(large + small)
    assert both != described(small)


def test_a_system_without_the_file(described) -> None:
    description = described(None)
    assert description["features"] == ""
    assert description["machine"]
    assert all(isinstance(value, str) for value in description.values())
