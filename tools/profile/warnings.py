"""Reasons not to trust figures, or to read them with care, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .bandwidth import available_cores
from .measure import Case, Profile
from .statistics import Spread

__all__ = ["Doubt", "case_doubts", "doubts"]

_SPREAD = 0.10
_FIRST_RUN = 1.5
_OTHER_CORES = 0.2
_FEW_BYTES = 32


@dataclass(frozen=True)
class Doubt:
    """One reason."""

    kind: str
    """What it is about: the same in every case that has it."""
    line: str
    """In words."""
    weight: float = 0.0
    """How bad it is, among those of its kind."""


def doubts(profile: Profile) -> list[str]:
    """One line for each kind of reason; of several cases that have it, the worst is told."""
    lines = list(_about_all(profile))
    found = [(doubt, case) for case in profile.cases for doubt in case_doubts(case, profile)]
    for kind in dict.fromkeys(doubt.kind for doubt, _ in found):
        same = [(doubt, case) for doubt, case in found if doubt.kind == kind]
        worst, case = max(same, key=lambda pair: pair[0].weight)
        others = f" (and {len(same) - 1} more like it)" if len(same) > 1 else ""
        where = f"{case.name}{others}: " if len(profile.cases) > 1 else ""
        lines.append(where + worst.line)
    return lines


def _about_all(profile: Profile) -> Iterator[str]:
    if profile.jetson is not None:
        yield from profile.jetson.warnings()
    cores = available_cores()
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
    cache = profile.cases[0].bandwidth.cache_bytes
    weights = sum(stage.weights for stage in profile.cases[0].cost.stages)
    if cache and weights <= cache:
        yield (
            f"all weights ({weights / 1e6:.1f} MB) fit the processor's caches ({cache / 1e6:.0f} MB): the "
            "ceiling, which is memory's, is not what limits this model"
        )


def case_doubts(case: Case, profile: Profile) -> Iterator[Doubt]:
    """What is special about one case."""
    figures = case.figures
    yield from _unstable("decode", figures.decode)
    yield from _unstable("prefill", figures.prefill)
    if case.other_load is not None and case.other_load > _OTHER_CORES:
        busy = f"other programs kept {case.other_load:.1f} cores busy; measure again on a quiet machine"
        yield Doubt("load", busy, case.other_load)
    if case.first_run is not None and case.first_run > _FIRST_RUN:
        counted = "" if profile.options.warmup else ", and counts here, without --warmup"
        yield Doubt(
            "first run",
            f"the first run took {case.first_run:.1f} times as long as later ones (weights read from disk, "
            f"memory touched for the first time){counted}",
            case.first_run,
        )
    used = 1 + figures.prompt_bytes + figures.new_bytes
    trained = profile.manifest.model.trained_context
    if used > trained:
        yield Doubt(
            "context",
            f"{used} positions are more than the {trained} the model was trained on: the speed is right, "
            "the text may not be",
            used,
        )
    yield from _few_bytes(case, profile.options.new_bytes)
    # Where caches hold everything, the ceiling is known not to count.
    cache, weights = case.bandwidth.cache_bytes or 0, sum(stage.weights for stage in case.cost.stages)
    if case.ceiling_reached > 1 and weights > cache:
        yield Doubt(
            "ceiling",
            f"decoding was faster than the ceiling ({case.ceiling_reached:.0%}): part of the weights stayed "
            "in the processor's caches, or memory was busy while its bandwidth was measured",
            case.ceiling_reached,
        )


def _unstable(name: str, speed: Spread) -> Iterator[Doubt]:
    if speed.relative > _SPREAD:
        yield Doubt(
            f"unstable {name}",
            f"{name} differs by {speed.relative:.0%} between rounds ({speed.low:,.1f} to {speed.high:,.1f} "
            "bytes/s); a quiet machine and more --repeat make it sure",
            speed.relative,
        )


def _few_bytes(case: Case, asked: int) -> Iterator[Doubt]:
    made = case.figures.new_bytes
    if made < asked:
        yield Doubt("ended", f"the model ended the text after {made} of {asked} bytes", -made)
    if made < _FEW_BYTES:
        yield Doubt("few", f"{made} new bytes are few: patches and percentiles are left to chance", -made)
