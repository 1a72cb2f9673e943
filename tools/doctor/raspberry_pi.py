"""How a Raspberry Pi is doing: whether it is held back, by heat or by its power supply, and how it is set.

`vcgencmd` asks the board's firmware, where it is installed and allowed; what else there is comes from the
kernel's files. Nothing is set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .machine import System

_THROTTLED = re.compile(r"throttled=0x([0-9a-fA-F]{1,8})\b")
_TEMPERATURE = re.compile(r"temp=(-?\d{1,3}(?:\.\d+)?)'C")
# Bits of `vcgencmd get_throttled`; sixteen further on each says that it has been so since the start.
_REASONS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
_SINCE = 16
_FANS = ("pwm-fan", "gpio-fan", "rpi-poe-fan")
_CPUFREQ = "/sys/devices/system/cpu/cpufreq"


@dataclass(frozen=True)
class Throttling:
    """What the firmware says of clocks and power."""

    now: tuple[str, ...]
    """Why it is held back at this moment: "under-voltage", "clock capped", "throttled", "soft temperature
    limit".
    """
    since_start: tuple[str, ...]
    """Why it has been since it was started; these stay until the next start."""


@dataclass(frozen=True)
class RaspberryPi:
    board: str
    """What it calls itself."""
    throttling: Throttling | None
    """None where the firmware can't be asked."""
    temperature_celsius: float | None
    governor: str | None
    """Who moves the processors' clock, such as "ondemand"."""
    fan_levels: tuple[int, int] | None
    """Level of the fan and its highest one; None where the system drives none."""
    kernel: str | None
    """The kernel's processor type, such as "aarch64"."""
    userland_bits: int | None
    """Of programs: 64, or 32."""
    page_bytes: int | None
    """Of the memory's pages."""

    def warnings(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Why it does not run as fast as it could, each with commands that mend or show it."""
        held = self.throttling or Throttling((), ())
        if "under-voltage" in (*held.now, *held.since_start):
            when = "now" if "under-voltage" in held.now else "since the start"
            yield (
                f"the supply's voltage is too low ({when}), which slows the processor and damages cards: "
                "use the board's own power supply and cable, and power USB disks by themselves",
                ("vcgencmd get_throttled",),
            )
        now, since = (
            ", ".join(reason for reason in reasons if reason != "under-voltage")
            for reasons in (held.now, held.since_start)
        )
        if now or since:
            when = "is slowed down now" if now else "has been slowed down since the start"
            yield (
                f"the processor {when} ({now or since}): give it a heat sink and a fan",
                ("vcgencmd measure_temp",),
            )
        if self.governor == "powersave":
            yield (
                "the governor powersave keeps the processor at its lowest clock (a change lasts until the "
                "next start)",
                (f"echo ondemand | sudo tee {_CPUFREQ}/policy*/scaling_governor",),
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_raspberry_pi(system: System) -> RaspberryPi | None:
    """What kind of Raspberry Pi this is and how it is doing; None when it is none."""
    board = system.text("/proc/device-tree/model")
    if not board.startswith("Raspberry Pi"):
        return None
    bits = (system.run(["getconf", "LONG_BIT"]) or "").strip()
    page = (system.run(["getconf", "PAGESIZE"]) or "").strip()
    return RaspberryPi(
        board=board,
        throttling=_throttling(system),
        temperature_celsius=_temperature(system),
        governor=system.text(f"{_CPUFREQ}/policy0/scaling_governor") or None,
        fan_levels=_fan(system),
        kernel=(system.run(["uname", "-m"]) or "").strip() or None,
        userland_bits=int(bits) if bits in ("32", "64") else None,
        page_bytes=int(page) if page.isdecimal() else None,
    )


def _throttling(system: System) -> Throttling | None:
    said = _THROTTLED.search(system.run(["vcgencmd", "get_throttled"]) or "")
    if said is None:
        return None
    bits = int(said[1], 16)
    now, since = (
        tuple(reason for bit, reason in _REASONS.items() if bits >> bit + shift & 1) for shift in (0, _SINCE)
    )
    return Throttling(now, since)


def _temperature(system: System) -> float | None:
    """In degrees Celsius: the firmware's, else the kernel's of the first zone."""
    said = _TEMPERATURE.search(system.run(["vcgencmd", "measure_temp"]) or "")
    if said is not None:
        return float(said[1])
    thousandths = system.number("/sys/class/thermal/thermal_zone0/temp")
    return None if thousandths is None else thousandths / 1000


def _fan(system: System) -> tuple[int, int] | None:
    folder = "/sys/class/thermal"
    for name in system.names(folder):
        if system.text(f"{folder}/{name}/type") in _FANS:
            level, most = (system.number(f"{folder}/{name}/{end}_state") for end in ("cur", "max"))
            if level is not None and most is not None:
                return level, most
    return None
