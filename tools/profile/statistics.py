"""Several readings of one quantity, in a few numbers; and the machine they were taken on, in one line.

Several rounds of the same generation, in figures. Pure functions of what was recorded.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from ...runtime.host import processor_name
from .recorder import Round, StageEvent

__all__ = ["Figures", "Latency", "Speculation", "Spread", "StageFigures", "figures", "machine"]


@dataclass(frozen=True)
class Spread:
    """Readings of one quantity in several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, smallest and largest of at least one reading."""
        return cls(statistics.median(values), min(values), max(values))

    @property
    def relative(self) -> float:
        """From the smallest to the largest, as a share of the median; 0 when that is 0."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"

    def to_dict(self) -> dict[str, float]:
        """For the JSON line."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Latency:
    """A distribution of times, in the unit of its readings."""

    count: int
    """Readings."""
    min: float
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency:
        """Of at least one reading; a percentile between two readings is interpolated."""
        low, p50, p90, p95, p99, high = np.percentile(values, (0, 50, 90, 95, 99, 100)).tolist()
        return cls(len(values), low, float(np.mean(values)), p50, p90, p95, p99, high)

    def scaled(self, factor: float) -> Latency:
        """In another unit."""
        values = {name: value * factor for name, value in asdict(self).items() if name != "count"}
        return Latency(self.count, **values)

    def to_dict(self) -> dict[str, float]:
        """For the JSON line."""
        return asdict(self)


def machine() -> str:
    """Processor and core count, as the operating system names them."""
    return f"{processor_name()}, {os.cpu_count()} cores"


OTHER = "other"
"""What is left of the time: hashing, table rows, patching, caches, sampling, Python."""


@dataclass(frozen=True)
class StageFigures:
    """One stage while decoding."""

    calls_per_byte: float
    """Runs for a byte of text."""
    rows_per_call: float
    """Bytes, or patches in the latent stage, that a run reads."""
    seconds_per_call: float
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

    @property
    def acceptance(self) -> float | None:
        """Share of guessed bytes that were right; None when there were none."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def bytes_per_round(self) -> float | None:
        """Bytes that a draft brings: those accepted, and the one that the model chooses after them."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "acceptance": self.acceptance, "bytes_per_round": self.bytes_per_round}


@dataclass(frozen=True)
class Figures:
    """What rounds of the same generation were like. Times in seconds, speeds in bytes of text a second."""

    prompt_bytes: int
    """Bytes read at once, without BOS."""
    new_bytes: int
    """Bytes generated in a round; in the shortest one where they differ."""
    finish_reason: str
    """Why the rounds ended."""
    prefill: Spread
    """Speed of reading the prompt."""
    prefill_chunks: int
    """Passes over the stages that it took."""
    chunk_ids: int
    """Bytes, BOS included, of the longest of them."""
    seconds_per_chunk: float
    """Median time of those that have as many."""
    first_byte: Spread
    """Time until the first byte was chosen."""
    decode: Spread
    """Speed after that."""
    byte_latency: Latency
    """Time of single bytes after the first, over all rounds."""
    inside_patch: Latency | None
    """The part of it without a run of the latent stage; None when there is none, and where drafts bring
    bytes of several patches at once."""
    ending_patch: Latency | None
    """The part with one; None likewise."""
    shared_bytes: int
    """Bytes of those that drafts brought several at once: each counts with an even share of their time."""
    patches_per_second: float
    """Patches that ended while decoding, median of the rounds."""
    bytes_per_patch: float | None
    """Of prompt and new bytes; None when no patch ended."""
    prefill_shares: dict[str, float]
    """Share of the prefill's time by stage, and `OTHER`."""
    decode_shares: dict[str, float]
    """The same for decoding."""
    stages: dict[str, StageFigures]
    """Stages that ran while decoding."""
    speculation: Speculation | None
    """None without drafts."""
    state_bytes: int
    """Memory of caches and recent states at the end."""

    @property
    def positions(self) -> int:
        """Where in the text a byte is decoded on average, BOS included."""
        return 1 + self.prompt_bytes + self.new_bytes // 2

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "prompt_bytes": self.prompt_bytes,
            "new_bytes": self.new_bytes,
            "finish_reason": self.finish_reason,
            "prefill": {
                "bytes_per_second": self.prefill.to_dict(),
                "chunks": self.prefill_chunks,
                "chunk_ids": self.chunk_ids,
                "milliseconds_per_chunk": 1000 * self.seconds_per_chunk,
                "shares": self.prefill_shares,
            },
            "first_byte_milliseconds": _milliseconds(self.first_byte),
            "decode": {
                "bytes_per_second": self.decode.to_dict(),
                "milliseconds_per_byte": self.byte_latency.scaled(1000).to_dict(),
                "inside_patch": self.inside_patch and self.inside_patch.scaled(1000).to_dict(),
                "ending_patch": self.ending_patch and self.ending_patch.scaled(1000).to_dict(),
                "shared_bytes": self.shared_bytes,
                "patches_per_second": self.patches_per_second,
                "shares": self.decode_shares,
                "stages": {
                    name: {
                        "calls_per_byte": stage.calls_per_byte,
                        "rows_per_call": stage.rows_per_call,
                        "milliseconds_per_call": 1000 * stage.seconds_per_call,
                    }
                    for name, stage in self.stages.items()
                },
                "speculation": self.speculation.to_dict() if self.speculation else None,
            },
            "bytes_per_patch": self.bytes_per_patch,
            "state_bytes": self.state_bytes,
        }


