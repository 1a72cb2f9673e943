"""A machine's processor, as the kernel lists it, and which of its features make products fast here.

Cores of one machine may differ (a phone's, some of Intel's): a feature counts when every core has it, because
threads move between cores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .machine import System

# The kernel's name of each feature that ONNX Runtime has kernels for, ours, and what it speeds up there.
_ARM = (
    ("asimddp", "dot product", "int8, int4"),
    ("i8mm", "INT8 matrix product", "prompts"),
    ("sve", "SVE", "activations"),
    ("sve2", "SVE2", "activations"),
    ("asimdhp", "FP16", "float16"),
    ("bf16", "BF16", "bfloat16"),
)
_X86 = (
    ("avx2", "AVX2", "float32"),
    ("f16c", "F16C", "float16"),
    ("avx512f", "AVX-512", "float32"),
    ("avx512_vnni", "AVX-512 VNNI", "int8, int4"),
    ("avx_vnni", "AVX-VNNI", "int8, int4"),
    ("amx_int8", "AMX INT8", "prompts"),
)
# Arm's cores have a number where others have a name: (implementer, part) of those that this may run on.
_CORES = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd0d"): "Cortex-A77",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd44"): "Cortex-X1",
    ("0x41", "0xd46"): "Cortex-A510",
    ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd83"): "Neoverse-V3AE",
}
_ARM_LTD = "0x41"


@dataclass(frozen=True)
class Feature:
    """One that ONNX Runtime has kernels for."""

    flag: str
    """The kernel's name of it, in /proc/cpuinfo."""
    name: str
    purpose: str
    """What it speeds up: weights of these widths, whole prompts, or activations between products."""
    present: bool
    """Whether every core has it."""


@dataclass(frozen=True)
class Processor:
    name: str
    """As the system has it, or the kinds of its cores, or the board's name."""
    cores: int
    """Logical ones, as the system counts them."""
    features: tuple[Feature, ...]
    """All that matter on such a processor; empty where it is neither x86 nor Arm."""


def read_processor(system: System) -> Processor:
    """What /proc/cpuinfo says; raises nothing for what it leaves out."""
    cores = list(_cores(system.text("/proc/cpuinfo")))
    kinds = Counter(filter(None, map(_kind, cores)))
    if len(kinds) > 1:
        name = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    else:
        name = next(iter(kinds), "") or system.text("/proc/device-tree/model") or "unknown"
    return Processor(name, max(1, sum("processor" in core for core in cores)), tuple(_features(cores)))


def _cores(text: str) -> Iterator[dict[str, str]]:
    """A core's lines, by name; what stands apart from all cores (a board's "Model") is one more."""
    for block in text.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        core = {key.strip(): value.strip() for key, _, value in pairs}
        if core:
            yield core


def _kind(core: dict[str, str]) -> str:
    key = (core.get("CPU implementer", _ARM_LTD), core.get("CPU part", ""))
    return core.get("model name") or _CORES.get(key, "")


def _features(cores: list[dict[str, str]]) -> Iterator[Feature]:
    for key, known in (("Features", _ARM), ("flags", _X86)):
        have = [set(core[key].split()) for core in cores if key in core]
        if have:
            common = set.intersection(*have)
            yield from (Feature(flag, name, purpose, flag in common) for flag, name, purpose in known)
            return
