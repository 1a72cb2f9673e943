"""Medians, spreads and percentiles, and the figures of rounds whose numbers are round."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from blt_edge.tools.profile.statistics import OTHER, Latency, Speculation, Spread, machine
from support.profiles import make_case, make_round


def test_spread() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread == Spread(2.0, 1.0, 3.0, 2.0, 1.0)
    assert spread.mean_and_deviation == "2.0 ± 1.0"
    assert Spread.of([1000.0, 2000.0, 6000.0]).mean_and_deviation == "3,000.0 ± 2,645.8"
    assert Spread.of([5.0]).deviation == 0
    assert spread.relative == 1.0
    assert str(spread) == "2 (1 to 3)"
    assert Spread.of([5.0]).relative == Spread.of([0.0, 0.0]).relative == 0


def test_percentiles() -> None:
    """Of 0 to 100, the p-th is p."""
    latency = Latency.of([float(value) for value in reversed(range(101))])
    assert latency == Latency(101, 0, 50, 50, 90, 95, 99, 100)
    latency = Latency.of([1.0, 2.0])
    assert (latency.p50, latency.p90, latency.p99) == pytest.approx((1.5, 1.9, 1.99))


def test_one_round() -> None:
    case = make_case()
    assert case.prefill.bytes_per_second == Spread(4.0, 4.0, 4.0, 4.0, 0.0)
    assert (case.prefill.chunks, case.prefill.chunk_ids) == (2, 3)
    assert case.prefill.milliseconds_per_chunk == pytest.approx(700)
    assert case.first_byte_milliseconds.median == 1200
    assert case.decode.bytes_per_second.median == pytest.approx(1.0)
    assert case.decode.milliseconds_per_byte.count == 2
    assert case.decode.inside_patch.count == case.decode.ending_patch.count == 1
    # Four patches began, BOS's among them; two ended in the prompt, the last one is open.
    assert case.decode.patches_per_second == pytest.approx(1 / 2.0)
    assert case.bytes_per_patch == pytest.approx(7 / 3)
    assert case.cost.positions == 1 + 4 + 1
    assert case.decode.speculation is None


def test_shares_add_up_and_leave_the_host_its_part() -> None:
    case = make_case()
    assert case.prefill.shares == pytest.approx(
        {"patcher": 0.2, "encoder": 0.15, "latent": 0.2, "decoder": 0.25, OTHER: 0.2}
    )
    # 2.2 seconds from the prompt's end.
    assert case.decode.shares["latent"] == pytest.approx(0.3 / 2.2)
    assert sum(case.decode.shares.values()) == pytest.approx(1)
    runs = {name: stage.calls_per_byte for name, stage in case.decode.stages.items()}
    assert runs == {"patcher": 1, "encoder": 1, "latent": 0.5, "decoder": 1}
    latent = case.decode.stages["latent"]
    assert (latent.milliseconds_per_call, latent.rows_per_call) == (pytest.approx(300), 1)


def test_rounds_together() -> None:
    decode = make_case(*(make_round(slower=slower) for slower in (1.0, 2.0, 4.0))).decode
    speed = decode.bytes_per_second
    assert (speed.low, speed.median, speed.high) == pytest.approx((0.25, 0.5, 1.0))
    assert decode.milliseconds_per_byte.count == 6
    assert decode.milliseconds_per_byte.max == pytest.approx(4000)


def test_drafts() -> None:
    one = make_round(rounds=2, drafted=8, accepted=6)
    decode = make_case(one, one, draft="auto").decode
    assert (decode.inside_patch, decode.ending_patch) == (None, None)
    assert decode.speculation == Speculation(16, 12, 4, acceptance=0.75, bytes_per_round=4.0)
    assert make_case(draft="auto").decode.speculation == Speculation(0, 0, 0, None, None)


def test_texts_that_came_at_once_or_have_no_patch() -> None:
    one = make_round(rounds=1)
    whole = replace(one, arrivals=one.arrivals[-1:])
    assert make_case(whole, draft="auto").decode.milliseconds_per_byte.p50 == pytest.approx(1000)
    case = make_case(make_round(patches=1))
    assert (case.bytes_per_patch, case.decode.patches_per_second) == (None, 0)


def test_the_record_is_its_json() -> None:
    case = make_case(draft="auto")
    document = json.loads(json.dumps(case.to_dict()))
    assert "rounds" not in document
    assert document["decode"]["milliseconds_per_byte"]["p50"] == pytest.approx(1000)
    assert document["decode"]["speculation"]["acceptance"] is None
    assert document["cost"]["ceiling_bytes_per_second"] == case.cost.ceiling_bytes_per_second


def test_names_of_cases() -> None:
    assert make_case(threads=None, draft="auto").name == "4 prompt bytes, draft auto"
    assert make_case(threads=1).name == "1 thread, 4 prompt bytes, draft none"
    assert machine().endswith(" cores")
