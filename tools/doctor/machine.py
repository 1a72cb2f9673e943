"""Reading a system's files and asking its commands, in one place: tests present other machines.

Processor, memory and NVIDIA's driver, as the kernel's files tell them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "NvidiaDriver", "Processor", "System", "read_driver", "read_memory", "read_processor"]

_PATIENCE = 5.0


def _run(command: Sequence[str]) -> str | None:
    """What a command prints; None when it is not there, fails, or does not end."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class System:
    """A machine's file system and commands. Nothing is ever written or changed."""

    root: Path = Path("/")
    """Where its file system begins."""
    run: Callable[[Sequence[str]], str | None] = _run
    """What a command prints; None when it cannot be had."""

    def text(self, path: str) -> str:
        """A file's text without the NULs and spaces at its ends; empty where it can't be read."""
        try:
            return self._path(path).read_text("utf-8", "replace").strip("\0 \n\t")
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        try:
            return self._path(path).exists()
        except OSError:
            return False

    def names(self, folder: str) -> list[str]:
        """What a folder holds, sorted; nothing where it can't be read."""
        try:
            return sorted(entry.name for entry in self._path(folder).iterdir())
        except OSError:
            return []

    def number(self, path: str) -> int | None:
        """A file that is one whole number."""
        text = self.text(path)
        return int(text) if text.isdecimal() else None

    def _path(self, path: str) -> Path:
        return self.root / path.lstrip("/")


# The kernel's name of each feature that makes products fast, and ours.
_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "neon": "NEON",
    "asimdhp": "NEON FP16",
    "asimddp": "NEON dot product",
    "i8mm": "NEON INT8 matrix",
    "bf16": "NEON BF16",
    "sve": "SVE",
    "sve2": "SVE2",
}
# Arm's processors have a number where others have a name: of those on boards that this is for.
_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE",
    "0xd4f": "Neoverse-V2",
    "0xd83": "Neoverse-V3AE",
}
_NVIDIA = "0x10de"
_MOST = 1 << 60  # a container without a limit has a number near the largest one


@dataclass(frozen=True)
class Processor:
    """What computes."""

    name: str
    """As the system has it, or the board's name."""
    cores: int
    """Logical ones, as the system counts them."""
    features: tuple[str, ...]
    """Those that make products fast."""


@dataclass(frozen=True)
class Memory:
    """Bytes; None where unknown."""

    total: int | None
    """All there is."""
    available: int | None
    """To be had now without swapping."""
    swap: int | None
    """Swap space, compressed memory included."""
    container_limit: int | None
    """What a container may take; None = no limit."""


@dataclass(frozen=True)
class NvidiaDriver:
    """NVIDIA's driver and cards, whether or not they work."""

    version: str | None
    """Of the kernel's module; None when it is not loaded."""
    cards: int
    """NVIDIA's graphics devices on the PCI bus."""
    models: tuple[str, ...]
    """What the driver calls them."""


def read_processor(system: System) -> Processor:
    """The processor of this machine."""
    fields: dict[str, list[str]] = {}
    for line in system.text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), []).append(value.strip())
    names = fields.get("model name", []) or [_PARTS.get(part, "") for part in fields.get("CPU part", [])]
    name = next(filter(None, names), "") or system.text("/proc/device-tree/model") or "unknown"
    flags = {flag for key in ("flags", "Features") for flag in " ".join(fields.get(key, [])[:1]).split()}
    features = dict.fromkeys(word for flag, word in _FEATURES.items() if flag in flags)
    return Processor(name, max(1, len(fields.get("processor", []))), tuple(features))


def read_memory(system: System) -> Memory:
    """This machine's memory."""
    kilobytes = {
        name: int(value)
        for name, value in re.findall(r"^(\w+):\s+(\d+) kB", system.text("/proc/meminfo"), re.MULTILINE)
    }

    def entry(name: str) -> int | None:
        return kilobytes[name] * 1024 if name in kilobytes else None

    limits = (
        system.number("/sys/fs/cgroup/memory.max"),
        system.number("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    )
    limit = next((value for value in limits if value is not None and value < _MOST), None)
    return Memory(entry("MemTotal"), entry("MemAvailable"), entry("SwapTotal"), limit)


def read_driver(system: System) -> NvidiaDriver:
    """NVIDIA's driver; on Jetsons, whose GPU is on no bus, `cards` is 0."""
    found = re.search(
        r"Module\s+(?:for \S+\s+)?(\d+\.\d+(?:\.\d+)*)", system.text("/proc/driver/nvidia/version")
    )
    devices = "/sys/bus/pci/devices"
    cards = sum(
        system.text(f"{devices}/{name}/vendor") == _NVIDIA
        and system.text(f"{devices}/{name}/class").startswith("0x03")
        for name in system.names(devices)
    )
    folder = "/proc/driver/nvidia/gpus"
    texts = [system.text(f"{folder}/{name}/information") for name in system.names(folder)]
    models = [
        match[1].strip() for text in texts if (match := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))
    ]
    return NvidiaDriver(found[1] if found else None, cards, tuple(models))
