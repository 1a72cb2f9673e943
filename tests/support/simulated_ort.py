"""onnxruntime-gpu without a GPU: sessions on the CPU, with the providers' rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.simulated_cuda import SimulatedDriver, compute, cpu_session

__all__ = ["SimulatedOrt"]


class SimulatedOrt:
    """What of onnxruntime-gpu the backend uses."""

    __version__ = "1.99"

    def __init__(
        self,
        driver: SimulatedDriver,
        provider: str,
        *,
        falls_back: bool = False,
        captures: bool = True,
    ) -> None:
        """falls_back: sessions run on the CPU whatever was asked for, as happens without CUDA's libraries.
        captures: whether all nodes are where they can be captured."""
        self.driver, self.provider, self.falls_back = driver, provider, falls_back
        self.captures = captures
        self.options: list[dict[str, str]] = []
        self.preloaded = 0

    def preload_dlls(self) -> None:
        print("Failed to load libcublas.so")
        self.preloaded += 1

    def get_available_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    class SessionOptions:
        """Nothing of it matters here."""

    class RunOptions:
        """Entries by name."""

        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_run_config_entry(self, name: str, value: str) -> None:
            self.entries[name] = value

    def InferenceSession(  # noqa: N802
        self,
        path: str,
        options: Any,
        providers: list[tuple[str, dict[str, str]]],
        enable_fallback: bool = True,
    ) -> _GpuSession:
        """As ONNX Runtime spells it."""
        assert [name for name, _ in providers] == [self.provider]
        assert self.preloaded, "pip's CUDA libraries are found by nobody else"
        given = providers[0][1]
        self.options.append(given)
        session = _GpuSession(self, Path(path))
        try:
            self._check_options(given)
        except RuntimeError as error:
            if not enable_fallback:
                raise
            print(f"*************** EP Error ***************\nEP Error {error} when using {providers}")
            session.get_providers = lambda: ["CPUExecutionProvider"]  # type: ignore[method-assign]
        return session

    def _check_options(self, given: dict[str, str]) -> None:
        """Names and switches as each provider reads them; others pass."""
        is_tensorrt = self.provider == "TensorrtExecutionProvider"
        for name, value in given.items():
            if is_tensorrt and name == "has_user_compute_stream":
                raise RuntimeError(f"Invalid TensorRT EP option: {name}")
            if is_tensorrt and name.endswith("_enable") and value.lower() not in ("true", "false"):
                raise RuntimeError(f"The value for the key '{name}' should be 'True' or 'False'.")
        graphs = given["trt_cuda_graph_enable" if is_tensorrt else "enable_cuda_graph"]
        if not self.captures and graphs.lower() in ("1", "true"):
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user as all compute "
                f"graph nodes have not been partitioned to the {self.provider}"
            )


class _GpuSession:
    def __init__(self, module: SimulatedOrt, path: Path) -> None:
        self._module, self._session = module, cpu_session(path)
        self._graphs: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

    def get_providers(self) -> list[str]:
        return [] if self._module.falls_back else [self._module.provider, "CPUExecutionProvider"]

    def io_binding(self) -> _GpuBinding:
        return _GpuBinding()

    def run_with_iobinding(self, binding: _GpuBinding, options: SimulatedOrt.RunOptions) -> None:
        assert options.entries["disable_synchronize_execution_providers"] == "1"
        # A graph replays the addresses and shapes of its first run, whatever is bound later.
        tensors, graph = dict(binding.tensors), options.entries["gpu_graph_id"]
        if graph != "-1":
            tensors = self._graphs.setdefault(graph, tensors)
        self._module.driver.enqueue(lambda: compute(self._module.driver, self._session, tensors))


class _GpuBinding:
    def __init__(self) -> None:
        self.tensors: dict[str, tuple[int, tuple[int, ...]]] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        assert (device, index) == ("cpu" if name == "rows" else "cuda", 0)
        self.tensors[name] = (address, tuple(shape))

    bind_output = bind_input
