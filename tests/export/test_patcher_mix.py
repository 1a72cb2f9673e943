"""Mixes of 4 and 8 bits in the patcher: how one is chosen, a tiny model searched whole, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from blt_edge.calibration.data import choose_windows, open_texts
from blt_edge.export import export_checkpoint
from blt_edge.export.build_ort import block_bits, build_engine
from blt_edge.export.patcher_mix import MixError, MixFigures, longest_head
from blt_edge.export.quality import tolerances_of
from blt_edge.export.quantize import QuantizationOptions, quantize_bundle
from blt_edge.graphs.quantize import linear_products
from blt_edge.graphs.stages import build_stage
from blt_edge.runtime.errors import OptionError
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.model import BltModel
from hypothesis import given
from hypothesis import strategies as st
from support.quantized import BLOCKY, config_of
from support.random_models import write_random_model

TEXT = (Path(__file__).parents[1] / "data" / "alice.txt").read_bytes()[1000:7000]
SHARES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)


# 1. The rule.


def chosen(shares: Sequence[tuple[float, float]], target: float) -> tuple[MixFigures, list[MixFigures]]:
    """What the rule takes where so many matrices in 4 bits have these shares, and what it asked for."""
    told: list[MixFigures] = []

    def measure(count: int, confirm: bool) -> MixFigures:
        first, second = shares[count]
        return MixFigures(count, len(shares) - 1, 100 - count, first, 2.0, second if confirm else None)

    return longest_head(len(shares) - 1, measure, target, told.append), told


@given(SHARES, st.floats(0.01, 1))
def test_what_is_chosen_reached_the_target_twice(shares: list[tuple[float, float]], target: float) -> None:
    if min(shares[0]) < target:
        with pytest.raises(MixError, match="is out of reach: with the whole patcher in 8 bits"):
            chosen(shares, target)
        return
    found, told = chosen(shares, target)
    assert min(shares[found.narrow]) >= target
    assert found in told
    assert found.confirmed == shares[found.narrow][1]
    assert len(told) <= 2 + len(shares).bit_length() + len(shares)


@given(SHARES, st.floats(0.01, 1))
def test_where_shares_fall_it_is_the_last_that_reaches_the_target(
    shares: list[tuple[float, float]], target: float
) -> None:
    falling = list(zip(*(sorted(half, reverse=True) for half in zip(*shares, strict=True)), strict=True))
    reached = [count for count, each in enumerate(falling) if min(each) >= target]
    if reached:
        assert chosen(falling, target)[0].narrow == reached[-1]


def test_the_line_says_what_can_be_had() -> None:
    with pytest.raises(MixError, match=r"0\.995 is out of reach.* 0\.9929 are.*give at most 0\.992, or no"):
        chosen([(0.9929, 0.9931)], 0.995)


# 2. A tiny model.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    (folder / "text.txt").write_bytes(TEXT)
    write_random_model(BLOCKY, folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "fp32")


def options(bundle: Path, **values: Any) -> QuantizationOptions:
    return QuantizationOptions(
        **{"texts": [bundle.parent / "text.txt"], "windows": 6, "target_boundaries": 0.5, **values}
    )


@pytest.fixture(scope="module")
def figures() -> list[MixFigures]:
    return []


@pytest.fixture(scope="module")
def mixed(bundle: Path, figures: list[MixFigures]) -> Path:
    """The share that half of the matrices keep, asked for."""
    every = QuantizationOptions(texts=[bundle.parent / "text.txt"], windows=6, target_boundaries=1e-9)
    told: list[MixFigures] = []
    quantize_bundle(bundle, bundle.parent / "all", precision="int4", quantization=every, tell=told.append)
    assert (told[-1].narrow, told[-1].confirmed is not None) == (told[-1].matrices, True)
    worst = min(told[-1].boundaries, told[-1].confirmed or 0)
    target = (min(told[0].boundaries, told[0].confirmed or 0) + worst) / 2
    found = options(bundle, target_boundaries=target)
    return quantize_bundle(
        bundle, bundle.parent / "mixed", precision="int4", quantization=found, tell=figures.append
    )


def matrix_types(folder: Path) -> dict[str, str]:
    """By matrix of the patcher's graph, its precision."""
    graph = onnx.load(folder / "patcher.onnx", load_external_data=False).graph
    words = ("int4", "int8w")
    return {
        name: word
        for one in graph.initializer
        for name, _, word in [one.name.rpartition(".")]
        if word in words
    }


