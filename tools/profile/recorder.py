"""One generation as it happened: when each stage ran and when bytes came, and that as a timeline.

A timeline is in Chrome's trace format, which chrome://tracing and Perfetto read.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...runtime import BltModel, GenerationOptions, GenerationStats


@dataclass(frozen=True)
class StageEvent:
    """One run of a stage's graph."""

    stage: str
    start: float
    """`time.perf_counter` seconds."""
    seconds: float
    rows: int
    """Bytes, or patches in the latent stage, that it read."""


@dataclass(frozen=True)
class Arrival:
    """Bytes that came at once."""

    moment: float
    """`time.perf_counter` seconds."""
    count: int
    calls: int
    """Stage runs so far: bytes with the same number came out of the same ones."""


@dataclass(frozen=True)
class ByteLatency:
    seconds: float
    """With everything: stages, sampling, the host's work."""
    latent: bool
    """Whether the latent stage ran meanwhile, because a patch ended."""


@dataclass(frozen=True)
class Recording:
    """A generation that ended. Moments are `time.perf_counter` seconds."""

    start: float
    """When it was asked for."""
    events: tuple[StageEvent, ...]
    """Stage runs, in order."""
    arrivals: tuple[Arrival, ...]
    """Bytes, in order; those that came out of the same stage runs are one arrival."""
    stats: GenerationStats
    """The runtime's own figures."""
    finish_reason: str

    @property
    def prefilled(self) -> float:
        return self.start + self.stats.prefill_seconds

    @property
    def first_byte(self) -> float:
        return self.start + self.stats.first_byte_seconds

    @property
    def end(self) -> float:
        return self.prefilled + self.stats.decode_seconds

    @property
    def prefill_events(self) -> list[StageEvent]:
        return list(self.events[: self._prefill_runs])

    @property
    def decode_events(self) -> list[StageEvent]:
        return list(self.events[self._prefill_runs :])

    @cached_property
    def _prefill_runs(self) -> int:
        """How many: up to the decoder's run that takes the prompt's last byte.

        Not by the clock: the runtime starts its own a moment after ours, on a busy machine a long one.
        """
        unread = 1 + self.stats.prompt_bytes
        for count, event in enumerate(self.events, 1):
            unread -= event.rows if event.stage == "decoder" else 0
            if unread <= 0:
                return count
        return len(self.events)

    @property
    def prefill_chunks(self) -> list[tuple[int, float]]:
        """Ids and seconds of each pass over the stages that the prompt took, in order."""
        events = self.prefill_events
        first = [event for event in events if event.stage == events[0].stage]
        ends = [*(event.start for event in first[1:]), self.prefilled]
        return [(event.rows, end - event.start) for event, end in zip(first, ends, strict=True)]

    @property
    def decode_steps(self) -> int:
        """Bytes that were read after the prompt: all but the last, which nothing follows.

        The step that ended the text by itself is one, too.
        """
        return max(0, self.stats.new_bytes - (self.finish_reason != "eos"))

    @property
    def decode_seconds(self) -> float:
        """Time of those steps: from the first byte to the end."""
        return max(self.end - self.first_byte, 1e-9)

    @property
    def decode_patches(self) -> int:
        """Patches that ended after the prompt had been read."""
        prompt_patches = sum(event.rows for event in self.prefill_events if event.stage == "latent")
        # The runtime counts patches that began, the last one is open; drafts may run a patch more than once.
        return max(0, self.stats.text_patches - prompt_patches)

    def byte_latencies(self) -> Iterator[ByteLatency]:
        """One for each byte after the first.

        Without drafts from one step's beginning to the next one's: text comes later where a character has
        several bytes. With drafts from arrival to arrival, and bytes that came together share their time.
        """
        if self.stats.rounds:
            for before, arrival in zip(self.arrivals, self.arrivals[1:], strict=False):
                each = (arrival.moment - before.moment) / arrival.count
                runs = self.events[before.calls : arrival.calls]
                latent = any(event.stage == "latent" for event in runs)
                for _ in range(arrival.count):
                    yield ByteLatency(each, latent)
            return
        events = self.decode_events
        starts = [event.start for event in events if event.stage == events[0].stage]
        latents = [event.start for event in events if event.stage == "latent"]
        for start, end in zip(starts, [*starts[1:], self.end], strict=True):
            ran = bisect_left(latents, start) < bisect_left(latents, end)
            yield ByteLatency(end - start, ran)

    @property
    def shared_bytes(self) -> int:
        """Bytes whose latency is an even share of what several took."""
        if not self.stats.rounds:
            return 0
        return sum(arrival.count for arrival in self.arrivals[1:] if arrival.count > 1)


