"""The timeline: what chrome://tracing and Perfetto ask of it."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from blt_edge.tools.profile.trace import chrome_trace, round_events
from support.profiles import make_case, make_profile, make_round

TRACKS = {"phases": 1, "patcher": 2, "encoder": 3, "latent": 4, "decoder": 5, "host": 6}


def spans(events, track: str):
    return [event for event in events if event["ph"] == "X" and event["tid"] == TRACKS[track]]


def test_every_stage_run_is_on_its_track() -> None:
    events = round_events(make_round())
    assert [len(spans(events, name)) for name in ("patcher", "encoder", "latent", "decoder")] == [4, 4, 2, 4]
    first, second = spans(events, "latent")
    assert (first["ts"], first["dur"], first["args"]) == (200_000, 200_000, {"patches": 2})
    assert second["ts"] == pytest.approx(2_400_000)
    assert spans(events, "decoder")[0]["args"] == {"bytes": 3}


def test_the_host_has_what_is_between() -> None:
    events = round_events(make_round())
    gaps = [(event["ts"], event["dur"]) for event in spans(events, "host")]
    flat = [value for gap in gaps for value in gap]
    expected = [600_000, 100_000, 900_000, 300_000, 1_600_000, 600_000, 2_900_000, 300_000]
    assert flat == pytest.approx(expected)


def test_stages_and_host_fill_the_whole_time() -> None:
    events = round_events(make_round())
    busy = sum(event["dur"] for name in list(TRACKS)[1:] for event in spans(events, name))
    assert busy == pytest.approx(sum(event["dur"] for event in spans(events, "phases")))


def test_bytes_are_moments() -> None:
    moments = [event for event in round_events(make_round()) if event["ph"] == "i"]
    assert [event["ts"] for event in moments] == pytest.approx([1_200_000, 2_200_000, 3_200_000])
    assert {event["s"] for event in moments} == {"t"}


def test_document() -> None:
    cases = (make_case(), make_case(threads=1))
    document = json.loads(json.dumps(chrome_trace(make_profile(*cases))))
    names = defaultdict(list)
    for event in document["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "ts"} <= set(event)
        assert event["ph"] in "MXi"
        if event["ph"] == "M":
            names[event["name"]].append(event)
    assert [event["args"]["name"] for event in names["process_name"]] == [case.name for case in cases]
    assert {event["args"]["name"]: event["tid"] for event in names["thread_name"]} == TRACKS
    assert {event["pid"] for event in document["traceEvents"]} == {1, 2}
