"""The CUDA driver's translation, on a stand-in for cuda-python's runtime module."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blt_edge.runtime.backends import cuda
from blt_edge.runtime.backends.cuda import CudaDriver, device_compute_capability
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


def test_results_are_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = SimpleNamespace(cudaMemcpyDefault="any", cudaMemcpyDeviceToDevice="device")
    monkeypatch.setattr(Cudart, "cudaMemcpyKind", kinds, raising=False)
    answers = {"cudaMemGetInfo": (0, 3, 10), "cudaMalloc": (0, 4096), "cudaEventElapsedTime": (0, 2500.0)}
    driver, cudart = opened(monkeypatch, **answers, cudaHostAlloc=(0, 8192))
    assert driver.memory() == (3, 10)
    assert (driver.allocate(5), driver.allocate_pinned(6)) == (4096, 8192)
    assert driver.seconds("start", "end") == 2.5
    driver.copy(1, 2, 3)
    driver.copy_2d(1, 10, 2, 20, 4, 5)
    driver.clear(1, 7)
    driver.free(4096)
    assert cudart.calls[-4:] == [
        ("cudaMemcpyAsync", 1, 2, 3, "any", STREAM),
        ("cudaMemcpy2DAsync", 1, 10, 2, 20, 4, 5, "device", STREAM),
        ("cudaMemsetAsync", 1, 0, 7, STREAM),
        ("cudaFree", 4096),
    ]


@pytest.mark.parametrize(
    ("answer", "capability"),
    [((0, 8), "8.8"), ((100, None), None), (RuntimeError("no libcuda.so"), None)],
)
def test_the_compute_capability(monkeypatch: pytest.MonkeyPatch, answer: Any, capability: str | None) -> None:
    class Attributes:
        cudaDeviceAttr = SimpleNamespace(  # noqa: N815
            cudaDevAttrComputeCapabilityMajor=1, cudaDevAttrComputeCapabilityMinor=2
        )

        def cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:  # noqa: N802
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(cuda, "import_cudart", Attributes)
    assert device_compute_capability() == capability


# The real one.

NEEDED = "needs cuda.bindings: pip install 'blt-edge[gpu]'"


def test_without_a_gpu_the_driver_says_so() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason=NEEDED)
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"no CUDA device: .*; see blt-edge doctor, or take --device cpu"):
        CudaDriver()


def test_the_cuda_runtime_has_what_the_driver_calls() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason=NEEDED)
    source = Path(cuda.__file__).read_text()
    names = set(re.findall(r"[\"(.](cuda[A-Z]\w+)", source))
    assert len(names) > 20
    enums = ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t", "cudaDeviceAttr")
    kinds = [getattr(runtime, name) for name in enums]
    missing = [
        name
        for name in names
        if not hasattr(runtime, name) and not any(hasattr(kind, name) for kind in kinds)
    ]
    assert missing == []
