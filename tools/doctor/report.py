"""Everything about a machine that decides what blt-edge can do there, gathered once, and what is missing.

What to do about that comes as commands to copy.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import requirement
from .machine import (
    Jetson,
    MachineMemory,
    NvidiaDriver,
    System,
    read_driver,
    read_jetson,
    read_memory,
)
from .processor import Processor, read_processor
from .raspberry_pi import RaspberryPi, read_raspberry_pi
from .software import (
    Ask,
    Lookup,
    Software,
    ask,
    installed,
    missing_by_extra,
    telemetry,
    try_software,
    versions,
)
from .storage import Storage, find_storage


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


@dataclass(frozen=True)
class MachineReport:
    versions: dict[str, str | None]
    """Python and packages; None = not installed."""
    processor: Processor
    memory: MachineMemory
    jetson: Jetson | None
    """None where it is none."""
    raspberry_pi: RaspberryPi | None
    """None where it is none."""
    driver: NvidiaDriver
    """NVIDIA's, as the kernel has it."""
    telemetry: str
    """ONNX Runtime's: "off" or "on", and the variable that says so."""
    software: Software
    bundle: dict[str, Any] | None
    """What a bundle would run from; None when none was given."""
    storage: Storage | None
    """What the bundle lies on; None when none was given, or it is not known."""
    advice: tuple[Advice, ...]
    """What to install or set, and what for."""

    @property
    def cpu_works(self) -> bool:
        """Whether the path that needs no GPU does."""
        return self.software.cpu.works

    def to_dict(self) -> dict[str, Any]:
        return {
            "cpu_works": self.cpu_works,
            "versions": self.versions,
            "processor": asdict(self.processor),
            "memory": asdict(self.memory),
            "jetson": self.jetson and self.jetson.to_dict(),
            "raspberry_pi": self.raspberry_pi and self.raspberry_pi.to_dict(),
            "nvidia_driver": asdict(self.driver),
            "gpus": [asdict(gpu) for gpu in self.software.gpus],
            "gpu_error": self.software.gpu_error,
            "cuda": self.software.cuda,
            "telemetry": self.telemetry,
            "engines": [{**asdict(engine), "works": engine.works} for engine in self.software.engines],
            "bundle": self.bundle,
            "storage": self.storage and asdict(self.storage),
            "advice": [asdict(piece) for piece in self.advice],
        }


def examine(
    bundle: Path | None = None,
    *,
    system: System | None = None,
    lookup: Lookup = installed,
    requirements: Iterable[str] | None = None,
    ask: Ask = ask,
    progress: Callable[[str], None] | None = None,
) -> MachineReport:
    """Look at everything; with a bundle, at what it would run from. Raises nothing for what does not work.

    system, lookup, requirements, ask: where facts come from, this machine by default. progress(what is done).
    """
    system, say = system or System(), progress or (lambda what: None)
    jetson, board, driver = read_jetson(system), read_raspberry_pi(system), read_driver(system)
    software = try_software(lookup, ask, say)
    facts = storage = None
    if bundle is not None:
        say("looking at the bundle")
        storage = find_storage(system, str(bundle.resolve()))
        capability = software.gpus[0].compute_capability if software.gpus else ""
        reply = ask("bundle", str(bundle.resolve()), capability)
        facts = {"path": str(bundle), **reply.facts, "error": reply.error}
    advice = _advise(software, jetson, driver, lookup, missing_by_extra(lookup, requirements))
    return MachineReport(
        versions=versions(lookup),
        processor=read_processor(system),
        memory=read_memory(system),
        jetson=jetson,
        raspberry_pi=board,
        driver=driver,
        telemetry=telemetry(),
        software=software,
        bundle=facts,
        storage=storage,
        advice=(*_about_raspberry_pi(board), *_about_storage(storage, bundle), *advice),
    )


# What to do.

# What an extra of the package is for. Extras for developers are left out.
_PURPOSES = {
    "export": "exporting, quantizing and building bundles",
    "validate": "comparing bundles with transformers",
    "plot": "pictures (--plot)",
    "serve": "the HTTP server",
}


def _advise(
    software: Software,
    jetson: Jetson | None,
    driver: NvidiaDriver,
    lookup: Lookup,
    missing: Mapping[str, Sequence[str]],
) -> Iterator[Advice]:
    """What is wrong first, then what is missing for a GPU, then what is only not there."""
    yield from _about_onnxruntime(software)
    if jetson is not None or driver.cards or driver.version or software.gpus:
        yield from _about_gpus(software, jetson, driver, lookup)
    if jetson is not None:
        for warning in jetson.warnings():
            reason, _, _ = warning.partition(": ")
            mode, _ = jetson.full_power_mode or (0, "")
            fixing = "sudo jetson_clocks" if "jetson_clocks" in warning else f"sudo nvpmodel -m {mode}"
            yield Advice("full speed", reason, (fixing,))
    for extra, purpose in _PURPOSES.items():
        packages = missing.get(extra, ())
        if packages:
            yield Advice(purpose, f"missing: {', '.join(packages)}", (f"pip install {requirement(extra)}",))