def test_a_mix_is_in_the_graph_as_the_manifest_says(mixed: Path) -> None:
    manifest = load_manifest(mixed)
    assert manifest.quantization is not None
    mix = manifest.quantization.mix
    assert mix is not None
    config = config_of(BLOCKY)
    names = [node.inputs[1].name for node in linear_products(build_stage(config, "patcher").graph)]
    assert sorted((*mix.int4, *mix.int8w)) == sorted(names)
    assert matrix_types(mixed) == {**dict.fromkeys(mix.int4, "int4"), **dict.fromkeys(mix.int8w, "int8w")}
    assert manifest.precisions_of("patcher") == ("int4", "int8w")
    assert manifest.precisions_of("encoder") == ("int8w",)
    assert block_bits(manifest, "patcher") == (4, 8)
    assert (mix.texts, mix.windows, mix.seed) == (("text.txt",), 6, 0)
    sizes = [load_manifest(one).stage_bytes("patcher") for one in (mixed, mixed.parent / "all")]
    assert sizes[0] > sizes[1]


def test_its_share_is_that_of_the_finished_bundle(
    bundle: Path, mixed: Path, figures: list[MixFigures]
) -> None:
    manifest = load_manifest(mixed)
    assert manifest.quantization is not None
    mix = manifest.quantization.mix
    assert mix is not None
    ours, theirs = BltModel.load(mixed, threads=1), BltModel.load(bundle, threads=1)
    text = open_texts([bundle.parent / "text.txt"])
    own, other, both = 0, 0, 0
    for window in choose_windows(text, 6, mix.window_bytes, 0)[1::2]:
        found, wanted = (
            set(np.cumsum(model.patch_lengths(window.read())).tolist()) - {1, window.size + 1}
            for model in (ours, theirs)
        )
        own, other, both = own + len(found), other + len(wanted), both + len(found & wanted)
    assert mix.boundaries >= mix.target
    # The last start, after a window's end, is counted by the search alone.
    assert mix.boundaries == pytest.approx(both / max(own, other), abs=0.02)
    last = figures[-1]
    assert (last.narrow, last.confirmed) == (len(mix.int4), mix.boundaries)
    assert last.bytes == manifest.files["patcher.onnx.data"].bytes


def test_an_engine_of_a_mix_multiplies_both(mixed: Path) -> None:
    engine = build_engine(mixed, rows=())
    assert engine.reason is None
    text = TEXT[:300]
    ours = BltModel.load(mixed, threads=1).entropies(text)
    np.testing.assert_allclose(
        ours, BltModel.load(mixed, threads=1, portable=True).entropies(text), atol=0.02
    )


def test_a_search_may_end_with_all_in_4_bits(mixed: Path) -> None:
    manifest = load_manifest(mixed.parent / "all")
    assert manifest.quantization is not None
    assert manifest.quantization.mix is not None
    assert manifest.quantization.mix.int8w == ()
    assert manifest.precisions_of("patcher") == ("int4",)
    assert set(matrix_types(mixed.parent / "all").values()) == {"int4"}


def test_a_low_target_widens_what_validation_allows(mixed: Path) -> None:
    manifest = load_manifest(mixed)
    assert manifest.quantization is not None
    assert manifest.quantization.mix is not None
    plain = tolerances_of(replace(manifest, quantization=None))
    for target, boundaries in ((0.9, 0.2), (0.999, 0.02)):
        mix = replace(manifest.quantization.mix, target=target)
        changed = replace(manifest, quantization=replace(manifest.quantization, mix=mix))
        wider = tolerances_of(changed)
        assert wider == replace(plain, boundaries=boundaries, entropy=wider.entropy)
        assert wider.entropy > plain.entropy
        wide = replace(mix, int4=(), int8w=(*mix.int4, *mix.int8w))
        same = replace(changed, quantization=replace(manifest.quantization, mix=wide))
        assert tolerances_of(same) == plain


@pytest.mark.parametrize(
    ("precision", "values", "message"),
    [
        ("int4", {"target_boundaries": 0.0}, "target_boundaries is 0.0; .* > 0 and <= 1"),
        ("int4", {"target_boundaries": 1.5}, "target_boundaries is 1.5"),
        ("int4", {"target_boundaries": float("nan")}, "target_boundaries is nan"),
        ("int4,patcher=fp16", {}, "a mix is of int8w and int4, the patcher is fp16"),
        ("latent=int4", {}, "the patcher is fp32"),
        ("int4", {"windows": 1}, "windows: a mix needs 2 of 511 bytes, .* the texts give 1"),
    ],
)
def test_what_can_not_be_searched_is_refused_and_nothing_is_left(
    bundle: Path, tmp_path: Path, precision: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        quantize_bundle(bundle, tmp_path / "out", precision=precision, quantization=options(bundle, **values))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_searched(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is searched in a float32 bundle; export one, and quantize that"):
        export_checkpoint(
            bundle.parent / "checkpoint", tmp_path / "out", precision="int4", quantization=options(bundle)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_target_out_of_reach_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(MixError, match="is out of reach"):
        quantize_bundle(
            bundle,
            tmp_path / "out",
            precision="int8w",
            quantization=options(bundle, target_boundaries=1.0, windows=40),
        )
    assert list(tmp_path.iterdir()) == []
