"""Repeated measurements in a few numbers, and a profile's record: what one case was like.

A case is its own JSON: times in milliseconds, speeds in bytes of text a second. Pure functions of what was
recorded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from ...runtime.host import processor_name
from ...runtime.manifest import Manifest
from .ceiling import Bandwidth, Cost, cost_of_a_byte
from .recorder import Recording, StageEvent

OTHER = "other"
"""What is left of the time: hashing, table rows, patching, caches, sampling, Python."""


@dataclass(frozen=True)
class Spread:
    """One quantity, measured in each round."""

    median: float
    low: float
    high: float
    mean: float
    deviation: float
    """Standard deviation of the sample; 0 for one measurement."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one measurement."""
        deviation = stdev(values) if len(values) > 1 else 0.0
        return cls(median(values), min(values), max(values), fmean(values), deviation)

    @property
    def mean_and_deviation(self) -> str:
        """As a profile shows a speed: "1,034.5 ± 12.3"."""
        return f"{self.mean:,.1f} ± {self.deviation:,.1f}"

    @property
    def relative(self) -> float:
        """From the smallest to the largest, as a share of the median; 0 when that is 0."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Latency:
    """A distribution of times, in the unit of its measurements."""

    count: int
    """Measurements."""
    min: float
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency:
        """Of at least one measurement; a percentile between two is interpolated."""
        low, p50, p90, p95, p99, high = np.percentile(values, (0, 50, 90, 95, 99, 100)).tolist()
        return cls(len(values), low, float(np.mean(values)), p50, p90, p95, p99, high)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def machine() -> str:
    """Processor and core count, as the operating system names them."""
    return f"{processor_name()}, {os.cpu_count()} cores"


# One case of a profile.


@dataclass(frozen=True)
class Run:
    """One combination of what was asked for, and the rounds that it was run for."""

    threads: int | None
    """CPU threads that it ran with; None on a GPU."""
    draft: str
    """Where guesses came from."""
    load_seconds: float
    first_run: float | None
    """Time of the very first generation after loading, over the median of the rounds; None in later cases."""
    other_load_cores: float | None
    """Processors that were busy with other things; None where unknown."""
    peak_resident_bytes: int | None
    """Most resident memory since loading, mapped files included."""
    peak_private_bytes: int | None
    """Most memory of it that belongs to no file."""
    rounds: tuple[Recording, ...]
    """What happened, round by round. Not in JSON."""


@dataclass(frozen=True)
class Prefill:
    bytes_per_second: Spread
    chunks: int
    """Passes over the stages that it took."""
    chunk_ids: int
    """Bytes, BOS included, of the longest of them."""
    milliseconds_per_chunk: float
    """Median of those that have as many."""
    shares: dict[str, float]
    """Share of the time by stage, and `OTHER`."""


@dataclass(frozen=True)
class StageRuns:
    """One stage while decoding."""

    calls_per_byte: float
    rows_per_call: float
    """Bytes, or patches in the latent stage, that a run reads."""
    milliseconds_per_call: float
    """Median."""


@dataclass(frozen=True)
class Speculation:
    """What drafting did, over all rounds together."""

    drafted: int
    """Bytes that were guessed."""
    accepted: int
    """Those of them that the model chose, too."""
    rounds: int
    """Drafts."""
    acceptance: float | None
    """Share of guessed bytes that were right; None when there were none."""
    bytes_per_round: float | None
    """Bytes that a draft brings: those accepted, and the one that the model chooses after them."""


@dataclass(frozen=True)
class Decode:
    """Decoding, from the first byte on."""

    bytes_per_second: Spread
    milliseconds_per_byte: Latency
    """Of single bytes after the first, over all rounds."""
    inside_patch: Latency | None
    """The part of it without a run of the latent stage; None when there is none, and where drafts bring
    bytes of several patches at once."""
    ending_patch: Latency | None
    """The part with one; None likewise."""
    shared_bytes: int
    """Bytes of those that drafts brought several at once: each counts with an even share of their time."""
    patches_per_second: float
    """Patches that ended, median of the rounds."""
    shares: dict[str, float]
    """Share of the time by stage, and `OTHER`."""
    stages: dict[str, StageRuns]
    """Those that ran."""
    speculation: Speculation | None
    """None without drafts."""


@dataclass(frozen=True)
class Case(Run):
    """What the rounds were like, and what memory allows at best."""

    prompt_bytes: int
    """Without BOS."""
    new_bytes: int
    """Bytes generated in a round; in the shortest one where they differ."""
    finish_reason: str
    prefill: Prefill
    first_byte_milliseconds: Spread
    """From the start until it was chosen."""
    decode: Decode
    bytes_per_patch: float | None
    """Of prompt and new bytes; None when no patch ended."""
    state_bytes: int
    """Memory of caches and recent states at the end."""
    cost: Cost
    """What a byte read, and the ceiling."""
    bandwidth: Bandwidth
    """Of as many threads."""
    ceiling_reached: float
    """Share of the ceiling that decoding reached."""

    @property
    def name(self) -> str:
        threads = "" if self.threads is None else f"{self.threads} thread{'s' * (self.threads != 1)}, "
        return f"{threads}{self.prompt_bytes} prompt bytes, draft {self.draft}"

    def to_dict(self) -> dict[str, Any]:
        document = asdict(replace(self, rounds=()))
        del document["rounds"]
        return document


def summarize(run: Run, manifest: Manifest, bandwidth: Bandwidth, caches: str = "float32") -> Case:
    """The figures of at least one round, each with a decoding step or more. caches: the engine's."""
    rounds, first = run.rounds, run.rounds[0]
    decode = _decode(run, list(manifest.stages))
    new_bytes = min(one.stats.new_bytes for one in rounds)
    bytes_per_patch = first.stats.bytes_per_patch or None
    state_bytes = max(one.stats.state_bytes for one in rounds)
    cost = cost_of_a_byte(
        manifest,
        positions=1 + first.stats.prompt_bytes + new_bytes // 2,
        bytes_per_patch=bytes_per_patch,
        calls_per_byte={name: stage.calls_per_byte for name, stage in decode.stages.items()},
        state_bytes=state_bytes,
        bandwidth=bandwidth.bytes_per_second,
        caches=caches,
    )
    return Case(
        **vars(run),
        prompt_bytes=first.stats.prompt_bytes,
        new_bytes=new_bytes,
        finish_reason=first.finish_reason,
        prefill=_prefill(rounds, list(manifest.stages)),
        first_byte_milliseconds=Spread.of([1000 * one.stats.first_byte_seconds for one in rounds]),
        decode=decode,
        bytes_per_patch=bytes_per_patch,
        state_bytes=state_bytes,
        cost=cost,
        bandwidth=bandwidth,
        ceiling_reached=decode.bytes_per_second.mean / cost.ceiling_bytes_per_second,
    )


