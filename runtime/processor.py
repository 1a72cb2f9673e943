"""What this machine's processor is, as far as prepared weights depend on it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["describe_processor"]

_CPUINFO = Path("/proc/cpuinfo")
# Kernels are chosen by vector and matrix instructions; other flags come and go with the system's version.
_FEATURE = re.compile(r"s?sse|avx|fma|f16c|amx|asimd|fphp|neon|i8mm|bf16|sve|sme|dotprod|rvv")
_MODEL = (
    "vendor_id",
    "cpu family",
    "model",
    "CPU implementer",
    "CPU variant",
    "CPU part",
    "mvendorid",
    "marchid",
)


def describe_processor() -> dict[str, str]:
    """system, machine, model and features (sorted, one space between); equal on equal machines."""
    fields: dict[str, set[str]] = {}
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), set()).add(value.strip())
    # Cores may differ: each kind counts.
    model = " ".join(",".join(sorted(fields[name])) for name in _MODEL if name in fields)
    flags = {
        flag
        for name in ("flags", "Features", "isa")
        for text in fields.get(name, ())
        for flag in text.split()
    }
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": model or platform.processor(),
        "features": " ".join(sorted(flag for flag in flags if _FEATURE.match(flag))),
    }
