"""The CUDA driver's translation, on a stand-in for cuda-python's runtime module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from blt_edge.runtime.backends import cuda
from blt_edge.runtime.backends.cuda import CudaDriver
from blt_edge.runtime.errors import BackendError

GRAPH, EXECUTABLE, STREAM = 11, 12, 7


class Cudart:
    """Answers as cuda-python does: a tuple of the error and the results; records the calls."""

    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorInsufficientDriver=35)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local")  # noqa: N815

    def __init__(self, **answers: tuple[Any, ...]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, tuple[Any, ...]] = {
            "cudaGetDeviceCount": (0, 1),
            "cudaGetDeviceProperties": (0, SimpleNamespace(name=b"A GPU", major=8, minor=7)),
            "cudaStreamCreateWithFlags": (0, STREAM),
            "cudaStreamEndCapture": (0, GRAPH),
            "cudaGraphInstantiate": (0, EXECUTABLE),
            "cudaGetErrorString": (0, b"out of luck"),
            **answers,
        }

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self.answers.get(name, (0,))

        return call


def opened(monkeypatch: pytest.MonkeyPatch, **answers: tuple[Any, ...]) -> tuple[CudaDriver, Cudart]:
    cudart = Cudart(**answers)
    monkeypatch.setattr(cuda, "import_cudart", lambda: cudart)
    driver = CudaDriver()
    cudart.calls.clear()
    return driver, cudart


def test_a_capture_is_a_graph_and_leaves_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, cudart = opened(monkeypatch)
    assert (driver.name, driver.compute_capability, driver.stream) == ("A GPU", (8, 7), STREAM)
    assert driver.capture(lambda: cudart.calls.append(("work",))) == EXECUTABLE
    assert cudart.calls == [
        ("cudaStreamBeginCapture", STREAM, "thread-local"),
        ("work",),
        ("cudaStreamEndCapture", STREAM),
        ("cudaGraphInstantiate", GRAPH, 0),
        ("cudaGraphDestroy", GRAPH),
    ]


def test_a_capture_that_fails_is_ended_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, cudart = opened(monkeypatch)

    def work() -> None:
        raise BackendError("the engine refused")

    with pytest.raises(BackendError, match="the engine refused"):
        driver.capture(work)
    assert cudart.calls[1:] == [("cudaStreamEndCapture", STREAM), ("cudaGraphDestroy", GRAPH)]


def test_an_invalid_capture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, cudart = opened(monkeypatch, cudaStreamEndCapture=(901, None))
    with pytest.raises(BackendError, match=r"^CUDA: cudaStreamEndCapture: out of luck$"):
        driver.capture(lambda: None)
    assert ("cudaGraphDestroy", GRAPH) not in cudart.calls

    def work() -> None:
        raise BackendError("the engine refused")

    with pytest.raises(BackendError, match="the engine refused"):
        driver.capture(work)


def test_a_driver_that_is_too_old_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"out of luck, or there is none: cuda-bindings has to be of the"):
        opened(monkeypatch, cudaGetDeviceCount=(35, None))
    with pytest.raises(BackendError, match=r"no CUDA device: no device is visible; see blt-edge doctor"):
        opened(monkeypatch, cudaGetDeviceCount=(0, 0))
