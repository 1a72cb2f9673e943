"""File systems of machines that are not here: what boards, a server and a PC show in /proc, /sys and /etc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blt_edge.tools.doctor.machine import System

__all__ = [
    "GRAVITON",
    "ORIN",
    "ORIN_7",
    "PC",
    "PC_WITH_CARD",
    "PHONE",
    "PI_4",
    "PI_5",
    "PI_5_ANSWERS",
    "THOR",
    "build",
    "system",
]

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


def _arm_cores(part: str, count: int, features: str, first: int = 0) -> str:
    """Lines of /proc/cpuinfo for `count` equal cores."""
    return "".join(
        f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {part}\nCPU revision\t: 1\n\n"
        for core in range(first, first + count)
    )


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

ORIN_7: dict[str, str] = {
    **{name: text for name, text in ORIN.items() if name != "var/lib/dpkg/status"},
    "proc/device-tree/compatible": "nvidia,p3701-0000\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "etc/nv_tegra_release": "# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic, EABI: aarch64\n",
}
"""An AGX Orin with JetPack 7.2."""

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

_A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"

PI_5: dict[str, str] = {
    "proc/cpuinfo": _arm_cores("0xd0b", 4, _A76)
    + "Revision\t: d04170\nSerial\t\t: 0\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
    "proc/meminfo": _MEMINFO.format(total=8_200_000, free=7_300_000, swap=2_097_136),
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    "/dev/zram0                              partition\t2097136\t\t1024\t\t100\n",
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/self/mountinfo": (
        "24 30 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw\n"
        "30 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw\n"
        "93 30 179:1 / /boot/firmware rw,relatime shared:51 - vfat /dev/mmcblk0p1 rw,fmask=0022\n"
        "95 30 259:1 / /mnt/fast\\040ssd rw,relatime shared:53 - ext4 /dev/nvme0n1p1 rw\n"
    ),
    "sys/block/mmcblk0/device/type": "SD\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "1\n",
    "sys/class/thermal/cooling_device0/max_state": "4\n",
    "sys/class/thermal/thermal_zone0/temp": "51500\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand\n",
}
"""A Pi 5 with a fan, its system on an SD card and an NVMe disk beside it."""

PI_5_ANSWERS: dict[str, str] = {
    "vcgencmd get_throttled": "throttled=0x0\n",
    "vcgencmd measure_temp": "temp=51.0'C\n",
    "getconf LONG_BIT": "64\n",
    "getconf PAGESIZE": "16384\n",
    "uname": "aarch64\n",
}
"""What its commands print."""

PI_4: dict[str, str] = {
    "proc/cpuinfo": _arm_cores("0xd08", 4, "fp asimd evtstrm crc32 cpuid"),
    "proc/meminfo": _MEMINFO.format(total=3_900_000, free=3_400_000, swap=524_284),
    "proc/swaps": "Filename Type Size Used Priority\n/var/swap file 524284 0 -2\n",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.5\0",
    "sys/class/thermal/thermal_zone0/temp": "48199\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "powersave\n",
}
"""A Pi 4 without a fan, whose cores have no dot product."""

GRAVITON: dict[str, str] = {
    "proc/cpuinfo": _arm_cores(
        "0xd40", 2, f"{_A76} sha3 sm3 sm4 sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs dcpodp i8mm bf16"
    ),
    "proc/meminfo": _MEMINFO.format(total=4_000_000, free=3_000_000, swap=0),
}
"""A server of Amazon's with Graviton 3, which has SVE and no SVE2."""

PHONE: dict[str, str] = {
    "proc/cpuinfo": _arm_cores("0xd05", 4, _A76.replace(" asimdhp", ""))
    + _arm_cores("0xd41", 3, f"{_A76} i8mm", 4)
    + _arm_cores("0xd44", 1, f"{_A76} i8mm bf16", 7),
    "proc/meminfo": _MEMINFO.format(total=8_000_000, free=3_000_000, swap=0),
}
"""Cores of three kinds, of which the small ones can do less."""


def build(root: Path, files: Mapping[str, str]) -> Path:
    """Write a machine's files under `root`; returns it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def system(root: Path, files: Mapping[str, str], **commands: str) -> System:
    """A machine of these files, on which these commands print these texts and others are not there.

    A command's text is looked up by all its words, then by its name.
    """

    def run(command: Sequence[str]) -> str | None:
        return commands.get(" ".join(command), commands.get(command[0]))

    return System(build(root, files), run)
