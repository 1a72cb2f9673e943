"""What was found to work: GPUs that the driver shows, and engines that were tried."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Engine", "Gpu", "State"]


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
