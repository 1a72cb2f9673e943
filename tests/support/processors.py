"""Processors that this machine is not: what Linux would tell of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.runtime import host
from blt_edge.runtime.validation import ValidationRecord

__all__ = ["ARM", "X86", "become", "elsewhere"]

X86 = "fpu sse sse2 ssse3 sse4_1 sse4_2 avx f16c fma avx2"
"""Flags of a processor with AVX2, as /proc/cpuinfo has them."""
ARM = "fp asimd evtstrm aes fphp asimdhp asimdrdm asimddp"
"""Features of one with dot product, such as a Raspberry Pi 5's."""


def become(patch: pytest.MonkeyPatch, folder: Path, machine: str, flags: str | None) -> None:
    """Let the runtime take this process for one on such a machine; folder: where its /proc/cpuinfo is kept.

    flags: what its processor can do; None = the system does not tell.
    """
    path = folder / f"cpuinfo-{machine}"
    path.unlink(missing_ok=True)
    if flags is not None:
        name = "Features" if machine.lower() in ("aarch64", "arm64") else "flags"
        path.write_text(f"processor\t: 0\nmodel name\t: A {machine}\n{name}\t\t: {flags}\n\n")
    patch.setattr(host, "_CPUINFO", path)
    patch.setattr(host.platform, "machine", lambda: machine)


def elsewhere(kernels: str | None = "z80 with rounding", *failed: str) -> ValidationRecord:
    """A record, by default of kernels that no machine has which runs tests: passed, or with checks failed."""
    rows = [{"check": name, "ok": False} for name in failed] or [{"check": "logits", "ok": True}]
    report = {"passed": not failed, "against": "a golden file", "data_bytes": 20, "rows": rows}
    machine = (None, None) if kernels is None else ("A Z80", "1.0")
    return ValidationRecord(kernels=kernels, processor=machine[0], onnxruntime=machine[1], report=report)
