"""What an engine does on this machine, found out in a process of its own that `software.ask` starts.

A driver or an engine that crashes or hangs takes only this process with it. Engines log to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...runtime.child import Tell

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
        text = str(error).strip() or type(error).__name__
        return {"error": text.splitlines()[0]}


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
