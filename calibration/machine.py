"""Where something was measured: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "processor_name"]

_CPUINFO = Path("/proc/cpuinfo")
# Boards such as Jetsons and Raspberry Pis name themselves here; their processors have no model name.
_BOARD = Path("/proc/device-tree/model")


def describe_machine(threads: int | None = None) -> dict[str, Any]:
    """processor, system, cpus, threads as they were asked for (None = not limited), onnxruntime's version."""
    try:
        engine = version("onnxruntime")
    except PackageNotFoundError:
        engine = "unknown"
    return {
        "processor": processor_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": threads,
        "onnxruntime": engine,
    }


def processor_name() -> str:
    """The processor's name, or the board's, as the operating system has it."""
    names = [
        line.partition(":")[2].strip()
        for line in _read(_CPUINFO).splitlines()
        if line.lower().startswith("model name")
    ]
    board = _read(_BOARD).strip("\0 \n")
    return next(filter(None, names), "") or board or platform.processor() or platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