def record(model: BltModel, prompt: bytes, options: GenerationOptions) -> Recording:
    """Generate once and write down what happened. Raises what `BltModel.stream` does."""
    events: list[StageEvent] = []
    arrivals: list[Arrival] = []

    def observe(stage: str, start: float, seconds: float, rows: int) -> None:
        events.append(StageEvent(stage, start, seconds, rows))  # no more: it is inside what is timed

    model.observer = observe
    try:
        start = time.perf_counter()
        for chunk in model.stream(prompt, options):
            if chunk.data:
                arrivals.append(Arrival(time.perf_counter(), len(chunk.data), len(events)))
    finally:
        model.observer = None
    assert chunk.stats is not None
    assert chunk.finish_reason is not None
    return Recording(start, tuple(events), _merged(arrivals), chunk.stats, chunk.finish_reason)


def _merged(arrivals: list[Arrival]) -> tuple[Arrival, ...]:
    """A draft's bytes may come one by one, but they came out of one round: its last moment counts."""
    rounds = (list(group) for _, group in groupby(arrivals, key=lambda arrival: arrival.calls))
    return tuple(
        Arrival(group[-1].moment, sum(arrival.count for arrival in group), group[0].calls) for group in rounds
    )


# As a timeline.

_TRACKS = ("phases", "patcher", "encoder", "latent", "decoder", "host")
# Shorter gaps are the clock's own time.
_LEAST_GAP = 1e-6

TraceEvent = dict[str, Any]


def chrome_trace(recordings: Iterable[tuple[str, Recording]], about: dict[str, str]) -> dict[str, Any]:
    """The document, ready for JSON: each named recording a process, each stage a track of it.

    What is between stage runs is the host's. Times are in microseconds from the moment when the generation
    was asked for. about: what else to say of all of them.
    """
    events: list[TraceEvent] = []
    for process, (name, recording) in enumerate(recordings, 1):
        same = {"ph": "M", "pid": process, "ts": 0.0}
        events.append({"name": "process_name", **same, "tid": 0, "args": {"name": name}})
        for track, title in enumerate(_TRACKS, 1):
            events.append({"name": "thread_name", **same, "tid": track, "args": {"name": title}})
            events.append({"name": "thread_sort_index", **same, "tid": track, "args": {"sort_index": track}})
        events += [{**event, "pid": process} for event in timeline(recording)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def timeline(one: Recording) -> Iterator[TraceEvent]:
    """Events of one recording: phases, stage runs, what is between them, and the bytes."""

    def at(moment: float) -> float:
        return round(1e6 * (moment - one.start), 3)

    def span(track: str, name: str, start: float, end: float) -> TraceEvent:
        duration = round(1e6 * (end - start), 3)
        return {"name": name, "ph": "X", "tid": 1 + _TRACKS.index(track), "ts": at(start), "dur": duration}

    yield span("phases", "prefill", one.start, one.prefilled)
    yield span("phases", "decode", one.prefilled, one.end)
    for event in one.events:
        run = span(event.stage, event.stage, event.start, event.start + event.seconds)
        yield {**run, "args": {"patches" if event.stage == "latent" else "bytes": event.rows}}
    busy_until = one.start
    runs = sorted((event.start, event.start + event.seconds) for event in one.events)
    for start, end in [*runs, (one.end, one.end)]:
        if start - busy_until > _LEAST_GAP:
            yield span("host", "host", busy_until, start)
        busy_until = max(busy_until, end)
    for arrival in one.arrivals:
        name = "byte" if arrival.count == 1 else f"{arrival.count} bytes"
        moment = {"name": name, "ph": "i", "tid": 1 + _TRACKS.index("phases"), "ts": at(arrival.moment)}
        yield {**moment, "s": "t", "args": {"bytes": arrival.count}}
