"""A Jetson: which board and JetPack it is, and whether its power mode and clocks let it run at full speed.

Nothing is set here. Power modes are what `nvpmodel -q` says, or its own files where it is not there; clocks
are the limits of the kernel's frequency scaling, which `jetson_clocks` sets to one value. The memory's clock
can be read by root only and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .machine import System

__all__ = ["Clock", "Jetson", "read_jetson"]

_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)")
_POWER_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")
_GPU = re.compile(r"gpu|ga10b|gv11b|gp10b|gb10b")
# The releases of Jetson Linux (L4T) and the JetPack that each belongs to, the longest fitting one counts:
# https://developer.nvidia.com/embedded/jetpack/downloads and its archive.
_JETPACKS = {
    "35": "5",
    "36.3": "6.0",
    "36.4": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
}


@dataclass(frozen=True)
class Clock:
    """The limits between which a clock may move. Hz."""

    name: str
    """"GPU" or "CPU"."""
    lowest: int
    """What it may fall to."""
    highest: int
    """What it may rise to."""

    @property
    def fixed(self) -> bool:
        """Whether it stays where it is."""
        return self.lowest == self.highest


@dataclass(frozen=True)
class Jetson:
    """A Jetson as it is set now."""

    board: str
    """What it calls itself."""
    l4t: str | None
    """Release of Jetson Linux, such as "36.4.3"."""
    jetpack: str | None
    """JetPack, by its package or else by the release."""
    power_mode: str | None
    """Name of the power mode."""
    full_power_mode: tuple[int, str] | None
    """Number and name of the mode without limits; None where it is not known."""
    clocks: tuple[Clock, ...]
    """One for the GPU and one for the processors, as far as they can be read."""
    memory: int | None
    """Bytes of memory, which processors and GPU share."""

    @property
    def full_power(self) -> bool | None:
        """Whether the power mode has no limits; None where it is not known."""
        if self.power_mode is None:
            return None
        if self.full_power_mode is not None:
            return self.power_mode == self.full_power_mode[1]
        return self.power_mode.upper().startswith("MAXN")

    @property
    def clocks_fixed(self) -> bool | None:
        """Whether no clock moves; None where none can be read."""
        return all(clock.fixed for clock in self.clocks) if self.clocks else None

    def warnings(self) -> Iterator[str]:
        """Why figures measured here may not be the board's best, each with what to do."""
        if self.full_power is False:
            number, name = self.full_power_mode or (0, "MAXN")
            yield (
                f"the power mode is {self.power_mode}, which limits clocks and cores: "
                f"sudo nvpmodel -m {number} sets {name}"
            )
        if self.clocks_fixed is False:
            moving = ", ".join(
                f"{clock.name} {clock.lowest / 1e6:.0f} to {clock.highest / 1e6:.0f} MHz"
                for clock in self.clocks
                if not clock.fixed
            )
            yield f"clocks move with the load ({moving}): sudo jetson_clocks fixes them until the next start"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "board": self.board,
            "l4t": self.l4t,
            "jetpack": self.jetpack,
            "power_mode": self.power_mode,
            "full_power": self.full_power,
            "clocks": {
                clock.name: {"lowest_hz": clock.lowest, "highest_hz": clock.highest} for clock in self.clocks
            },
            "clocks_fixed": self.clocks_fixed,
            "unified_memory_bytes": self.memory,
        }


def read_jetson(system: System) -> Jetson | None:
    """What kind of Jetson this is; None when it is none."""
    board = system.text("/proc/device-tree/model")
    release = _RELEASE.search(system.text("/etc/nv_tegra_release"))
    tegra = "nvidia,tegra" in system.text("/proc/device-tree/compatible")
    if release is None and not tegra and "jetson" not in board.lower():
        return None
    l4t = f"{release[1]}.{release[2]}" if release else None
    return Jetson(
        board=board or "a Jetson without a name",
        l4t=l4t,
        jetpack=_package_version(system, "nvidia-jetpack") or (l4t and _jetpack(l4t)) or None,
        power_mode=_power_mode(system),
        full_power_mode=_full_power_mode(system),
        clocks=tuple(_clocks(system)),
        memory=_memory(system),
    )


def _jetpack(l4t: str) -> str | None:
    parts = l4t.removesuffix(".0").split(".")
    fitting = (_JETPACKS.get(".".join(parts[:length])) for length in range(len(parts), 0, -1))
    return next(filter(None, fitting), None)


def _package_version(system: System, package: str) -> str | None:
    """A Debian package's version without its build, such as "6.2.1" for "6.2.1+b38"."""
    for entry in system.text("/var/lib/dpkg/status").split("\n\n"):
        if entry.startswith(f"Package: {package}\n") and "Status: install ok installed" in entry:
            found = re.search(r"^Version: (\d+(?:\.\d+)*)", entry, re.MULTILINE)
            return found[1] if found else None
    return None


def _modes(system: System) -> dict[int, str]:
    return {int(number): name for number, name in _POWER_MODEL.findall(system.text("/etc/nvpmodel.conf"))}


def _power_mode(system: System) -> str | None:
    said = re.search(r"NV Power Mode:\s*(\S+)", system.run(["nvpmodel", "-q"]) or "")
    if said is not None:
        return said[1].removeprefix("MODE_")
    kept = re.search(r"pmode:(\d+)", system.text("/var/lib/nvpmodel/status"))
    name = _modes(system).get(int(kept[1])) if kept else None
    return name.removeprefix("MODE_") if name else None


def _full_power_mode(system: System) -> tuple[int, str] | None:
    """The mode MAXN, or the first one on boards that have none; the name without MODE_."""
    modes = _modes(system)
    if not modes:
        return None
    number = next((key for key, name in modes.items() if name.upper().startswith("MAXN")), min(modes))
    return number, modes[number].removeprefix("MODE_")


def _clocks(system: System) -> Iterator[Clock]:
    for name, folder, fits, files in (
        ("GPU", "/sys/class/devfreq", _GPU, ("min_freq", "max_freq", 1)),
        (
            "CPU",
            "/sys/devices/system/cpu/cpufreq",
            re.compile("policy"),
            ("scaling_min_freq", "scaling_max_freq", 1000),
        ),
    ):
        lowest, highest, unit = files
        pairs = [
            (system.number(f"{folder}/{entry}/{lowest}"), system.number(f"{folder}/{entry}/{highest}"))
            for entry in system.names(folder)
            if fits.search(entry)
        ]
        known = [(low, high) for low, high in pairs if low is not None and high is not None]
        if known:
            # Of several, one that moves tells more than those that don't.
            low, high = max(known, key=lambda pair: pair[1] - pair[0])
            yield Clock(name, low * unit, high * unit)


def _memory(system: System) -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", system.text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
