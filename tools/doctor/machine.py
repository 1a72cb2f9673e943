"""What a machine is: memory, NVIDIA's driver, and how a Jetson is set, as the kernel's files tell.

Nothing is set here. All is read through `System`, so that tests present other machines. A Jetson's power mode
is what `nvpmodel -q` says, or its own files where it is not there; clocks are the limits of the kernel's
frequency scaling, which `jetson_clocks` sets to one value. The memory's clock can be read by root only and is
left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...runtime.host import read_text, size_in

_PATIENCE = 5.0


def _run(command: Sequence[str]) -> str | None:
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
        return read_text(self._path(path)).strip("\0 \n\t")

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

    def link(self, path: str) -> str:
        """Where a symbolic link points, as it is written there; empty where there is none."""
        try:
            return str(self._path(path).readlink())
        except OSError:
            return ""

    def size(self, name: str) -> int | None:
        """An entry of /proc/meminfo, in bytes."""
        return size_in(self._path("/proc/meminfo"), f"{name}:")

    def _path(self, path: str) -> Path:
        return self.root / path.lstrip("/")


_NVIDIA = "0x10de"
_MOST = 1 << 60  # a container without a limit has a number near the largest one


@dataclass(frozen=True)
class SwapSpace:
    name: str
    """Its file or device."""
    bytes: int
    used_bytes: int
    compressed: bool
    """Whether it is memory itself, compressed (zram)."""


@dataclass(frozen=True)
class MachineMemory:
    """Bytes; None where unknown."""

    total: int | None
    """All there is."""
    available: int | None
    """To be had now without swapping."""
    swap: int | None
    """Swap space, compressed memory included."""
    container_limit: int | None
    """What a container may take; None = no limit."""
    swap_spaces: tuple[SwapSpace, ...] = ()
    """What swap space consists of."""


@dataclass(frozen=True)
class NvidiaDriver:
    """NVIDIA's driver and cards, whether or not they work."""

    version: str | None
    """Of the kernel's module; None when it is not loaded."""
    cards: int
    """NVIDIA's graphics devices on the PCI bus."""
    models: tuple[str, ...]
    """What the driver calls them."""


def read_memory(system: System) -> MachineMemory:
    files = ("memory.max", "memory/memory.limit_in_bytes")
    limits = (system.number(f"/sys/fs/cgroup/{file}") for file in files)
    limit = next((value for value in limits if value is not None and value < _MOST), None)
    return MachineMemory(
        system.size("MemTotal"),
        system.size("MemAvailable"),
        system.size("SwapTotal"),
        limit,
        tuple(_swap_spaces(system)),
    )


def _swap_spaces(system: System) -> Iterator[SwapSpace]:
    for line in system.text("/proc/swaps").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[2].isdecimal() and fields[3].isdecimal():
            size, used = int(fields[2]) * 1024, int(fields[3]) * 1024
            yield SwapSpace(fields[0], size, used, "/zram" in fields[0])


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


# Jetsons.

_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)")
_POWER_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")
_GPU = re.compile(r"gpu|ga10b|gv11b|gp10b|gb10b")
# Releases of Jetson Linux (L4T) and the JetPack that each belongs to; one between two counts as the older:
# https://developer.nvidia.com/embedded/jetpack/downloads and its archive. Two are known from others only:
# 36.4.7 (https://github.com/rbonghi/jetson_stats/issues/791), 39.2.1 (OE4T/meta-tegra, pull request 2339).
_JETPACKS = {
    "35": "5",
    "36.3": "6.0",
    "36.4": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
    "39.2.1": "7.2.1",
}


@dataclass(frozen=True)
class Clock:
    """The limits between which a clock may move."""

    lowest_hz: int
    highest_hz: int

    @property
    def fixed(self) -> bool:
        """Whether it stays where it is."""
        return self.lowest_hz == self.highest_hz

    def __str__(self) -> str:
        highest = f"{self.highest_hz / 1e6:.0f} MHz"
        return f"{highest}, fixed" if self.fixed else f"{self.lowest_hz / 1e6:.0f} to {highest}"