def _about_raspberry_pi(board: RaspberryPi | None) -> Iterator[Advice]:
    if board is not None and board.userland_bits == 32:
        reason = (
            f"programs have 32 bits here (the kernel is {board.kernel or 'unknown'}), for which ONNX Runtime "
            "has no wheels: write Raspberry Pi OS (64-bit) onto a card"
        )
        yield Advice("running bundles", reason, ("rpi-imager",), optional=False)
    for reason, commands in board.warnings() if board is not None else ():
        yield Advice("full speed", reason, commands)


def _about_storage(storage: Storage | None, bundle: Path | None) -> Iterator[Advice]:
    if storage is not None and bundle is not None and storage.kind == "SD card":
        reason = (
            f"the bundle is on an SD card ({storage.device}); a byte reads a few rows of it at random, for "
            "which an SSD is better (mounted as /srv/blt-edge in this command)"
        )
        # Whole: rsync takes what stands before a colon for another machine, and "." for what is in it.
        copying = f"rsync -a --exclude engines {shlex.quote(str(bundle.resolve()))} /srv/blt-edge/"
        yield Advice("reading tables", reason, (copying,))


def _about_onnxruntime(software: Software) -> Iterator[Advice]:
    purpose, runtimes, cpu = "running bundles", software.runtimes, software.cpu
    if len(runtimes) > 1:
        keep = next((name for name in runtimes if "gpu" in name), runtimes[0])
        reason = (
            f"{' and '.join(runtimes)} are both installed: they overwrite each other's files, and what was "
            "installed last wins"
        )
        commands = (f"pip uninstall -y {' '.join(runtimes)}", f"pip install {keep}")
        yield Advice(purpose, reason, commands, optional=cpu.works)
    elif not cpu.works:
        command = (
            "pip install --force-reinstall onnxruntime" if runtimes else f"pip install {requirement('cpu')}"
        )
        yield Advice(purpose, cpu.error or "", (command,), optional=False)


def _about_gpus(
    software: Software, jetson: Jetson | None, driver: NvidiaDriver, lookup: Lookup
) -> Iterator[Advice]:
    on_gpu = "running on the GPU"
    if lookup("cuda-bindings") is None:
        # They follow CUDA's number: JetPack 6 has CUDA 12, 7 has 13.
        release = (jetson.l4t or "").split(".")[0] if jetson is not None else ""
        wanted = "" if not release.isdecimal() else "12.6,<13" if int(release) < 38 else "13.0,<14"
        command = f"pip install 'cuda-bindings>={wanted or '12.6'}'"
        yield Advice(on_gpu, "the package cuda-bindings is missing", (command,))
    elif not software.gpus:
        error = software.gpu_error or "the driver shows no GPU"
        if jetson is not None:
            command = "sudo apt-get install --reinstall nvidia-l4t-cuda nvidia-l4t-core"
            yield Advice(on_gpu, error, (command,))
        elif driver.version is None:
            reason = f"there is an NVIDIA card, but its driver is not loaded ({error})"
            yield Advice(on_gpu, reason, ("sudo ubuntu-drivers install", "sudo reboot"))
        else:
            reason = f"driver {driver.version} is loaded, but gives programs no GPU ({error})"
            yield Advice(on_gpu, reason, ("nvidia-smi", "sudo reboot"))
    yield from _about_tensorrt(software, jetson)
    cuda = software.engine("ONNX Runtime", "CUDAExecutionProvider")
    if jetson is None and software.gpus and (cuda is None or not cuda.works):
        reason = "this ONNX Runtime was built without CUDA" if cuda is None else cuda.error or ""
        names = " ".join(software.runtimes) or "onnxruntime"
        commands = (f"pip uninstall -y {names}", f"pip install {requirement('gpu')}")
        yield Advice("ONNX Runtime on the GPU", reason, commands)


def _about_tensorrt(software: Software, jetson: Jetson | None) -> Iterator[Advice]:
    tensorrt, rtx = software.engine("TensorRT"), software.engine("TensorRT-RTX")
    if tensorrt is None or tensorrt.works or (jetson is None and rtx is not None and rtx.works):
        return
    reason, _, _ = (tensorrt.error or "").partition(": on a Jetson")  # the error brings a remedy along
    commands: tuple[str, ...] = (f"pip install {requirement('tensorrt-rtx')}",)
    if jetson is not None and "libnvdla_compiler" in reason:
        # TensorRT 10.3 needs it even where no DLA is used, and some makers' systems leave it out.
        commands = ("sudo apt-get install nvidia-l4t-dla-compiler",)
    elif jetson is not None:
        made = "when it was made with --system-site-packages"
        reason += f"; a virtual environment sees JetPack's TensorRT only {made}"
        commands = ("sudo apt-get install python3-libnvinfer", "bash tools/jetson/install.sh")
    yield Advice("TensorRT engines", reason, commands)
