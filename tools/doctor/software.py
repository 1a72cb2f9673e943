"""What is installed, by what pip wrote about it, and what of it works, by trying it.

No package is imported here, and each engine is tried in a process of its own: whatever crashes or hangs there
does not do so here.
"""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ...runtime.child import run_child

# 1. Packages.

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

_ALWAYS = ("blt-edge", "numpy")
_IF_INSTALLED = (
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings"),
    *("cuda-bindings", "cuda-python", "onnx", "onnx-ir", "onnxscript", "torch", "transformers"),
)
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
    runtimes = [name for name in ONNX_RUNTIMES if lookup(name) is not None] or ["onnxruntime"]
    found = {name: lookup(name) for name in (*_ALWAYS, *runtimes)}
    others = {name: version for name in _IF_INSTALLED if (version := lookup(name)) is not None}
    return {"python": platform.python_version(), **found, **others}


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
        # Any ONNX Runtime runs on processors.
        names = ONNX_RUNTIMES if name.startswith("onnxruntime") and "gpu" not in name else (name,)
        version = next(filter(None, map(lookup, names)), None)
        if version is None:
            missing.append(name)
        elif least and _older(version, least):
            missing.append(f"{name}>={least}, here is {version}")
    return result


def _older(version: str, least: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.match(r"[0-9.]*", text)[0].split(".") if part]  # type: ignore[index]

    return numbers(version) < numbers(least)


# 2. Asking the worker.

PATIENCE = 60.0
"""Seconds that an answer may take: an engine's first start on a small board takes some ten."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOG_HEAD = re.compile(r"^.*?\[[EW]:onnxruntime:[^]]*\]\s*")
_FAILURE = re.compile(r"error|fail|cannot|require", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """What the worker said."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What it found out; empty when it did not come that far."""
    error: str | None = None
    """Why something did not work, in one line; None when it did."""
    said: str = ""
    """The most telling line of the engine's log; empty when there is none."""


Ask = Callable[..., Reply]
"""`ask`, or what takes its place in tests: called with a subject and names."""


def ask(subject: str, *names: str) -> Reply:
    """Let `engine_worker` answer in a process of its own; however that ends, the reply says so."""
    request = {"subject": subject, "names": names}
    # Not in the user's folder, whose files could be taken for modules.
    with tempfile.TemporaryDirectory(prefix="blt-edge-doctor-") as folder:
        worker = f"{__package__}.engine_worker"
        outcome = run_child(worker, request, patience=PATIENCE, folder=Path(folder))
    lines = [_LOG_HEAD.sub("", _COLOUR.sub("", line)).strip() for line in outcome.log.splitlines()]
    telling = [line for line in lines if _FAILURE.search(line)] or [line for line in lines if line]
    said = telling[-1][:300] if telling else ""
    if outcome.result is None:
        return Reply(error=str(outcome.error or outcome.death), said=said)
    error = outcome.result.pop("error", None)
    return Reply(outcome.result, error, said)


# 3. What works.

_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class CudaDevice:
    """A GPU, as CUDA shows it."""

    name: str
    compute_capability: str
    """Such as "8.7"."""
    memory_bytes: int
    unified_memory: bool
    """Whether it is the processors' memory, too."""


@dataclass(frozen=True)
class TriedEngine:
    """Something that runs graphs, as it did here."""

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
class Software:
    """All that was tried."""

    gpus: tuple[CudaDevice, ...]
    """None where there is no GPU or it can't be reached."""
    gpu_error: str | None
    """Why there is none."""
    cuda: str | None
    """The newest CUDA that the driver knows."""
    engines: tuple[TriedEngine, ...]
    """In the order they were tried; ONNX Runtime on the processor first."""
    runtimes: tuple[str, ...]
    """Packages that install the module onnxruntime."""

    @property
    def cpu(self) -> TriedEngine:
        """ONNX Runtime on the processor."""
        return next(engine for engine in self.engines if engine.provider == _CPU)

    def engine(self, name: str, provider: str | None = None) -> TriedEngine | None:
        """One of them; None when it was not tried."""
        fitting = (one for one in self.engines if one.name == name and one.provider == provider)
        return next(fitting, None)


def try_software(lookup: Lookup, ask: Ask, say: Callable[[str], None]) -> Software:
    """Ask for GPUs, and try every engine. say(what is being done)."""
    say("asking NVIDIA's driver")
    gpus = ask("cuda")
    return Software(
        gpus=tuple(CudaDevice(**gpu) for gpu in gpus.facts.get("devices", ())),
        gpu_error=gpus.error,
        cuda=gpus.facts.get("cuda"),
        engines=(*_try_onnxruntime(ask, say), *_try_tensorrt(ask, say)),
        runtimes=tuple(name for name in ONNX_RUNTIMES if lookup(name) is not None),
    )


def _try_onnxruntime(ask: Ask, say: Callable[[str], None]) -> Iterator[TriedEngine]:
    """Every execution provider that was compiled in, the one that everything else falls back to first."""
    say("asking ONNX Runtime")
    known = ask("providers")
    version, providers = known.facts.get("version"), known.facts.get("providers", ())
    if known.error is not None or _CPU not in providers:
        missing = known.error or "this build has no CPU provider"
        yield TriedEngine("ONNX Runtime", _CPU, version, error=missing)
    for name in sorted(providers, key=lambda name: name != _CPU):
        say(f"trying ONNX Runtime's {name}")
        reply = ask("provider", name)
        ran, error = tuple(reply.facts.get("ran", ())), reply.error
        if error is None and reply.facts.get("right") is not True:
            error = "a product of matrices came out wrong"
        elif error is None and name not in ran:
            error = f"ran on {', '.join(ran) or 'nothing'} instead"
            if name == "AzureExecutionProvider":
                error += ", as it should: it is for calls to remote services only"
            elif reply.said:
                error += f": {reply.said}"
        yield TriedEngine("ONNX Runtime", name, version, ran, error)


def _try_tensorrt(ask: Ask, say: Callable[[str], None]) -> Iterator[TriedEngine]:
    for target, title in {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}.items():
        say(f"trying {title}")
        reply = ask("tensorrt", target)
        yield TriedEngine(title, None, reply.facts.get("version"), (), reply.error)
