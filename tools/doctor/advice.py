"""What to install for what is missing, as commands to copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .jetson import Jetson
from .machine import NvidiaDriver
from .packages import Lookup, State

__all__ = ["Advice", "advise"]

# What an extra of the package is for. Extras for developers are left out.
_PURPOSES = {
    "export": "exporting, quantizing and building bundles",
    "validate": "comparing bundles with transformers",
    "plot": "pictures (--plot)",
    "serve": "the HTTP server",
}


@dataclass(frozen=True)
class Advice:
    """One thing that does not work, and what to do about it."""

    purpose: str
    """What it would be for."""
    reason: str
    """Why it does not work."""
    commands: tuple[str, ...] = ()
    """To be run one after the other."""
    optional: bool = True
    """Whether one can do without."""


def advise(
    state: State,
    jetson: Jetson | None,
    driver: NvidiaDriver,
    lookup: Lookup,
    missing: Mapping[str, Sequence[str]],
) -> Iterator[Advice]:
    """What is wrong first, then what is missing for a GPU, then what is only not there.

    missing: packages by extra, as `packages.missing_by_extra` gives them.
    """
    yield from _runtime(state)
    if jetson is not None or driver.cards or driver.version or state.gpus:
        yield from _gpu(state, jetson, driver, lookup)
    if jetson is not None:
        for warning in jetson.warnings():
            reason, _, _ = warning.partition(": ")
            command = "sudo jetson_clocks" if "jetson_clocks" in warning else _power_command(jetson)
            yield Advice("full speed", reason, (command,))
    for extra, purpose in _PURPOSES.items():
        packages = missing.get(extra, ())
        if packages:
            yield Advice(purpose, f"missing: {', '.join(packages)}", (f"pip install 'blt-edge[{extra}]'",))


def _power_command(jetson: Jetson) -> str:
    return f"sudo nvpmodel -m {(jetson.full_power_mode or (0, ''))[0]}"


def _runtime(state: State) -> Iterator[Advice]:
    runtimes = state.runtimes
    if len(runtimes) > 1:
        keep = next((name for name in runtimes if "gpu" in name), runtimes[0])
        yield Advice(
            "running bundles",
            f"{' and '.join(runtimes)} are both installed: they overwrite each other's files, and what was "
            "installed last wins",
            (f"pip uninstall -y {' '.join(runtimes)}", f"pip install {keep}"),
            optional=state.cpu.works,
        )
    elif not state.cpu.works:
        command = "pip install --force-reinstall onnxruntime" if runtimes else "pip install 'blt-edge[cpu]'"
        yield Advice("running bundles", state.cpu.error or "", (command,), optional=False)


# GPUs.


def _gpu(state: State, jetson: Jetson | None, driver: NvidiaDriver, lookup: Lookup) -> Iterator[Advice]:
    if lookup("cuda-bindings") is None:
        yield Advice("running on the GPU", "the package cuda-bindings is missing", (_bindings(jetson),))
    elif not state.gpus:
        yield _no_gpu(state, jetson, driver)
    tensorrt, rtx = state.engine("TensorRT"), state.engine("TensorRT-RTX")
    if tensorrt is not None and not tensorrt.works and (jetson is not None or rtx is None or not rtx.works):
        yield _tensorrt(tensorrt.error or "", jetson)
    cuda = state.engine("ONNX Runtime", "CUDAExecutionProvider")
    if jetson is None and state.gpus and (cuda is None or not cuda.works):
        reason = "this ONNX Runtime was built without CUDA" if cuda is None else cuda.error or ""
        names = " ".join(state.runtimes) or "onnxruntime"
        commands = (f"pip uninstall -y {names}", "pip install 'blt-edge[gpu]'")
        yield Advice("ONNX Runtime on the GPU", reason, commands)


def _bindings(jetson: Jetson | None) -> str:
    # They follow CUDA's number: JetPack 6 has CUDA 12, 7 has 13.
    if jetson is not None and jetson.l4t is not None and jetson.l4t.split(".")[0].isdecimal():
        major = 12 if int(jetson.l4t.split(".")[0]) < 38 else 13
        return f"pip install 'cuda-bindings>={'12.6' if major == 12 else '13.0'},<{major + 1}'"
    return "pip install 'cuda-bindings>=12.6'"


def _no_gpu(state: State, jetson: Jetson | None, driver: NvidiaDriver) -> Advice:
    purpose, error = "running on the GPU", state.gpu_error or "the driver shows no GPU"
    if jetson is not None:
        return Advice(purpose, error, ("sudo apt-get install --reinstall nvidia-l4t-cuda nvidia-l4t-core",))
    if driver.version is None:
        reason = f"there is an NVIDIA card, but its driver is not loaded ({error})"
        return Advice(purpose, reason, ("sudo ubuntu-drivers install", "sudo reboot"))
    reason = f"driver {driver.version} is loaded, but gives programs no GPU ({error})"
    return Advice(purpose, reason, ("nvidia-smi", "sudo reboot"))


def _tensorrt(error: str, jetson: Jetson | None) -> Advice:
    purpose = "TensorRT engines"
    if jetson is None:
        return Advice(purpose, _cause(error), ("pip install 'blt-edge[tensorrt-rtx]'",))
    return Advice(
        purpose,
        f"{_cause(error)}; a virtual environment sees JetPack's TensorRT only when it was made with "
        "--system-site-packages",
        ("sudo apt-get install python3-libnvinfer", "bash tools/jetson/install.sh"),
    )


def _cause(error: str) -> str:
    """An error without the remedy that it brings along."""
    return error.partition(": on a Jetson")[0]
