"""File systems of machines that are not here: what a Jetson or a PC shows in /proc, /sys and /etc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blt_edge.tools.doctor.machine import System

__all__ = ["ORIN", "PC", "PC_WITH_CARD", "THOR", "build", "system"]

_MEMINFO = (
    "MemTotal: {total} kB\nMemFree: 100 kB\nMemAvailable: {free} kB\nSwapTotal: {swap} kB\nSwapFree: 0 kB\n"
)
_NVPMODEL = """\
# power modes
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""

PC: dict[str, str] = {
    "proc/cpuinfo": "".join(
        f"processor\t: {core}\nmodel name\t: Intel(R) Core(TM) i5\nflags\t\t: fpu sse avx avx2 fma f16c\n\n"
        for core in range(4)
    ),
    "proc/meminfo": _MEMINFO.format(total=16_000_000, free=8_000_000, swap=2_000_000),
    "sys/fs/cgroup/memory.max": "max\n",
    "sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086\n",
    "sys/bus/pci/devices/0000:00:02.0/class": "0x030000\n",
}
"""A PC without a card of NVIDIA's."""

PC_WITH_CARD: dict[str, str] = {
    **PC,
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
    "proc/driver/nvidia/version": (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC\n"
    ),
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 3060\nIRQ: 1\n",
}
"""One with a card and a driver."""

ORIN: dict[str, str] = {
    "proc/cpuinfo": "".join(
        f"processor\t: {core}\nFeatures\t: fp asimd aes asimdhp asimddp\nCPU part\t: 0xd42\n\n"
        for core in range(6)
    ),
    "proc/meminfo": _MEMINFO.format(total=7_800_000, free=5_000_000, swap=3_900_000),
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0",
    "etc/nv_tegra_release": (
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    ),
    "etc/nvpmodel.conf": _NVPMODEL,
    "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet\n",
    "var/lib/dpkg/status": (
        "Package: bash\nStatus: install ok installed\nVersion: 5.1-6ubuntu1\n\n"
        "Package: nvidia-jetpack\nStatus: install ok installed\nArchitecture: arm64\nVersion: 6.2+b77\n"
    ),
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  x\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
    "sys/class/devfreq/15340000.vic/min_freq": "1\n",
    "sys/class/devfreq/15340000.vic/max_freq": "2\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1344000\n",
}
"""An Orin Nano with JetPack 6.2, in its mode of 25 W, clocks left to move."""

THOR: dict[str, str] = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd sve sve2 i8mm bf16\nCPU part\t: 0xd83\n\n",
    "proc/meminfo": _MEMINFO.format(total=128_000_000, free=120_000_000, swap=0),
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 4.0, GCID: 1, BOARD: generic, EABI: aarch64\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.00  Build\n",
    "sys/class/devfreq/gpu-gpc-0/min_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "2601000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "2601000\n",
}
"""A Thor with JetPack 7.1, clocks fixed; its power mode is known to `nvpmodel` only."""


def build(root: Path, files: Mapping[str, str]) -> Path:
    """Write a machine's files under `root`; returns it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def system(root: Path, files: Mapping[str, str], **commands: str) -> System:
    """A machine of these files, on which these commands print these texts and others are not there."""

    def run(command: Sequence[str]) -> str | None:
        return commands.get(command[0])

    return System(build(root, files), run)
