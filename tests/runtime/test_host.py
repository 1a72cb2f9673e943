"""What this machine is taken for, and what others do on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.runtime import host
from blt_edge.runtime.host import OtherLoad, busy_ticks

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


# What /proc/stat says of others' work.

# user nice system idle iowait irq softirq steal guest guest_nice
STAT = "cpu  100 20 30 4000 500 6 7 8 90 1\ncpu0 1 1 1 1 1 1 1 1 1 1\n"


def test_work_is_all_but_waiting_and_guests_twice() -> None:
    assert busy_ticks(STAT) == 100 + 20 + 30 + 6 + 7 + 8


@pytest.mark.parametrize("text", ["", "\n", "cpu  1 2 3\n", "intr 1 2 3 4 5 6 7 8 9\n"])
def test_a_system_that_tells_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert busy_ticks(text) is None
    monkeypatch.setattr(host, "read_text", lambda path: text)
    with OtherLoad() as other:
        pass
    assert other.cores is None


def test_a_moment_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "read_text", lambda path: STAT)
    with OtherLoad() as other:
        pass
    assert other.cores is None


def test_our_own_work_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors busy for ten seconds, a half of one with us."""
    ticks = iter((STAT, STAT.replace("cpu  100", f"cpu  {100 + 20 * host.os.sysconf('SC_CLK_TCK')}")))
    own, clock = iter((1.0, 6.0)), iter((50.0, 60.0))
    monkeypatch.setattr(host, "read_text", lambda path: next(ticks))
    monkeypatch.setattr(host.time, "process_time", lambda: next(own))
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    with OtherLoad() as other:
        pass
    assert other.cores == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("cpuinfo", "board", "name"),
    [
        ("processor : 0\nmodel name\t: Xeon\nmodel name\t: Other\n", "Board\0", "Xeon"),
        ("processor : 0\nmodel name\t:\n", "NVIDIA Jetson Orin Nano\0", "NVIDIA Jetson Orin Nano"),
        ("", "", "abacus"),
    ],
)
def test_what_a_machine_calls_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, board: str, name: str
) -> None:
    for constant, text in (("_CPUINFO", cpuinfo), ("_BOARD", board)):
        (tmp_path / constant).write_text(text)
        monkeypatch.setattr(host, constant, tmp_path / constant)
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    monkeypatch.setattr(host.platform, "machine", lambda: "abacus")
    described = host.describe_machine(3)
    assert list(described) == ["processor", "system", "cpus", "threads", "onnxruntime"]
    assert (described["processor"], described["threads"]) == (name, 3)


def test_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "meminfo")
    assert host.available_memory() is None
    (tmp_path / "meminfo").write_text("MemAvailable:  4000 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert host.available_memory() == 4_096_000
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
    assert host.available_memory() == 2_500_000
