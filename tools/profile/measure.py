"""Profiling a bundle: every combination of what was asked for, and reasons to read its figures with care.

Loads once for each number of threads, since an engine's threads are fixed then. Memory bandwidth is measured
last: its buffer must not count as the model's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from ...runtime.engines import MOST_THREADS
from ...runtime.errors import BltError, OptionError
from ...runtime.fields import checked_int
from ...runtime.host import OtherLoad, PrivatePeak, describe_machine, peak_resident, reset_peak_resident
from ...runtime.manifest import Manifest, load_manifest
from ...runtime.processors import usable_cores
from ..doctor.machine import Jetson, System, read_jetson
from ..doctor.raspberry_pi import RaspberryPi, read_raspberry_pi
from .ceiling import measure_bandwidth, measure_device_bandwidth
from .recorder import Recording, record
from .statistics import Case, Run, Spread, summarize

if TYPE_CHECKING:
    from ...runtime import BltModel, GenerationOptions

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
    """CPU threads; None as `BltModel.load` takes it."""
    prompt_bytes: tuple[int, ...] = (512,)
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
        for name, least in {"new_bytes": 2, "warmup": 0, "repeat": 1}.items():
            checked_int(name, getattr(self, name), least, _MOST)
        for name in ("threads", "prompt_bytes", "drafts"):
            if not getattr(self, name):
                raise OptionError(f"{name}: got nothing; give at least one value")
        for size in self.prompt_bytes:
            checked_int("prompt_bytes", size, 1, _MOST)
        for threads in self.threads:
            if threads is not None:
                checked_int("threads", threads, 1, MOST_THREADS)

    def generation(self, draft: str) -> GenerationOptions:
        """The generation of a case. Raises OptionError for a draft or a draft length that there is not."""
        from ...runtime import GenerationOptions

        return GenerationOptions(max_new_bytes=self.new_bytes, draft=draft, draft_length=self.draft_length)


@dataclass(frozen=True)
class Profile:
    """All cases of a bundle."""

    path: str
    """The bundle's directory as it was given."""
    manifest: Manifest
    engine: str
    """What it ran from."""
    prefill_chunk: int
    """Bytes that one pass over the stages takes at most."""
    options: ProfileOptions
    """As they were asked for."""
    text_bytes: int
    """Length of the text that prompts came from, which is repeated where it is too short."""
    machine: dict[str, Any]
    jetson: Jetson | None
    """The Jetson that it was measured on, as it was set; None where it was none."""
    raspberry_pi: RaspberryPi | None
    """The Raspberry Pi that it was measured on, as it was afterwards; None where it was none."""
    peaks_reset: bool
    """Whether peak memory was that of each load alone."""
    cases: tuple[Case, ...]
    """In the order asked for: by threads, then prompt bytes, then drafts."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.path,
            "source": self.manifest.source.name,
            "engine": self.engine,
            "machine": {
                **{name: value for name, value in self.machine.items() if name != "threads"},
                "jetson": self.jetson and self.jetson.to_dict(),
                "raspberry_pi": self.raspberry_pi and self.raspberry_pi.to_dict(),
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
    if not text:
        raise OptionError("text: is empty; give a text of at least one byte")
    for draft in options.drafts:
        options.generation(draft)
    room = manifest.model.max_positions - 1 - options.new_bytes
    for size in options.prompt_bytes:
        if size > room:
            raise OptionError(
                f"prompt_bytes: got {size}, with {options.new_bytes} new bytes this model has positions for "
                f"{max(0, room)}; give less of one of them"
            )
    settings: list[_Setting] = []
    reset = True
    for threads in options.threads:
        if settings:
            reset = reset_peak_resident() and reset
        settings.append(_measure(Path(bundle), threads, options, text, say))
    say("measuring memory bandwidth")
    cases: list[Case] = []
    for setting in settings:
        bandwidth = (
            measure_bandwidth(setting.runs[0].threads) if setting.on_cpu else measure_device_bandwidth()
        )
        cases += [summarize(run, manifest, bandwidth, setting.caches) for run in setting.runs]
    return Profile(
        path=str(bundle),
        manifest=manifest,
        engine=settings[-1].engine,
        prefill_chunk=settings[-1].prefill_chunk,
        options=options,
        text_bytes=len(text),
        machine=describe_machine(),
        jetson=read_jetson(System()),
        raspberry_pi=read_raspberry_pi(System()),
        peaks_reset=reset,
        cases=tuple(cases),
    )


# 1. One number of threads.


class _Setting(NamedTuple):
    runs: list[Run]
    engine: str
    prefill_chunk: int
    on_cpu: bool
    caches: str


def _measure(
    bundle: Path, threads: int | None, options: ProfileOptions, text: bytes, say: Progress
) -> _Setting:
    from ...runtime import BltModel

    say("loading" if threads is None else f"loading, threads: {threads}")
    with PrivatePeak() as private:
        started = time.perf_counter()
        model = BltModel.load(bundle, options.device, threads)
        loaded = time.perf_counter() - started
    most_private = private.bytes
    runs: list[Run] = []
    for size in options.prompt_bytes:
        prompt = (text * (size // len(text) + 1))[:size]
        for draft in options.drafts:
            generation = options.generation(draft)
            name = f"{size} prompt bytes, draft {draft}"
            # 1. Warm-up; memory is watched here, since watching costs time.
            with PrivatePeak() as private:
                warmed = _rounds(model, prompt, generation, options.warmup, f"{name}: warm-up", say)
            # 2. What counts.
            with OtherLoad() as other:
                rounds = _rounds(model, prompt, generation, options.repeat, f"{name}: round", say)
            with PrivatePeak() as afterwards:
                peak = peak_resident()
            most_private = max(filter(None, (most_private, private.bytes, afterwards.bytes)), default=None)
            seconds = [one.end - one.start for one in (*warmed, *rounds)]
            first_run = None if runs or len(seconds) < 2 else seconds[0] / median(seconds[1:])
            used = model.engine.threads
            runs.append(Run(used, draft, loaded, first_run, other.cores, peak, most_private, rounds))
    used_engine, chunk = model.engine, model.limits.prefill_chunk
    return _Setting(runs, str(used_engine), chunk, used_engine.device == "CPU", used_engine.caches)


def _rounds(
    model: BltModel, prompt: bytes, options: GenerationOptions, count: int, name: str, say: Progress
) -> tuple[Recording, ...]:
    rounds = []
    for number in range(1, count + 1):
        say(f"{name} {number} of {count}")
        one = record(model, prompt, options)
        if one.decode_steps < 1 or one.stats.new_bytes < 1:
            raise ProfileError(
                f"the model ended the text after {one.stats.new_bytes} bytes, too few to time; "
                "take another --text or --prompt-bytes"
            )
        rounds.append(one)
    return tuple(rounds)


# 2. Warnings.

_SPREAD = 0.10
_FIRST_RUN = 1.5
_OTHER_CORES = 0.2
_FEW_BYTES = 32

Warned = tuple[str, float, str]
"""What it is about (the same in every case that has it), how bad it is among those, and the line."""


def profile_warnings(profile: Profile) -> list[str]:
    """One line for each kind of reason to doubt figures; of several cases that have it, the worst is told."""
    lines = list(_about_all(profile))
    found = [(warned, case) for case in profile.cases for warned in case_warnings(case, profile)]
    for kind in dict.fromkeys(kind for (kind, _, _), _ in found):
        same = [(weight, line, case) for (other, weight, line), case in found if other == kind]
        _, line, case = max(same, key=lambda one: one[0])
        others = f" (and {len(same) - 1} more like it)" if len(same) > 1 else ""
        lines.append(f"{case.name}{others}: {line}" if len(profile.cases) > 1 else line)
    return lines


def _about_all(profile: Profile) -> Iterator[str]:
    if profile.jetson is not None:
        yield from profile.jetson.warnings()
    if profile.raspberry_pi is not None:
        yield from (reason for reason, _ in profile.raspberry_pi.warnings())
    cores = usable_cores()
    most = max((threads for threads in profile.options.threads if threads), default=0)
    if most > cores:
        yield f"{most} threads are more than the {cores} cores of this machine: they wait for each other"
    longest = max(profile.options.prompt_bytes)
    if longest > profile.text_bytes:
        yield (
            f"the text has {profile.text_bytes} bytes and is repeated to make prompts of {longest}: "
            "repeated text makes longer patches and better guesses than real text"
        )
    widened = [name for name, spec in profile.manifest.stages.items() if spec.precision == "fp16"]
    if widened:
        yield (
            f"{', '.join(widened)}: fp16 weights count as two bytes each, but a processor without float16 "
            "products reads them as float32, twice as much, so the ceiling is out of its reach"
        )
    if not profile.peaks_reset and len(profile.options.threads) > 1:
        yield "this kernel can't reset peak memory: later threads' figures include the earlier ones"
    first = profile.cases[0]
    cache, weights = first.bandwidth.cache_bytes, first.cost.weights
    if cache and weights <= cache:
        yield (
            f"all weights ({weights / 1e6:.1f} MB) fit the processor's caches ({cache / 1e6:.0f} MB): the "
            "ceiling, which is memory's, is not what limits this model"
        )


def case_warnings(case: Case, profile: Profile) -> Iterator[Warned]:
    yield from _unstable("decode", case.decode.bytes_per_second)
    yield from _unstable("prefill", case.prefill.bytes_per_second)
    load, first_run = case.other_load_cores, case.first_run
    if load is not None and load > _OTHER_CORES:
        yield "load", load, f"other programs kept {load:.1f} cores busy; measure again on a quiet machine"
    if first_run is not None and first_run > _FIRST_RUN:
        counted = "" if profile.options.warmup else ", and counts here, without --warmup"
        line = (
            f"the first run took {first_run:.1f} times as long as later ones (weights read from disk, "
            f"memory touched for the first time){counted}"
        )
        yield "first run", first_run, line
    used, trained = 1 + case.prompt_bytes + case.new_bytes, profile.manifest.model.trained_context
    if used > trained:
        line = (
            f"{used} positions are more than the {trained} the model was trained on: the speed is right, "
            "the text may not be"
        )
        yield "context", used, line
    made, asked = case.new_bytes, profile.options.new_bytes
    if made < asked:
        yield "ended", -made, f"the model ended the text after {made} of {asked} bytes"
    if made < _FEW_BYTES:
        yield "few", -made, f"{made} new bytes are few: patches and percentiles are left to chance"
    # Where caches hold everything, the ceiling is known not to count.
    if case.ceiling_reached > 1 and case.cost.weights > (case.bandwidth.cache_bytes or 0):
        line = (
            f"decoding was faster than the ceiling ({case.ceiling_reached:.0%}): part of the weights stayed "
            "in the processor's caches, or memory was busy while its bandwidth was measured"
        )
        yield "ceiling", case.ceiling_reached, line


def _unstable(name: str, speed: Spread) -> Iterator[Warned]:
    if speed.relative > _SPREAD:
        line = (
            f"{name} differs by {speed.relative:.0%} between rounds ({speed.low:,.1f} to {speed.high:,.1f} "
            "bytes/s); a quiet machine and more --repeat make it sure"
        )
        yield f"unstable {name}", speed.relative, line