@dataclass(frozen=True)
class Jetson:
    board: str
    """What it calls itself."""
    l4t: str | None
    """Release of Jetson Linux, such as "36.4.3"."""
    jetpack: str | None
    """JetPack, by its package or else by the release."""
    power_mode: str | None
    full_power: bool | None
    """Whether the power mode has no limits; None where it is not known."""
    full_power_mode: tuple[int, str] | None
    """Number and name of the mode without limits; None where it is not known. Not in JSON."""
    clocks: dict[str, Clock]
    """"GPU", and "CPU" for the processors, as far as they can be read."""
    clocks_fixed: bool | None
    """Whether no clock moves; None where none can be read."""
    unified_memory_bytes: int | None
    """Memory, which processors and GPU share."""

    def warnings(self) -> Iterator[str]:
        """Why figures measured here may not be the board's best, each with what to do."""
        if self.full_power is False:
            number, name = self.full_power_mode or (0, "MAXN")
            yield (
                f"the power mode is {self.power_mode}, which limits clocks and cores: "
                f"sudo nvpmodel -m {number} sets {name}"
            )
        if self.clocks_fixed is False:
            moving = ", ".join(f"{name} {clock}" for name, clock in self.clocks.items() if not clock.fixed)
            yield f"clocks move with the load ({moving}): sudo jetson_clocks fixes them until the next start"

    def to_dict(self) -> dict[str, Any]:
        document = asdict(self)
        del document["full_power_mode"]
        return document


def read_jetson(system: System) -> Jetson | None:
    """What kind of Jetson this is; None when it is none."""
    board = system.text("/proc/device-tree/model")
    release = _RELEASE.search(system.text("/etc/nv_tegra_release"))
    tegra = "nvidia,tegra" in system.text("/proc/device-tree/compatible")
    if release is None and not tegra and "jetson" not in board.lower():
        return None
    l4t = f"{release[1]}.{release[2]}" if release else None
    found = _POWER_MODEL.findall(system.text("/etc/nvpmodel.conf"))
    modes = {int(number): name.removeprefix("MODE_") for number, name in found}
    mode = _power_mode(system, modes)
    # The mode without limits is MAXN, or the first one on boards that have none.
    unlimited = (number for number, name in modes.items() if name.upper().startswith("MAXN"))
    number = next(unlimited, min(modes, default=None))
    full_mode = None if number is None else (number, modes[number])
    full = None if mode is None else mode == full_mode[1] if full_mode else mode.upper().startswith("MAXN")
    clocks = dict(_clocks(system))
    return Jetson(
        board=board or "a Jetson without a name",
        l4t=l4t,
        jetpack=_package_version(system, "nvidia-jetpack") or _jetpack(l4t),
        power_mode=mode,
        full_power=full,
        full_power_mode=full_mode,
        clocks=clocks,
        clocks_fixed=all(clock.fixed for clock in clocks.values()) if clocks else None,
        unified_memory_bytes=system.size("MemTotal"),
    )


def _jetpack(l4t: str | None) -> str | None:
    """The JetPack of a release, by the newest known one of its branch that is not newer than it."""
    if l4t is None:
        return None
    parts = [int(part) for part in l4t.split(".")]
    known = {tuple(map(int, release.split("."))): jetpack for release, jetpack in _JETPACKS.items()}
    fitting = [release for release in known if [*release[:2]] == parts[: len(release[:2])]]
    older = [release for release in fitting if [*release] <= parts]
    return known[max(older)] if older else None


def _package_version(system: System, package: str) -> str | None:
    """A Debian package's version without its build, such as "6.2.1" for "6.2.1+b38"."""
    for entry in system.text("/var/lib/dpkg/status").split("\n\n"):
        if entry.startswith(f"Package: {package}\n") and "Status: install ok installed" in entry:
            found = re.search(r"^Version: (\d+(?:\.\d+)*)", entry, re.MULTILINE)
            return found[1] if found else None
    return None


def _power_mode(system: System, modes: dict[int, str]) -> str | None:
    said = re.search(r"NV Power Mode:\s*(\S+)", system.run(["nvpmodel", "-q"]) or "")
    if said is not None:
        return said[1].removeprefix("MODE_")
    kept = re.search(r"pmode:(\d+)", system.text("/var/lib/nvpmodel/status"))
    return modes.get(int(kept[1])) if kept else None


def _clocks(system: System) -> Iterator[tuple[str, Clock]]:
    devices, policies = "/sys/class/devfreq", "/sys/devices/system/cpu/cpufreq"
    for name, folder, fits, prefix, unit in (
        ("GPU", devices, _GPU, "", 1),
        ("CPU", policies, re.compile("policy"), "scaling_", 1000),
    ):
        pairs = [
            [system.number(f"{folder}/{entry}/{prefix}{end}_freq") for end in ("min", "max")]
            for entry in system.names(folder)
            if fits.search(entry)
        ]
        clocks = [
            Clock(low * unit, high * unit) for low, high in pairs if low is not None and high is not None
        ]
        if clocks:
            # Of several, one that moves tells more than those that don't.
            yield name, max(clocks, key=lambda clock: clock.highest_hz - clock.lowest_hz)
