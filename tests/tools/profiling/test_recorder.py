"""What is read off a round, and how arrivals become rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blt_edge.tools.profile.recorder import Arrival, ByteLatency, _merged
from support.profiles import make_round


def test_phases() -> None:
    one = make_round()
    assert [event.stage for event in one.prefill_events][-1] == "decoder"
    assert (len(one.prefill_events), len(one.decode_events)) == (7, 7)
    assert (one.prefilled, one.first_byte, one.end) == pytest.approx((101.0, 101.2, 103.2))
    assert one.prompt_patches == 2


def test_chunks_end_where_the_next_one_begins() -> None:
    (first, first_seconds), (second, second_seconds) = make_round().prefill_chunks
    assert (first, second) == (3, 2)
    assert (first_seconds, second_seconds) == pytest.approx((0.7, 0.3))


def test_steps_without_drafts() -> None:
    one = make_round(slower=2.0)
    assert one.decode_steps == 2
    assert one.decode_seconds == pytest.approx(4.0)
    latencies = list(one.byte_latencies())
    assert [value.latent for value in latencies] == [False, True]
    assert [value.seconds for value in latencies] == pytest.approx([2.0, 2.0])
    assert one.shared_bytes == 0


def test_the_step_that_ends_the_text_counts() -> None:
    assert replace(make_round(), finish_reason="eos").decode_steps == 3


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
