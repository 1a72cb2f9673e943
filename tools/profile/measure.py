"""Profiling a bundle: every combination of what was asked for, one after the other, on this machine.

Loads once for each number of threads, since an engine's threads are fixed then. Memory bandwidth is measured
last: its buffer must not count as the model's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import BltError, OptionError
from ...runtime.host import OtherLoad, PrivatePeak, describe_machine, peak_resident, reset_peak_resident
from ...runtime.manifest import Manifest, load_manifest
from ..doctor.jetson import Jetson, read_jetson
from ..doctor.machine import System
from .bandwidth import Bandwidth, measure_bandwidth, measure_device_bandwidth
from .cost import CostCard, cost_card
from .recorder import ByteLatency, Round, record_round
from .statistics import Figures, figures

if TYPE_CHECKING:
    from ...runtime import BltModel, GenerationOptions

__all__ = ["Case", "Profile", "ProfileError", "ProfileOptions", "profile"]

_MOST = 1_000_000_000

Progress = Callable[[str], None]


class ProfileError(BltError):
    """There is nothing to measure: the model ends the text at once."""


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure. Each combination of threads, prompt_bytes and drafts is a case."""

    device: str = "auto"
    """Where to run, as in `BltModel.load`."""
    threads: tuple[int | None, ...] = (None,)
    """CPU threads; None leaves it to the engine."""
    prompt_bytes: tuple[int, ...] = (512,)
    """Bytes of the prompt."""
    new_bytes: int = 128
    """Bytes to generate, greedily."""
    drafts: tuple[str, ...] = ("none",)
    """Sources of guesses, as `GenerationOptions.draft` has them."""
    draft_length: int | None = None
    """Bytes guessed at once; None leaves it to the runtime."""
    warmup: int = 1
    """Rounds before those that count."""
    repeat: int = 5
    """Rounds that count."""

    def __post_init__(self) -> None:
        """Raises OptionError for a value out of range."""
        single = {"new_bytes": 2, "warmup": 0, "repeat": 1}
        for name, least in single.items():
            _check_whole(name, getattr(self, name), least)
        for name in ("threads", "prompt_bytes", "drafts"):
            if not getattr(self, name):
                raise OptionError(f"{name}: got nothing; give at least one value")
        for value in self.prompt_bytes:
            _check_whole("prompt_bytes", value, 1)
        for threads in self.threads:
            if threads is not None:
                _check_whole("threads", threads, 1, 1024)

    def generation(self, draft: str) -> GenerationOptions:
        """The generation of a case. Raises OptionError for a draft or a draft length that there is not."""
        from ...runtime import GenerationOptions

        return GenerationOptions(max_new_bytes=self.new_bytes, draft=draft, draft_length=self.draft_length)


@dataclass(frozen=True)
class Case:
    """One combination, measured."""

    threads: int | None
    """Threads as asked for."""
    draft: str
    """Where guesses came from."""
    figures: Figures
    """What the rounds were like."""
    cost: CostCard
    """What a byte read, and the ceiling."""
    bandwidth: Bandwidth
    """Of as many threads."""
    load_seconds: float
    """Time to load the bundle."""
    first_run: float | None
    """Time of the very first generation after loading, over the median of the rounds; None in later cases."""
    other_load: float | None
    """Processors that were busy with other things; None where unknown."""
    peak_resident: int | None
    """Most resident memory since loading, mapped files included, in bytes."""
    peak_private: int | None
    """Most memory of it that belongs to no file."""
    byte_latencies: tuple[ByteLatency, ...]
    """Of single bytes, of all rounds."""
    last_round: Round
    """The last round, for a trace."""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        threads = "threads not limited" if self.threads is None else f"{self.threads} threads"
        threads = "1 thread" if self.threads == 1 else threads
        return f"{threads}, {self.figures.prompt_bytes} prompt bytes, draft {self.draft}"

    @property
    def ceiling_reached(self) -> float:
        """Share of the ceiling that decoding reached."""
        return self.figures.decode.median / self.cost.ceiling

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "threads": self.threads,
            "draft": self.draft,
            **self.figures.to_dict(),
            "cost": self.cost.to_dict(),
            "bandwidth": self.bandwidth.to_dict(),
            "ceiling_reached": self.ceiling_reached,
            "load_seconds": self.load_seconds,
            "first_run": self.first_run,
            "other_load_cores": self.other_load,
            "peak_resident_bytes": self.peak_resident,
            "peak_private_bytes": self.peak_private,
        }


