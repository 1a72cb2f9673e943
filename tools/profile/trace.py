"""A timeline of each case's last round, in Chrome's trace format: chrome://tracing and Perfetto read it.

Each case is a process, each stage a track of it; what is between stage runs is the host's. Times are in
microseconds from the moment when the case's generation was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .measure import Profile
from .recorder import Round

__all__ = ["chrome_trace", "round_events"]

Event = dict[str, Any]

_TRACKS = ("phases", "patcher", "encoder", "latent", "decoder", "host")
# Shorter gaps are the clock's own time.
_LEAST_GAP = 1e-6


def chrome_trace(profile: Profile) -> dict[str, Any]:
    """The whole document, ready for JSON."""
    events: list[Event] = []
    for process, case in enumerate(profile.cases, 1):
        events.append(_named("process_name", process, 0, case.name))
        for track, name in enumerate(_TRACKS, 1):
            events.append(_named("thread_name", process, track, name))
            order = {**_event("thread_sort_index", "M", process, track), "args": {"sort_index": track}}
            events.append(order)
        events += round_events(case.last_round, process)
    other = {"model": profile.path, "engine": profile.engine, "machine": profile.machine["processor"]}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def round_events(one: Round, process: int = 1) -> list[Event]:
    """The events of one round."""
    return [*_phases(one, process), *_stages(one, process), *_gaps(one, process), *_bytes(one, process)]


def _phases(one: Round, process: int) -> Iterator[Event]:
    for name, start, end in (("prefill", one.start, one.prefilled), ("decode", one.prefilled, one.end)):
        yield _span(one, process, "phases", name, start, end - start)


def _stages(one: Round, process: int) -> Iterator[Event]:
    for event in one.events:
        span = _span(one, process, event.stage, event.stage, event.start, event.seconds)
        unit = "patches" if event.stage == "latent" else "bytes"
        yield {**span, "args": {unit: event.rows}}


def _gaps(one: Round, process: int) -> Iterator[Event]:
    at = one.start
    for start, end in [*_intervals(one), (one.end, one.end)]:
        if start - at > _LEAST_GAP:
            yield _span(one, process, "host", "host", at, start - at)
        at = max(at, end)


def _intervals(one: Round) -> Iterable[tuple[float, float]]:
    return sorted((event.start, event.start + event.seconds) for event in one.events)


def _bytes(one: Round, process: int) -> Iterator[Event]:
    for arrival in one.arrivals:
        name = "byte" if arrival.count == 1 else f"{arrival.count} bytes"
        moment = _event(name, "i", process, _track("phases"), _microseconds(arrival.moment - one.start))
        yield {**moment, "s": "t", "args": {"bytes": arrival.count}}


def _span(one: Round, process: int, track: str, name: str, start: float, seconds: float) -> Event:
    event = _event(name, "X", process, _track(track), _microseconds(start - one.start))
    return {**event, "dur": _microseconds(seconds)}


def _named(what: str, process: int, track: int, name: str) -> Event:
    return {**_event(what, "M", process, track), "args": {"name": name}}


def _event(name: str, phase: str, process: int, track: int, moment: float = 0.0) -> Event:
    return {"name": name, "ph": phase, "pid": process, "tid": track, "ts": moment}


def _track(name: str) -> int:
    return 1 + _TRACKS.index(name)


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)
