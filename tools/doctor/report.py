"""Everything about a machine that decides what blt-edge can do there, gathered once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .advice import Advice, advise
from .engines import Ask, ask
from .jetson import Jetson, read_jetson
from .machine import Memory, NvidiaDriver, Processor, System, read_driver, read_memory, read_processor
from .packages import ONNX_RUNTIMES, Engine, Gpu, Lookup, State, installed, missing_by_extra, versions

__all__ = ["Report", "examine"]

_CPU = "CPUExecutionProvider"
_TENSORRTS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """A machine, examined."""

    versions: dict[str, str | None]
    """Python and packages; None = not installed."""
    processor: Processor
    """What computes."""
    memory: Memory
    """What it computes in."""
    jetson: Jetson | None
    """None where it is none."""
    driver: NvidiaDriver
    """NVIDIA's, as the kernel has it."""
    state: State
    """What works."""
    bundle: dict[str, Any] | None
    """What a bundle would run from; None when none was given."""
    advice: tuple[Advice, ...]
    """What to install or set, and what for."""

    @property
    def cpu_works(self) -> bool:
        """Whether the path that needs no GPU does."""
        return self.state.cpu.works

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "cpu_works": self.cpu_works,
            "versions": self.versions,
            "processor": asdict(self.processor),
            "memory": asdict(self.memory),
            "jetson": self.jetson and self.jetson.to_dict(),
            "nvidia_driver": asdict(self.driver),
            "gpus": [asdict(gpu) for gpu in self.state.gpus],
            "gpu_error": self.state.gpu_error,
            "cuda": self.state.cuda,
            "engines": [{**asdict(engine), "works": engine.works} for engine in self.state.engines],
            "bundle": self.bundle,
            "advice": [asdict(piece) for piece in self.advice],
        }


def examine(
    bundle: Path | None = None,
    *,
    system: System | None = None,
    lookup: Lookup = installed,
    requirements: Iterable[str] | None = None,
    ask: Ask = ask,
    progress: Progress | None = None,
) -> Report:
    """Look at everything; with a bundle, at what it would run from. Raises nothing for what does not work.

    system, lookup, requirements, ask: where facts come from, this machine by default. progress(what is done).
    """
    system, say = system or System(), progress or (lambda what: None)
    jetson, driver = read_jetson(system), read_driver(system)
    say("asking NVIDIA's driver")
    gpus = ask("cuda")
    engines = [*_onnxruntime(ask, say), *_tensorrt(ask, say)]
    state = State(
        gpus=tuple(Gpu(**gpu) for gpu in gpus.facts.get("devices", ())),
        gpu_error=gpus.error,
        cuda=gpus.facts.get("cuda"),
        engines=tuple(engines),
        runtimes=tuple(name for name in ONNX_RUNTIMES if lookup(name) is not None),
    )
    facts = None
    if bundle is not None:
        say("looking at the bundle")
        facts = _bundle(ask, bundle, state)
    missing = missing_by_extra(lookup, requirements)
    return Report(
        versions=versions(lookup),
        processor=read_processor(system),
        memory=read_memory(system),
        jetson=jetson,
        driver=driver,
        state=state,
        bundle=facts,
        advice=tuple(advise(state, jetson, driver, lookup, missing)),
    )


def _onnxruntime(ask: Ask, say: Progress) -> list[Engine]:
    """Every execution provider that was compiled in, each tried."""
    say("asking ONNX Runtime")
    known = ask("providers")
    if known.error is not None:
        return [Engine("ONNX Runtime", _CPU, error=known.error)]
    version = str(known.facts.get("version"))
    engines = []
    # The one that everything else falls back to comes first.
    for name in sorted(known.facts.get("providers", ()), key=lambda name: name != _CPU):
        say(f"trying ONNX Runtime's {name}")
        answer = ask("provider", name)
        engines.append(_tried(version, name, answer.facts, answer.error, answer.said))
    if not any(engine.provider == _CPU for engine in engines):
        engines.append(Engine("ONNX Runtime", _CPU, version, error="this build has no CPU provider"))
    return engines


def _tried(version: str, name: str, facts: dict[str, Any], error: str | None, said: str) -> Engine:
    ran = tuple(facts.get("ran", ()))
    if error is None and facts.get("right") is not True:
        error = "a product of matrices came out wrong"
    elif error is None and name not in ran:
        where = f"ran on {', '.join(ran) or 'nothing'} instead"
        error = f"{where}: {said}" if said else where
        if name == "AzureExecutionProvider":
            error = f"{where}, as it should: it is for calls to remote services only"
    return Engine("ONNX Runtime", name, version, ran, error)


def _tensorrt(ask: Ask, say: Progress) -> list[Engine]:
    engines = []
    for target, title in _TENSORRTS.items():
        say(f"trying {title}")
        answer = ask("tensorrt", target)
        engines.append(Engine(title, None, answer.facts.get("version"), (), answer.error))
    return engines


def _bundle(ask: Ask, bundle: Path, state: State) -> dict[str, Any]:
    capability = state.gpus[0].compute_capability if state.gpus else ""
    answer = ask("bundle", str(bundle.resolve()), capability)
    return {"path": str(bundle), **answer.facts, "error": answer.error}
