"""The cost card against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blt_edge.tools.profile.cost import cost_card, embedding_bytes
from support.bundles import write_bundle
from support.profiles import STAGES, demo_manifest

ONCE = dict.fromkeys(STAGES, 1.0)


def card(manifest=None, **changes):
    settings = {
        "positions": 577,
        "bytes_per_patch": 4.0,
        "calls_per_byte": {**ONCE, "latent": 0.25},
        "state_bytes": 123,
        "bandwidth": 20e9,
    }
    return cost_card(manifest or demo_manifest(), **{**settings, **changes})


def test_the_demo_by_hand() -> None:
    cost = card()
    weights = {stage.stage: stage.weights for stage in cost.stages}
    # The patcher's embedding, 260 x 128 float32, is left out.
    assert weights == {
        "patcher": 1_873_920 - 133_120,
        "encoder": 1_622_016,
        "latent": 10_665_984,
        "decoder": 7_867_392,
    }
    # Keys and values in float32 x layers x heads x 32 x positions: 128 in a window, 577 / 4 patches.
    caches = {stage.stage: stage.cache for stage in cost.stages}
    assert caches == {
        "patcher": 2 * 4 * 2 * 4 * 32 * 128,
        "encoder": 2 * 4 * 1 * 3 * 32 * 128,
        "latent": 2 * 4 * 3 * 4 * 32 * 577 // 4,
        "decoder": 2 * 4 * 4 * 3 * 32 * 128 + 4 * 1536,
    }
    assert cost.weights_per_byte == 1_740_800 + 1_622_016 + 7_867_392 + 10_665_984 / 4
    assert cost.cache_per_byte == 262_144 + 98_304 + 399_360 + 443_136 / 4
    # One byte row and six hash rows of 192 float16.
    assert (cost.table_rows, cost.row_bytes, cost.tables) == (7, 384, 2688)
    assert cost.per_byte == cost.weights_per_byte + cost.cache_per_byte + 2688
    assert cost.ceiling == pytest.approx(20e9 / 14_769_984)


def test_early_in_a_text_windows_are_not_full() -> None:
    early = {stage.stage: stage.cache for stage in card(positions=10).stages}
    assert early["encoder"] == 2 * 4 * 1 * 3 * 32 * 10


def test_a_text_without_a_patch_reads_no_patches() -> None:
    latent = card(bytes_per_patch=None, calls_per_byte=ONCE).stages[2]
    assert (latent.stage, latent.cache) == ("latent", 0)


def test_stages_that_never_ran_cost_nothing() -> None:
    cost = card(calls_per_byte={"encoder": 1.0, "decoder": 1.0})
    assert [stage.stage for stage in cost.stages] == ["encoder", "decoder"]


def test_drafts_read_weights_for_several_bytes() -> None:
    whole, half = card(), card(calls_per_byte={**dict.fromkeys(STAGES, 0.5), "latent": 0.125})
    assert half.ceiling == pytest.approx(2 * whole.ceiling, rel=1e-3)


def test_the_embedding_is_the_patchers_own_width() -> None:
    manifest = demo_manifest()
    assert embedding_bytes(manifest) == 260 * 128 * 4
    stages = {name: spec for name, spec in manifest.stages.items() if name != "patcher"}
    assert embedding_bytes(replace(manifest, stages=stages)) == 0


def test_a_config_that_says_nothing_leaves_nothing_out(tmp_path) -> None:
    manifest = write_bundle(tmp_path / "bundle")
    assert embedding_bytes(manifest) == 0


def test_document() -> None:
    document = card().to_dict()
    assert list(document["stages"]) == list(STAGES)
    assert document["stages"]["latent"]["per_byte"] == pytest.approx((10_665_984 + 443_136) / 4)
    assert document["read_per_byte"] == card().per_byte
