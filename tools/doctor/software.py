"""What is installed, by what pip wrote about it, and what of it works, by trying it.

No package is imported here: each engine is tried in a process of its own (`work`), so whatever crashes or
hangs there does not do so here. Engines log to stderr.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ...runtime.child import Tell, run_child

# A graph of one MatMul, a [2, 3] and b [3, 2] to c: written out because the package onnx may not be here.
_GRAPH = bytes.fromhex(
    "08083a590a110a01610a016212016322064d61744d756c120570726f62655a130a0161120e0a0c080112080a0208020a0208035a"
    "130a0162120e0a0c080112080a0208030a02080262130a0163120e0a0c080112080a0208020a02080242040a001011"
)


def work(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Answer one question: facts about a subject, with "error" where something did not work."""
    subjects: dict[str, Callable[..., dict[str, Any]]] = {
        "providers": _providers,
        "provider": _provider,
        "cuda": _cuda,
        "tensorrt": _tensorrt,
        "bundle": _bundle,
    }
    try:
        return subjects[request["subject"]](*request["names"])
    except Exception as error:  # whatever an engine raises is the answer
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}


def _providers() -> dict[str, Any]:
    """What the installed ONNX Runtime was compiled with."""
    import onnxruntime

    return {
        "version": onnxruntime.__version__,
        "providers": list(onnxruntime.get_available_providers()),
        "module": str(Path(onnxruntime.__file__).parent),
    }


def _provider(name: str) -> dict[str, Any]:
    """Run a product on an execution provider, and see in ONNX Runtime's own profile what computed it."""
    import numpy as np
    import onnxruntime as ort

    from ...runtime.backends.ort_gpu import preload_libraries

    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = "probe"
    if name != "CPUExecutionProvider":
        preload_libraries(ort)
    # Its own way to fall back prints to stdout and hides the reason.
    session = ort.InferenceSession(_GRAPH, options, providers=[name], enable_fallback=False)
    random = np.random.default_rng(0)
    a = random.standard_normal((2, 3)).astype(np.float32)
    b = random.standard_normal((3, 2)).astype(np.float32)
    (c,) = session.run(None, {"a": a, "b": b})
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    ran = {event.get("args", {}).get("provider") for event in events if event.get("cat") == "Node"} - {None}
    return {
        "registered": list(session.get_providers()),
        "ran": sorted(ran),
        # Room for TF32 and float16, not for a wrong product.
        "right": bool(np.allclose(c, a @ b, rtol=1e-2, atol=1e-2)),
    }


def _cuda() -> dict[str, Any]:
    """The GPUs that NVIDIA's driver has for programs."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RuntimeError("the package cuda-bindings is not installed") from error
    _cuda_answer(driver, driver.cuInit(0))
    number = _cuda_answer(driver, driver.cuDriverGetVersion())
    kind = driver.CUdevice_attribute

    def device(ordinal: int) -> dict[str, Any]:
        handle = _cuda_answer(driver, driver.cuDeviceGet(ordinal))
        major, minor, unified = (
            int(_cuda_answer(driver, driver.cuDeviceGetAttribute(attribute, handle)))
            for attribute in (
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                kind.CU_DEVICE_ATTRIBUTE_INTEGRATED,
            )
        )
        name = _cuda_answer(driver, driver.cuDeviceGetName(128, handle))
        return {
            "name": name.decode("utf-8", "replace").strip("\0 "),
            "compute_capability": f"{major}.{minor}",
            "memory_bytes": int(_cuda_answer(driver, driver.cuDeviceTotalMem(handle))),
            "unified_memory": bool(unified),
        }

    count = int(_cuda_answer(driver, driver.cuDeviceGetCount()))
    return {"cuda": f"{number // 1000}.{number % 1000 // 10}", "devices": [device(i) for i in range(count)]}


def _cuda_answer(driver: Any, result: Any) -> Any:
    status, *values = result
    if int(status) != 0:
        _, name = driver.cuGetErrorName(status)
        raise RuntimeError(name.decode() if isinstance(name, bytes) else str(status))
    return values[0] if values else None


def _tensorrt(target: str) -> dict[str, Any]:
    """Whether TensorRT's Python module loads and can make a builder."""
    from ...runtime.backends.tensorrt import load_tensorrt

    trt = load_tensorrt(target)
    facts: dict[str, Any] = {"version": trt.version, "builds_for": list(trt.compute_capabilities)}
    said: list[str] = []
    logger = trt.logger(lambda severity, message: said.append(f"{severity}: {message}"))
    if trt.module.Builder(logger) is None:
        facts["error"] = next((line for line in said if line.startswith("ERROR")), "it can't make a builder")
    return facts


def _bundle(directory: str, capability: str) -> dict[str, Any]:
    """What a bundle would run from, engine by engine; capability: the first GPU's, empty = there is none."""
    from ...runtime.backends.tensorrt import TENSORRT_TARGETS, load_tensorrt
    from ...runtime.engines import find_engine, find_tensorrt_engine
    from ...runtime.errors import BltError
    from ...runtime.manifest import load_manifest

    path = Path(directory)
    manifest = load_manifest(path)
    prepared = find_engine(path, manifest)
    found = [("onnxruntime", prepared.name, prepared.reason, prepared.directory is not None)]
    for target in TENSORRT_TARGETS:
        try:
            trt = load_tensorrt(target)
        except BltError as error:
            found.append((target, "", str(error), False))
            continue
        if not capability:
            found.append((target, "", "no GPU is seen", False))
            continue
        engine = find_tensorrt_engine(path, manifest, trt, capability)
        found.append((target, engine.name, engine.reason, engine.directory is not None))
    return {
        "stages": {name: spec.precision for name, spec in manifest.stages.items()},
        "forms": [dict(zip(("target", "name", "reason", "fits"), one, strict=True)) for one in found],
    }


# 1. Packages.

Lookup = Callable[[str], str | None]
"""The version of a package that pip installed; None when it is not there."""

ONNX_RUNTIMES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn"),
    *("ort-nightly", "ort-nightly-gpu"),
)
"""Packages that all install the one module onnxruntime, over each other."""

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"

_ALWAYS = ("blt-edge", "numpy")
_IF_INSTALLED = (
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings"),
    *("cuda-bindings", "cuda-python", "onnx", "onnx-ir", "onnxscript", "torch", "transformers"),
)
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^]]*\])?\s*(?:\(?>=\s*([0-9.]+))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def installed(name: str) -> str | None:
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


def telemetry() -> str:
    """Whether an ONNX Runtime that sends telemetry does so in our processes, and why."""
    value = os.environ.get(TELEMETRY_SWITCH, "")
    # What ONNX Runtime 1.32 was seen to take for no.
    on = value.lower() in ("", "0", "false", "no")
    return f"{'on' if on else 'off'} ({TELEMETRY_SWITCH}={value})"


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
        elif least and _numbers(version) < _numbers(least):
            missing.append(f"{name}>={least}, here is {version}")
    return result


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.match(r"[0-9.]*", version)[0].split(".") if part]  # type: ignore[index]


# 2. Asking a child.

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
    """Let `work` answer in a process of its own; however that ends, the reply says so."""
    request = {"subject": subject, "names": names}
    # Not in the user's folder, whose files could be taken for modules.
    with tempfile.TemporaryDirectory(prefix="blt-edge-doctor-") as folder:
        outcome = run_child(__name__, request, patience=PATIENCE, folder=Path(folder))
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
