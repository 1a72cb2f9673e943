"""Figures of rounds whose numbers are round."""

from __future__ import annotations

import json

import pytest
from blt_edge.tools.profile.statistics import OTHER, Speculation, Spread, figures
from support.profiles import STAGES, make_round


def test_one_round() -> None:
    found = figures([make_round()], STAGES, drafting=False)
    assert found.prefill == Spread(4.0, 4.0, 4.0)
    assert (found.prefill_chunks, found.chunk_ids) == (2, 3)
    assert found.seconds_per_chunk == pytest.approx(0.7)
    assert found.first_byte.median == 1.2
    assert found.decode.median == pytest.approx(1.0)
    assert found.byte_latency.count == 2
    assert found.inside_patch is not None
    assert found.ending_patch is not None
    assert (found.inside_patch.count, found.ending_patch.count) == (1, 1)
    # Four patches began, BOS's among them; two ended in the prompt, the last one is open.
    assert found.patches_per_second == pytest.approx(1 / 2.0)
    assert found.bytes_per_patch == pytest.approx(7 / 3)
    assert found.positions == 1 + 4 + 1
    assert found.speculation is None


def test_shares_add_up_and_leave_the_host_its_part() -> None:
    found = figures([make_round()], STAGES, drafting=False)
    assert found.prefill_shares == pytest.approx(
        {"patcher": 0.2, "encoder": 0.15, "latent": 0.2, "decoder": 0.25, OTHER: 0.2}
    )
    # 2.2 seconds from the prompt's end.
    assert found.decode_shares["latent"] == pytest.approx(0.3 / 2.2)
    assert sum(found.decode_shares.values()) == pytest.approx(1)


def test_runs_for_a_byte() -> None:
    found = figures([make_round()], STAGES, drafting=False)
    runs = {name: stage.calls_per_byte for name, stage in found.stages.items()}
    assert runs == {"patcher": 1, "encoder": 1, "latent": 0.5, "decoder": 1}
    assert found.stages["latent"].seconds_per_call == pytest.approx(0.3)
    assert found.stages["latent"].rows_per_call == 1


def test_several_rounds() -> None:
    found = figures([make_round(slower=slower) for slower in (1.0, 2.0, 4.0)], STAGES, drafting=False)
    assert (found.decode.low, found.decode.median, found.decode.high) == pytest.approx((0.25, 0.5, 1.0))
    assert found.byte_latency.count == 6
    assert found.byte_latency.max == pytest.approx(4.0)


def test_drafts() -> None:
    one = make_round(rounds=2, drafted=8, accepted=6)
    found = figures([one, one], STAGES, drafting=True)
    speculation = found.speculation
    assert (found.inside_patch, found.ending_patch) == (None, None)
    assert speculation == Speculation(drafted=16, accepted=12, rounds=4)
    assert (speculation.acceptance, speculation.bytes_per_round) == (0.75, 4.0)


def test_drafts_that_never_came() -> None:
    speculation = figures([make_round()], STAGES, drafting=True).speculation
    assert speculation is not None
    assert (speculation.acceptance, speculation.bytes_per_round) == (None, None)


def test_a_text_that_came_at_once_has_its_mean() -> None:
    one = make_round(rounds=1)
    whole = type(one)(one.start, one.events, one.arrivals[-1:], one.stats, "length")
    assert figures([whole], STAGES, drafting=True).byte_latency.p50 == pytest.approx(1.0)


def test_document_is_json() -> None:
    document = figures([make_round()], STAGES, drafting=True).to_dict()
    assert json.loads(json.dumps(document))["decode"]["milliseconds_per_byte"]["p50"] == pytest.approx(1000)