@dataclass(frozen=True)
class Profile:
    """All cases of a bundle."""

    path: str
    """The bundle's directory as it was given."""
    manifest: Manifest
    """Its description."""
    engine: str
    """What it ran from."""
    prefill_chunk: int
    """Bytes that one pass over the stages takes at most."""
    options: ProfileOptions
    """As they were asked for."""
    text_bytes: int
    """Length of the text that prompts came from, which is repeated where it is too short."""
    machine: dict[str, Any]
    """Where it was measured."""
    jetson: Jetson | None
    """The Jetson that it was measured on, as it was set; None where it was none."""
    peaks_reset: bool
    """Whether peak memory was that of each load alone."""
    cases: tuple[Case, ...]
    """In the order asked for: by threads, then prompt bytes, then drafts."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "model": self.path,
            "source": self.manifest.source.name,
            "engine": self.engine,
            "machine": {
                **{name: value for name, value in self.machine.items() if name != "threads"},
                "jetson": self.jetson and self.jetson.to_dict(),
            },
            "options": {**asdict(self.options), "temperature": 0.0},
            "prefill_chunk": self.prefill_chunk,
            "cases": [case.to_dict() for case in self.cases],
        }


def profile(
    bundle: str | Path, text: bytes, options: ProfileOptions | None = None, progress: Progress | None = None
) -> Profile:
    """Measure a bundle with prompts from the beginning of `text`.

    progress(what is being done). Raises OptionError (a value out of range, more positions than the model
    has, an empty text), ProfileError, and what loading and generating raise.
    """
    options = options or ProfileOptions()
    say = progress or (lambda what: None)
    manifest = load_manifest(bundle)
    _check(manifest, text, options)
    measured: list[_Measured] = []
    engine, chunk, reset, on_cpu = "", 0, True, True
    for index, threads in enumerate(options.threads):
        reset = reset_peak_resident() and reset if index else reset
        setting = _Setting(Path(bundle), threads, options, text, say)
        measured += setting.measure()
        engine, chunk, on_cpu = setting.engine, setting.prefill_chunk, setting.on_cpu
    say("measuring memory bandwidth")
    bandwidths = {
        threads: measure_bandwidth(threads) if on_cpu else measure_device_bandwidth()
        for threads in options.threads
    }
    return Profile(
        path=str(bundle),
        manifest=manifest,
        engine=engine,
        prefill_chunk=chunk,
        options=options,
        text_bytes=len(text),
        machine=describe_machine(),
        jetson=read_jetson(System()),
        peaks_reset=reset,
        cases=tuple(one.case(manifest, bandwidths[one.threads]) for one in measured),
    )


def _check_whole(name: str, value: object, least: int, most: int = _MOST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise OptionError(f"{name}: got {value!r}, a whole number from {least} to {most} is needed")


def _check(manifest: Manifest, text: bytes, options: ProfileOptions) -> None:
    if not text:
        raise OptionError("text: is empty; give a text of at least one byte")
    for draft in options.drafts:
        options.generation(draft)
    room = manifest.model.max_positions - 1 - options.new_bytes
    for value in options.prompt_bytes:
        if value > room:
            raise OptionError(
                f"prompt_bytes: got {value}, with {options.new_bytes} new bytes this model has positions for "
                f"{max(0, room)}; give less of one of them"
            )


# One number of threads.


@dataclass(frozen=True)
class _Measured:
    # A case without its bandwidth, which is measured when all models are gone.
    threads: int | None
    draft: str
    figures: Figures
    rounds: list[Round]
    load_seconds: float
    first_run: float | None
    other_load: float | None
    peak_resident: int | None
    peak_private: int | None

    def case(self, manifest: Manifest, bandwidth: Bandwidth) -> Case:
        figures = self.figures
        cost = cost_card(
            manifest,
            positions=figures.positions,
            bytes_per_patch=figures.bytes_per_patch,
            calls_per_byte={name: stage.calls_per_byte for name, stage in figures.stages.items()},
            state_bytes=figures.state_bytes,
            bandwidth=bandwidth.bytes_per_second,
        )
        return Case(
            threads=self.threads,
            draft=self.draft,
            figures=figures,
            cost=cost,
            bandwidth=bandwidth,
            load_seconds=self.load_seconds,
            first_run=self.first_run,
            other_load=self.other_load,
            peak_resident=self.peak_resident,
            peak_private=self.peak_private,
            byte_latencies=tuple(value for one in self.rounds for value in one.byte_latencies()),
            last_round=self.rounds[-1],
        )


class _Setting:
    """The bundle loaded with one number of threads, and its cases."""

    def __init__(
        self, bundle: Path, threads: int | None, options: ProfileOptions, text: bytes, say: Progress
    ) -> None:
        self._bundle, self._threads, self._options, self._text, self._say = (
            bundle,
            threads,
            options,
            text,
            say,
        )
        self.engine, self.prefill_chunk, self.on_cpu = "", 0, True

    def measure(self) -> list[_Measured]:
        """Load, and measure every case."""
        from ...runtime import BltModel

        self._say("loading" if self._threads is None else f"loading, threads: {self._threads}")
        with PrivatePeak() as private:
            started = time.perf_counter()
            model = BltModel.load(self._bundle, self._options.device, self._threads)
            loaded = time.perf_counter() - started
        self.engine, self.prefill_chunk = str(model.engine), model.limits.prefill_chunk
        self.on_cpu = model.engine.device == "CPU"
        self._private = private.bytes
        pairs = [(size, draft) for size in self._options.prompt_bytes for draft in self._options.drafts]
        return [
            self._case(model, size, draft, loaded, first=index == 0)
            for index, (size, draft) in enumerate(pairs)
        ]

    def _case(self, model: BltModel, size: int, draft: str, loaded: float, *, first: bool) -> _Measured:
        options = self._options
        prompt = (self._text * (size // len(self._text) + 1))[:size]
        generation = options.generation(draft)
        name = f"{size} prompt bytes, draft {draft}"
        # 1. Warm-up; memory is watched here, since watching costs time.
        with PrivatePeak() as private:
            warmed = []
            for number in range(options.warmup):
                self._say(f"{name}: warm-up {number + 1} of {options.warmup}")
                warmed.append(_round(model, prompt, generation))
        # 2. What counts.
        rounds = []
        with OtherLoad() as other:
            for number in range(options.repeat):
                self._say(f"{name}: round {number + 1} of {options.repeat}")
                rounds.append(_round(model, prompt, generation))
        with PrivatePeak() as afterwards:
            peak = peak_resident()
        self._private = max(filter(None, (self._private, private.bytes, afterwards.bytes)), default=None)
        return _Measured(
            threads=self._threads,
            draft=draft,
            figures=figures(rounds, model.manifest.stages, drafting=draft != "none"),
            rounds=rounds,
            load_seconds=loaded,
            first_run=_first_run([*warmed, *rounds]) if first else None,
            other_load=other.cores,
            peak_resident=peak,
            peak_private=self._private,
        )


def _round(model: BltModel, prompt: bytes, options: GenerationOptions) -> Round:
    one = record_round(model, prompt, options)
    if one.decode_steps < 1 or one.stats.new_bytes < 1:
        raise ProfileError(
            f"the model ended the text after {one.stats.new_bytes} bytes, too few to time; "
            "take another --text or --prompt-bytes"
        )
    return one


def _first_run(rounds: list[Round]) -> float | None:
    """Time of the first round over the median of the others; None when there are no others."""
    from statistics import median

    seconds = list(_total_seconds(rounds))
    return seconds[0] / median(seconds[1:]) if len(seconds) > 1 else None


def _total_seconds(rounds: list[Round]) -> Iterator[float]:
    for one in rounds:
        yield one.stats.prefill_seconds + one.stats.decode_seconds
