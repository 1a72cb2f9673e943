"""How many cores are ours, and how many of them are free: from files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import processors
from blt_edge.runtime.processors import free_cores, usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`machine(cpus=8, ...)`: from now on the functions see that machine."""

    def become(
        cpus: int = 8,
        affinity: set[int] | None = None,
        pairs: bool = False,
        groups: str = "0::/\n",
        quotas: dict[str, str] | None = None,
        load: str = "0.00 0.00 0.00 1/100 5",
    ) -> None:
        write = {
            "load": load,
            "groups": groups,
            **{f"cgroup/{name}": text for name, text in (quotas or {}).items()},
        }
        if pairs:
            for cpu in range(cpus):
                first = cpu // 2 * 2
                write[f"cpus/cpu{cpu}/topology/thread_siblings_list"] = f"{first}-{first + 1}\n"
        for name, text in write.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for name, file in {
            "_CPUS": "cpus",
            "_GROUPS": "cgroup",
            "_OWN_GROUPS": "groups",
            "_LOAD": "load",
        }.items():
            monkeypatch.setattr(processors, name, tmp_path / file)
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity or set(range(cpus)), raising=False)

    return become


@pytest.mark.parametrize(
    ("facts", "usable"),
    [
        ({}, 8),
        ({"affinity": {1, 5, 6}}, 3),
        ({"pairs": True}, 4),
        ({"pairs": True, "affinity": {0, 1, 2}}, 2),
        ({"quotas": {"cpu.max": "max 100000\n"}}, 8),
        ({"quotas": {"cpu.max": "250000 100000\n"}}, 2),
        ({"quotas": {"cpu.max": "50000 100000\n"}}, 1),
        ({"quotas": {"cpu.max": "broken"}}, 8),
        ({"groups": "0::/a/b\n", "quotas": {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}}, 3),
        ({"groups": "4:cpu,cpuacct:/x\n1:memory:/x\n", "quotas": {
            "cpu,cpuacct/x/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "50000\n"}}, 3),
        ({"groups": "1:cpu:/\n", "quotas": {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "9"}}, 8),
        ({"groups": "nonsense\n\n"}, 8),
    ],
)  # fmt: skip
def test_cores_that_may_be_used(machine, facts: dict[str, Any], usable: int) -> None:
    machine(**facts)
    assert usable_cores() == usable
    assert free_cores() == usable


@pytest.mark.parametrize(
    ("load", "facts", "free"),
    [
        ("0.40 0.10 0.00 9/100 5", {}, 8),  # a burst that a minute does not know
        ("3.00 1.00 0.00 1/100 5", {}, 8),  # over, though the mean remembers it
        ("3.00 1.00 0.00 4/100 5", {}, 5),
        ("9.00 9.00 9.00 9/100 5", {}, 1),
        ("30.0 9.00 9.00 40/999 5", {"cpus": 64, "quotas": {"cpu.max": "400000 100000"}}, 4),
        ("62.0 9.00 9.00 70/999 5", {"cpus": 64, "quotas": {"cpu.max": "400000 100000"}}, 2),
        ("broken", {}, 8),
    ],
)
def test_cores_that_others_leave_free(machine, load: str, facts: dict[str, Any], free: int) -> None:
    machine(load=load, **facts)
    assert free_cores() == free


def test_where_the_kernel_tells_nothing(machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(cpus=3)
    monkeypatch.delattr(os, "sched_getaffinity")
    for name in ("_CPUS", "_GROUPS", "_OWN_GROUPS", "_LOAD"):
        monkeypatch.setattr(processors, name, tmp_path / "absent")
    assert (usable_cores(), free_cores()) == (3, 3)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert (usable_cores(), free_cores()) == (1, 1)
