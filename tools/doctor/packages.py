"""Which packages are installed, by what pip wrote about them: none is imported.

What was found to work: GPUs that the driver shows, and engines that were tried.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata

__all__ = ["ONNX_RUNTIMES", "Engine", "Gpu", "Lookup", "State", "installed", "missing_by_extra", "versions"]

Lookup = Callable[[str], str | None]
"""The version of a package that pip installed; None when it is not there."""

ONNX_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "ort-nightly",
    "ort-nightly-gpu",
)
"""Packages that all install the one module onnxruntime, over each other."""

_SHOWN = (
    "blt-edge",
    "numpy",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13-bindings",
    "cuda-bindings",
    "cuda-python",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "torch",
    "transformers",
)
_ALWAYS = ("blt-edge", "numpy")
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^]]*\])?\s*(?:\(?>=\s*([0-9.]+))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def installed(name: str) -> str | None:
    """See `Lookup`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions(lookup: Lookup = installed) -> dict[str, str | None]:
    """Python and packages by name: those that matter, and whichever ONNX Runtime there is."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    runtimes = [name for name in ONNX_RUNTIMES if lookup(name) is not None] or ["onnxruntime"]
    for name in (*_ALWAYS, *runtimes, *_SHOWN):
        version = lookup(name)
        if version is not None or name in _ALWAYS or name in runtimes:
            found[name] = version
    return found


def missing_by_extra(
    lookup: Lookup = installed, requirements: Iterable[str] | None = None
) -> dict[str, list[str]]:
    """For each of blt-edge's extras, what it needs and is not there, as "name" or "name>=1.2, here is 1.1".

    requirements: as the package's metadata has them; None reads those of the one that is installed.
    """
    if requirements is None:
        try:
            requirements = metadata.requires("blt-edge") or ()
        except metadata.PackageNotFoundError:
            requirements = ()
    result: dict[str, list[str]] = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        extra, parts = _EXTRA.search(marker), _REQUIREMENT.match(requirement)
        # Other markers are about Pythons and systems, which pip knows better.
        if extra is None or parts is None or " and " in marker or " or " in marker:
            continue
        name, _, least = parts.groups()
        missing = result.setdefault(extra[1], [])
        if name.lower() == "blt-edge":
            continue
        version = _runtime(lookup) if name.startswith("onnxruntime") and "gpu" not in name else lookup(name)
        if version is None:
            missing.append(name)
        elif least and _older(version, least):
            missing.append(f"{name}>={least}, here is {version}")
    return result


def _runtime(lookup: Lookup) -> str | None:
    """Any ONNX Runtime runs on processors."""
    return next(filter(None, map(lookup, ONNX_RUNTIMES)), None)


def _older(version: str, least: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.match(r"[0-9.]*", text)[0].split(".") if part]  # type: ignore[index]

    return numbers(version) < numbers(least)


@dataclass(frozen=True)
class Gpu:
    """A GPU, as CUDA shows it."""

    name: str
    """What it calls itself."""
    compute_capability: str
    """Such as "8.7"."""
    memory_bytes: int
    """All of it."""
    unified_memory: bool
    """Whether it is the processors' memory, too."""


@dataclass(frozen=True)
class Engine:
    """Something that runs graphs, tried in a process of its own."""

    name: str
    """"ONNX Runtime", "TensorRT" or "TensorRT-RTX"."""
    provider: str | None = None
    """ONNX Runtime's execution provider; None for others."""
    version: str | None = None
    """None where it did not say."""
    ran: tuple[str, ...] = ()
    """The execution providers that computed the product, by ONNX Runtime's own profile."""
    error: str | None = None
    """Why it does not work; None when it does."""

    @property
    def works(self) -> bool:
        """Whether it did what was asked, itself."""
        return self.error is None


@dataclass(frozen=True)
class State:
    """All of it."""

    gpus: tuple[Gpu, ...]
    """None where there is no GPU or it can't be reached."""
    gpu_error: str | None
    """Why there is none."""
    cuda: str | None
    """The newest CUDA that the driver knows."""
    engines: tuple[Engine, ...]
    """In the order they were tried; ONNX Runtime on the processor first."""
    runtimes: tuple[str, ...]
    """Packages that install the module onnxruntime."""

    @property
    def cpu(self) -> Engine:
        """ONNX Runtime on the processor."""
        return next(engine for engine in self.engines if engine.provider == "CPUExecutionProvider")

    def engine(self, name: str, provider: str | None = None) -> Engine | None:
        """One of them; None when it was not tried."""
        fitting = (one for one in self.engines if one.name == name and one.provider == provider)
        return next(fitting, None)
