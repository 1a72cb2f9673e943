"""What a folder lies on, an SD card or a faster disk, by the kernel's list of mounts and its device tree.

Tables are read at random, a row here and a row there, which is where such devices differ most.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from .machine import System

_ESCAPE = re.compile(r"\\([0-7]{3})")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "fuse.sshfs", "ceph")
_MEMORY = ("tmpfs", "ramfs", "zram")
# A disk's name in /sys, whose partitions lie in folders below it; NVMe's lie in their controller's.
_DISK = re.compile(r"/block/([^/]+)|/(nvme\d+n\d+)(?:/|$)")


@dataclass(frozen=True)
class Storage:
    kind: str
    """"SD card", "eMMC", "NVMe", "USB", "disk" (any other), "network", "memory" or "unknown"."""
    device: str | None
    """The kernel's name of the whole device, such as "mmcblk0"; None where it is none."""
    mount: str
    """Where its file system is mounted."""
    filesystem: str
    """Such as "ext4"."""


def find_storage(system: System, path: str) -> Storage | None:
    """What the absolute path lies on; None where the list of mounts can't be read."""
    best: tuple[str, str, str, str] | None = None
    for line in system.text("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (filesystem, source, *_) = before.split(), [*after.split(), "", ""]
        if len(fields) < 5:
            continue
        mount = _ESCAPE.sub(lambda found: chr(int(found[1], 8)), fields[4])
        # Of several at one place the last one hides the others.
        if PurePosixPath(path).is_relative_to(mount) and len(mount) >= len(best[0] if best else ""):
            best = (mount, fields[2], filesystem, source)
    if best is None:
        return None
    mount, number, filesystem, source = best
    kind, device = _device(system, number, filesystem, source)
    return Storage(kind, device, mount, filesystem)


def _device(system: System, number: str, filesystem: str, source: str) -> tuple[str, str | None]:
    if filesystem in _NETWORK:
        return "network", None
    if filesystem in _MEMORY:
        return "memory", None
    # Some file systems (btrfs) have a number of their own: the device they name is asked for, then.
    way = system.link(f"/sys/dev/block/{number}") or system.link(f"/sys/class/block/{_name(source)}")
    disk = _DISK.search(way)
    if disk is None:
        return "unknown", None
    device = disk[1] or disk[2]
    if device.startswith("mmcblk"):
        soldered = system.text(f"/sys/block/{device}/device/type") == "MMC"
        return "eMMC" if soldered else "SD card", device
    if device.startswith("nvme"):
        return "NVMe", device
    if "/virtual/" in way:  # encrypted, joined or in a file: what is below is not looked for
        return "unknown", device
    return "USB" if re.search(r"/usb\d", way) else "disk", device


def _name(source: str) -> str:
    return source.removeprefix("/dev/") if source.startswith("/dev/") else ""
