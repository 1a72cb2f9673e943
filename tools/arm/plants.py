"""Defects that exist on Arm only, to be planted into the package under test: the check must find each.

A plant replaces one line of the installed package by one that does something else on aarch64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_ON_ARM = '__import__("platform").machine() == "aarch64"'

PLANTS = {
    # An engine is built for a description of the machine that the next process does not share.
    "fingerprint": (
        "runtime/engines.py",
        "        **describe_processor(),\n",
        f'        **describe_processor(), "process": __import__("os").getpid() if {_ON_ARM} else 0,\n',
    ),
    # ONNX Runtime's fused attention adds one to what weights of keys are divided by.
    "softmax": (
        "graphs/attention.py",
        '        "local_window_size": window,\n',
        f'        "local_window_size": window, "smooth_softmax": int({_ON_ARM}),\n',
    ),
    # Its float32 products take bfloat16 kernels, where the processor has them (armv9).
    "bfloat16": (
        "runtime/backends/ort_session.py",
        '    entries = {"session.force_spinning_stop": "1"}\n',
        '    entries = {"session.force_spinning_stop": "1"}\n'
        f"    if {_ON_ARM}:\n"
        '        entries["mlas.enable_gemm_fastmath_arm64_bfloat16"] = "1"\n',
    ),
}
"""name -> file in the package, its text, and what stands there instead."""


def plant(name: str, package: Path) -> Callable[[], None]:
    """Put a defect into the folder that holds `blt_edge`; the result takes it out again.

    Raises ValueError where the text that it replaces is not there once.
    """
    file, text, other = PLANTS[name]
    path = package / "blt_edge" / file
    source = path.read_text()
    if source.count(text) != 1:
        raise ValueError(f"{path}: {text.strip()!r} is there {source.count(text)} times, not once")
    path.write_text(source.replace(text, other))
    return lambda: (path.write_text(source), None)[1]
