"""A whole machine with a GPU that is not there: driver, TensorRT and ONNX Runtime's providers."""

from __future__ import annotations

import pytest
from blt_edge.runtime import devices
from blt_edge.runtime.backends import ort_gpu
from blt_edge.runtime.backends.ort_gpu import PROVIDERS
from blt_edge.runtime.backends.tensorrt import TensorRtModule
from blt_edge.runtime.errors import BackendError
from support.simulated_cuda import SimulatedDriver
from support.simulated_ort import SimulatedOrt
from support.simulated_tensorrt import SimulatedTensorRt, write_engines, write_plan

__all__ = ["SimulatedDriver", "SimulatedOrt", "SimulatedTensorRt", "simulate", "write_engines", "write_plan"]


def simulate(monkeypatch: pytest.MonkeyPatch, *there: str) -> SimulatedDriver:
    """Until the test's end this machine has a GPU, and `there`: "tensorrt", "tensorrt-rtx", `PROVIDERS`."""
    driver = SimulatedDriver()
    monkeypatch.setattr(devices, "CudaDriver", lambda: driver)

    def load(target: str) -> TensorRtModule:
        if target not in there:
            raise BackendError(f"{target} is not installed")
        return SimulatedTensorRt(driver).as_module(target)

    monkeypatch.setattr(devices, "load_tensorrt", load)
    for device in there:
        if device in PROVIDERS:
            module = SimulatedOrt(driver, PROVIDERS[device].name)
            monkeypatch.setattr(ort_gpu, "import_onnxruntime", lambda module=module: module)
            monkeypatch.setattr(devices, "import_onnxruntime", lambda module=module: module)
    return driver