def figures(rounds: Sequence[Round], stages: Iterable[str], *, drafting: bool) -> Figures:
    """Figures of at least one round, each with a decoding step or more. stages: all there are, in order."""
    assert all(one.decode_steps > 0 for one in rounds)
    stats = rounds[0].stats
    names = list(stages)
    latencies = [value for one in rounds for value in one.byte_latencies()]
    inside = [value.seconds for value in latencies if not value.latent]
    ending = [value.seconds for value in latencies if value.latent]
    drafted = any(one.stats.rounds for one in rounds)
    chunks = [chunk for one in rounds for chunk in one.prefill_chunks]
    longest = max(ids for ids, _ in chunks)
    return Figures(
        prompt_bytes=stats.prompt_bytes,
        new_bytes=min(one.stats.new_bytes for one in rounds),
        finish_reason=rounds[0].finish_reason,
        prefill=Spread.of([one.stats.prompt_bytes / one.stats.prefill_seconds for one in rounds]),
        prefill_chunks=len(rounds[0].prefill_chunks),
        chunk_ids=longest,
        seconds_per_chunk=median(seconds for ids, seconds in chunks if ids == longest),
        first_byte=Spread.of([one.stats.first_byte_seconds for one in rounds]),
        decode=Spread.of([one.decode_steps / one.decode_seconds for one in rounds]),
        # A text so short that all of it came at once has only its mean.
        byte_latency=Latency.of(inside + ending or [one.decode_seconds / one.decode_steps for one in rounds]),
        inside_patch=Latency.of(inside) if inside and not drafted else None,
        ending_patch=Latency.of(ending) if ending and not drafted else None,
        shared_bytes=sum(one.shared_bytes for one in rounds),
        patches_per_second=median(_decode_patches(one) / one.decode_seconds for one in rounds),
        bytes_per_patch=_bytes_per_patch(rounds[0]),
        prefill_shares=_shares(
            names,
            [event for one in rounds for event in one.prefill_events],
            sum(one.stats.prefill_seconds for one in rounds),
        ),
        decode_shares=_shares(
            names,
            [event for one in rounds for event in one.decode_events],
            sum(one.stats.decode_seconds for one in rounds),
        ),
        stages=_stages(names, rounds),
        speculation=_speculation(rounds) if drafting else None,
        state_bytes=max(one.stats.state_bytes for one in rounds),
    )


def _decode_patches(one: Round) -> int:
    # The runtime counts patches that began, the last one is open; drafts may run a patch more than once.
    return max(0, one.stats.patches - 1 - one.prompt_patches)


def _bytes_per_patch(one: Round) -> float | None:
    patches = one.stats.patches - 1  # BOS is alone in one
    return (one.stats.prompt_bytes + one.stats.new_bytes) / patches if patches > 0 else None


def _shares(names: Sequence[str], events: Sequence[StageEvent], seconds: float) -> dict[str, float]:
    spent = dict.fromkeys(names, 0.0)
    for event in events:
        spent[event.stage] += event.seconds
    ran = {name: value / seconds for name, value in spent.items() if value > 0}
    return {**ran, OTHER: max(0.0, 1.0 - sum(ran.values()))}


def _stages(names: Sequence[str], rounds: Sequence[Round]) -> dict[str, StageFigures]:
    steps = sum(one.decode_steps for one in rounds)
    result = {}
    for name in names:
        events = [event for one in rounds for event in one.decode_events if event.stage == name]
        if events:
            rows = sum(event.rows for event in events)
            typical = median(event.seconds for event in events)
            result[name] = StageFigures(len(events) / steps, rows / len(events), typical)
    return result


def _speculation(rounds: Sequence[Round]) -> Speculation:
    return Speculation(
        drafted=sum(one.stats.drafted for one in rounds),
        accepted=sum(one.stats.accepted for one in rounds),
        rounds=sum(one.stats.rounds for one in rounds),
    )


def _milliseconds(spread: Spread) -> dict[str, float]:
    return {name: 1000 * value for name, value in spread.to_dict().items()}
