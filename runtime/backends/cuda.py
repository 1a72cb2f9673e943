"""The CUDA runtime as GPU backends use it: one device, one stream on which everything happens in order.

A thin translation to cuda-python (`cuda.bindings.runtime`): addresses are plain integers, every error is a
BackendError. Nothing here knows arrays, stages or engines. CUDA_VISIBLE_DEVICES chooses the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import BackendError

__all__ = ["CudaDriver", "device_compute_capability", "import_cudart"]

_DEVICE = 0


def import_cudart() -> Any:
    """cuda-python's runtime module. Raises BackendError when it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            "GPUs are driven through cuda-python, which is not installed; pip install cuda-bindings, of the "
            "CUDA version that the driver has"
        ) from error
    return runtime


def device_compute_capability() -> str | None:
    """Compute capability of the first visible GPU, such as "8.7"; None where there is no GPU or no driver.

    Nothing is kept on the GPU. Raises BackendError when cuda-python is missing.
    """
    cudart = import_cudart()
    attributes = cudart.cudaDeviceAttr
    wanted = (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
    try:
        answers = [cudart.cudaDeviceGetAttribute(attribute, 0) for attribute in wanted]
    except (RuntimeError, OSError):  # a driver's library that can't be loaded
        return None
    if any(int(status) != 0 for status, _ in answers):
        return None
    return ".".join(str(value) for _, value in answers)


class CudaDriver:
    """The first visible device and a stream of our own on it."""

    def __init__(self) -> None:
        """Raises BackendError when there is no CUDA device, no driver, or no cuda-python."""
        self._cudart = cudart = import_cudart()
        try:
            error, count = cudart.cudaGetDeviceCount()
        except (RuntimeError, OSError) as missing:  # a driver library that can't be loaded
            raise BackendError(f"no CUDA device: {missing}; see blt-edge doctor") from missing
        if error != cudart.cudaError_t.cudaSuccess or not count:
            reason = "no device is visible" if error == cudart.cudaError_t.cudaSuccess else self._told(error)
            if error == cudart.cudaError_t.cudaErrorInsufficientDriver:
                reason += (
                    ", or there is none: cuda-bindings has to be of the CUDA version that the driver has"
                )
            raise BackendError(f"no CUDA device: {reason}; see blt-edge doctor, or take --device cpu")
        self._call("cudaSetDevice", _DEVICE)
        properties = self._call("cudaGetDeviceProperties", _DEVICE)
        name = properties.name
        self.name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        """What the device calls itself."""
        self.compute_capability = (int(properties.major), int(properties.minor))
        self.stream = int(self._call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking))

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cudart, function)(*arguments)
        if error != self._cudart.cudaError_t.cudaSuccess:
            raise BackendError(f"CUDA: {function}: {self._told(error)}")
        return results[0] if len(results) == 1 else tuple(results)

    def _told(self, error: Any) -> str:
        _, text = self._cudart.cudaGetErrorString(error)
        return str(text.decode() if isinstance(text, bytes) else text)

    # 1. Memory.

    def memory(self) -> tuple[int, int]:
        """Bytes (free, in all) of the device."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, count: int) -> int:
        """Address of `count` bytes on the device. Raises BackendError when there are no more."""
        return int(self._call("cudaMalloc", count))

    def free(self, address: int) -> None:
        """Give back what no queued work uses: CUDA may wait for it, or not."""
        self._call("cudaFree", address)

    def allocate_pinned(self, count: int) -> int:
        """Address of `count` bytes of host memory that the device copies from and to by itself."""
        return int(self._call("cudaHostAlloc", count, 0))

    def free_pinned(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    # 2. Copies, queued. From pageable host memory, the source may change once the call returns.

    def copy(self, target: int, source: int, count: int) -> None:
        """`count` bytes between any two addresses."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, count, kind, self.stream)

    def copy_2d(self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """`rows` rows of `width` bytes on the device, each row a pitch further."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, pitch, source, source_pitch, width, rows, kind, self.stream)

    def clear(self, address: int, count: int) -> None:
        self._call("cudaMemsetAsync", address, 0, count, self.stream)

    # 3. Time.

    def synchronize(self) -> None:
        """Wait until nothing is queued; errors of what was queued show here."""
        self._call("cudaStreamSynchronize", self.stream)

    def new_event(self) -> Any:
        return self._call("cudaEventCreateWithFlags", 0)

    def record(self, event: Any) -> None:
        self._call("cudaEventRecord", event, self.stream)

    def wait(self, event: Any) -> None:
        """Wait until the stream has passed the mark."""
        self._call("cudaEventSynchronize", event)

    def seconds(self, start: Any, end: Any) -> float:
        return float(self._call("cudaEventElapsedTime", start, end)) / 1000

    # 4. Graphs: work queued once, launched many times at the same addresses.

    def capture(self, work: Callable[[], None]) -> Any:
        """What `work` queues, as a graph to launch; nothing of it runs now.

        Raises BackendError when something in it can't be captured; the stream is as before.
        """
        cudart = self._cudart
        # What no graph can hold, such as an allocation, is an error in this thread; others are free to do it.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            error, graph = cudart.cudaStreamEndCapture(self.stream)
            if error == cudart.cudaError_t.cudaSuccess and int(graph):
                cudart.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def release(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)