def _prefill(rounds: Sequence[Recording], stages: Sequence[str]) -> Prefill:
    chunks = [chunk for one in rounds for chunk in one.prefill_chunks]
    longest = max(ids for ids, _ in chunks)
    return Prefill(
        bytes_per_second=Spread.of([one.stats.prompt_bytes / one.stats.prefill_seconds for one in rounds]),
        chunks=len(rounds[0].prefill_chunks),
        chunk_ids=longest,
        milliseconds_per_chunk=1000 * median(seconds for ids, seconds in chunks if ids == longest),
        shares=_shares(
            stages,
            [event for one in rounds for event in one.prefill_events],
            sum(one.stats.prefill_seconds for one in rounds),
        ),
    )


def _decode(run: Run, stages: Sequence[str]) -> Decode:
    rounds = run.rounds
    steps = sum(one.decode_steps for one in rounds)
    events = [event for one in rounds for event in one.decode_events]
    latencies = [latency for one in rounds for latency in one.byte_latencies()]
    inside = [1000 * latency.seconds for latency in latencies if not latency.latent]
    ending = [1000 * latency.seconds for latency in latencies if latency.latent]
    # A text so short that all of it came at once has only its mean.
    every = inside + ending or [1000 * one.decode_seconds / one.decode_steps for one in rounds]
    drafted = any(one.stats.rounds for one in rounds)
    runs = {}
    for name in stages:
        own = [event for event in events if event.stage == name]
        if own:
            typical = 1000 * median(event.seconds for event in own)
            runs[name] = StageRuns(len(own) / steps, sum(event.rows for event in own) / len(own), typical)
    return Decode(
        bytes_per_second=Spread.of([one.decode_steps / one.decode_seconds for one in rounds]),
        milliseconds_per_byte=Latency.of(every),
        inside_patch=Latency.of(inside) if inside and not drafted else None,
        ending_patch=Latency.of(ending) if ending and not drafted else None,
        shared_bytes=sum(one.shared_bytes for one in rounds),
        patches_per_second=median(one.decode_patches / one.decode_seconds for one in rounds),
        shares=_shares(stages, events, sum(one.stats.decode_seconds for one in rounds)),
        stages=runs,
        speculation=_speculation(rounds) if run.draft != "none" else None,
    )


def _shares(stages: Sequence[str], events: Sequence[StageEvent], seconds: float) -> dict[str, float]:
    spent = dict.fromkeys(stages, 0.0)
    for event in events:
        spent[event.stage] += event.seconds
    ran = {name: value / seconds for name, value in spent.items() if value > 0}
    return {**ran, OTHER: max(0.0, 1.0 - sum(ran.values()))}


def _speculation(rounds: Sequence[Recording]) -> Speculation:
    drafted, accepted, drafts = (
        sum(getattr(one.stats, name) for one in rounds) for name in ("drafted", "accepted", "rounds")
    )
    return Speculation(
        drafted=drafted,
        accepted=accepted,
        rounds=drafts,
        acceptance=accepted / drafted if drafted else None,
        bytes_per_round=(accepted + drafts) / drafts if drafts else None,
    )
