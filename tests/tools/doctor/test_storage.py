"""What a path lies on, by lists of mounts and device trees that are not here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blt_edge.tools.doctor.machine import System
from blt_edge.tools.doctor.storage import Storage, find_storage
from support.machines import PI_5, system

# Where /sys/dev/block/NUMBER points, as Linux 6 has it.
DEVICES = {
    "179:2": "platform/axi/1000fff000.mmc/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0/mmcblk0p2",
    "259:1": "platform/axi/1000110000.pcie/pci0001:00/0001:00:00.0/0001:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p1",
    "259:7": "virtual/nvme-subsystem/nvme-subsys0/nvme1n1",
    "8:1": "platform/axi/1f00200000.usb/xhci-hcd.0/usb2/2-1/2-1:1.0/host0/target0:0:0/0:0:0:0/block/sda/sda1",
    "8:17": "pci0000:00/0000:00:1f.2/ata1/host1/target1:0:0/1:0:0:0/block/sdb/sdb1",
    "252:0": "virtual/block/dm-0",
}


def machine(root: Path, mounts: str, files: dict[str, str] | None = None) -> System:
    fake = system(root, {"proc/self/mountinfo": mounts, **(files or {})})
    for number, way in DEVICES.items():
        link = root / "sys/dev/block" / number
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../devices/{way}")
    return fake


def mount(number: str, place: str, filesystem: str = "ext4", source: str = "/dev/root") -> str:
    return f"30 1 {number} / {place} rw,noatime shared:1 - {filesystem} {source} rw\n"


@pytest.mark.parametrize(
    ("path", "storage"),
    [
        ("/home/pi/bundle", Storage("SD card", "mmcblk0", "/", "ext4")),
        ("/mnt/fast ssd/bundle", Storage("NVMe", "nvme0n1", "/mnt/fast ssd", "ext4")),
        ("/mnt/fast ssds/bundle", Storage("SD card", "mmcblk0", "/", "ext4")),
        ("/mnt/fast ssd", Storage("NVMe", "nvme0n1", "/mnt/fast ssd", "ext4")),
        ("/sys/x", Storage("unknown", None, "/sys", "sysfs")),
    ],
)
def test_a_pi_5(tmp_path: Path, path: str, storage: Storage) -> None:
    assert find_storage(machine(tmp_path, PI_5["proc/self/mountinfo"], PI_5), path) == storage


@pytest.mark.parametrize(
    ("line", "kind", "device"),
    [
        (mount("8:1", "/"), "USB", "sda"),
        (mount("8:17", "/"), "disk", "sdb"),
        (mount("179:2", "/"), "eMMC", "mmcblk0"),
        (mount("0:40", "/", "btrfs", "/dev/sdb1"), "disk", "sdb"),
        (mount("0:41", "/", "nfs4", "server:/export"), "network", None),
        (mount("0:42", "/", "tmpfs", "tmpfs"), "memory", None),
        (mount("0:43", "/", "overlay", "overlay"), "unknown", None),
        (mount("252:0", "/", "ext4", "/dev/mapper/root"), "unknown", "dm-0"),
        (mount("259:7", "/"), "NVMe", "nvme1n1"),
    ],
)
def test_kinds(tmp_path: Path, line: str, kind: str, device: str | None) -> None:
    fake = machine(tmp_path, line, {"sys/block/mmcblk0/device/type": "MMC\n"})
    by_name = tmp_path / "sys/class/block/sdb1"
    by_name.parent.mkdir(parents=True)
    by_name.symlink_to(f"../../devices/{DEVICES['8:17']}")
    found = find_storage(fake, "/x")
    assert found is not None
    assert (found.kind, found.device) == (kind, device)


def test_of_two_at_one_place_the_later_one_is_seen(tmp_path: Path) -> None:
    found = find_storage(machine(tmp_path, mount("179:2", "/") + mount("8:17", "/")), "/x")
    assert found is not None
    assert found.device == "sdb"


@pytest.mark.parametrize("mounts", ["", "nonsense\n", " - \n", "1 2 3\n", "\0\n"])
def test_lists_that_are_none(tmp_path: Path, mounts: str) -> None:
    assert find_storage(machine(tmp_path, mounts), "/x") is None


def test_this_machine(tmp_path: Path) -> None:
    """The oracle is the folder's own device number and whether its mount point is one."""
    found = find_storage(System(), str(tmp_path.resolve()))
    if found is not None:
        assert os.path.ismount(found.mount)
        assert Path(found.mount).stat().st_dev == tmp_path.stat().st_dev
