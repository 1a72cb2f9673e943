"""What is read off a recording, how arrivals become rounds, and what chrome://tracing asks of a timeline."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.tools.profile.recorder import Arrival, ByteLatency, _merged, chrome_trace, record, timeline
from support.profiles import make_round


@pytest.mark.parametrize("start", [100.0, 99.0])
def test_phases(start: float) -> None:
    """They do not depend on when the runtime's clock starts."""
    one = replace(make_round(), start=start)
    assert [event.stage for event in one.prefill_events][-1] == "decoder"
    assert (len(one.prefill_events), len(one.decode_events), one.decode_patches) == (7, 7, 1)


def test_chunks_end_where_the_next_one_begins() -> None:
    one = make_round()
    assert (one.prefilled, one.first_byte, one.end) == pytest.approx((101.0, 101.2, 103.2))
    ids, seconds = zip(*one.prefill_chunks, strict=True)
    assert (ids, seconds) == ((3, 2), pytest.approx((0.7, 0.3)))


def test_steps_without_drafts() -> None:
    one = make_round(slower=2.0)
    assert one.decode_steps == 2
    assert one.decode_seconds == pytest.approx(4.0)
    latencies = list(one.byte_latencies())
    assert [value.latent for value in latencies] == [False, True]
    assert [value.seconds for value in latencies] == pytest.approx([2.0, 2.0])
    assert one.shared_bytes == 0
    assert replace(one, finish_reason="eos").decode_steps == 3  # the step that ends the text counts


def test_drafted_bytes_share_their_time() -> None:
    arrivals = (Arrival(101.2, 1, 7), Arrival(102.2, 1, 10), Arrival(103.2, 4, 14))
    one = replace(make_round(rounds=1, drafted=4, accepted=3, new_bytes=6), arrivals=arrivals)
    latencies = list(one.byte_latencies())
    assert [value.seconds for value in latencies] == pytest.approx([1.0, *[0.25] * 4])
    assert latencies[-1] == ByteLatency(latencies[-1].seconds, True)
    assert not latencies[0].latent
    assert one.shared_bytes == 4


def test_bytes_out_of_the_same_runs_are_one_arrival() -> None:
    single = [Arrival(1.0, 1, 4), Arrival(2.0, 1, 8), Arrival(2.1, 2, 8), Arrival(3.0, 1, 12)]
    assert _merged(single) == (Arrival(1.0, 1, 4), Arrival(2.1, 3, 8), Arrival(3.0, 1, 12))
    assert _merged([]) == ()


def test_a_recording_is_what_the_model_generates(model: BltModel) -> None:
    text = b"It was the best of times, it was the worst of times"
    one = record(model, text, GenerationOptions(max_new_bytes=10, draft="none"))
    assert model.observer is None
    assert sum(arrival.count for arrival in one.arrivals) == one.stats.new_bytes
    assert len([event for event in one.decode_events if event.stage == "decoder"]) == one.decode_steps
    assert sum(event.rows for event in one.prefill_events if event.stage == "decoder") == len(text) + 1
    assert len(list(one.byte_latencies())) == one.decode_steps
    runs = {name: sum(event.stage == name for event in one.events) for name in one.stats.stage_calls}
    assert runs == one.stats.stage_calls


# The timeline.

TRACKS = {"phases": 1, "patcher": 2, "encoder": 3, "latent": 4, "decoder": 5, "host": 6}


def spans(track: str) -> list[tuple[float, float]]:
    """(start, duration) of what is on a track."""
    events = [event for event in timeline(make_round()) if event["tid"] == TRACKS[track]]
    return [(event["ts"], event["dur"]) for event in events if event["ph"] == "X"]


def test_every_stage_run_is_on_its_track() -> None:
    assert [len(spans(name)) for name in ("patcher", "encoder", "latent", "decoder")] == [4, 4, 2, 4]
    first, second = spans("latent")
    assert first == (200_000, 200_000)
    assert second[0] == pytest.approx(2_400_000)
    rows = {event["name"]: event["args"] for event in timeline(make_round()) if "args" in event}
    assert (rows["latent"], rows["decoder"]) == ({"patches": 1}, {"bytes": 1})


def test_the_host_has_what_is_between_so_that_the_whole_time_is_filled() -> None:
    gaps = [value for gap in spans("host") for value in gap]
    expected = [600_000, 100_000, 900_000, 300_000, 1_600_000, 600_000, 2_900_000, 300_000]
    assert gaps == pytest.approx(expected)
    busy = sum(seconds for name in list(TRACKS)[1:] for _, seconds in spans(name))
    assert busy == pytest.approx(sum(seconds for _, seconds in spans("phases")))


def test_bytes_are_moments() -> None:
    moments = [(event["ts"], event["s"]) for event in timeline(make_round()) if event["ph"] == "i"]
    assert moments == [(pytest.approx(moment), "t") for moment in (1_200_000, 2_200_000, 3_200_000)]


def test_a_document_has_a_process_for_each_recording() -> None:
    recordings = [("one", make_round()), ("two", make_round())]
    document = json.loads(json.dumps(chrome_trace(recordings, {"machine": "Abacus"})))
    assert document["otherData"] == {"machine": "Abacus"}
    names = defaultdict(list)
    for event in document["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "ts"} <= set(event)
        assert event["ph"] in "MXi"
        if event["ph"] == "M":
            names[event["name"]].append(event)
    assert [event["args"]["name"] for event in names["process_name"]] == ["one", "two"]
    assert {event["args"]["name"]: event["tid"] for event in names["thread_name"]} == TRACKS
    assert {event["pid"] for event in document["traceEvents"]} == {1, 2}
