"""Smoothing moves factors about: the float32 model stays the same, its activations become level."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from blt_edge.calibration.collect import collect_observations
from blt_edge.calibration.observers import Observations
from blt_edge.calibration.smooth import find_migrations, find_smoothing
from blt_edge.graphs.quantize import Recipe, linear_products, rewrite_stage
from blt_edge.runtime import BltModel, OptionError
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest

OPTIONS: dict[str, Any] = {"windows": 3, "window_bytes": 200, "seed": 1, "threads": 1}


@pytest.fixture(scope="module")
def observations(float_bundle: Path, texts: list[Path]) -> Observations:
    return collect_observations(float_bundle, texts, **OPTIONS)


def smoothed_bundle(source: Path, target: Path, factors: Any) -> Path:
    """The bundle with factors folded in, still float32."""
    target.mkdir()
    manifest = load_manifest(source)
    for stage, spec in manifest.stages.items():
        model = ir.load(source / spec.file)
        rewrite_stage(model, Recipe("fp32", factors=factors))
        ir.save(model, target / spec.file, external_data=f"{stage}.onnx.data", size_threshold_bytes=1024)
    (target / "tables.bin").write_bytes((source / "tables.bin").read_bytes())
    files = {path.name: file_record(path) for path in sorted(target.iterdir())}
    write_manifest(target, replace(manifest, files={}).with_files(files))
    return target


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_float_model_stays_the_same(
    float_bundle: Path, texts: list[Path], observations: Observations, tmp_path: Path, strength: float
) -> None:
    smoothing = find_smoothing(float_bundle, observations.ranges("minmax"), strength=strength)
    bundle = smoothed_bundle(float_bundle, tmp_path / "smooth", smoothing.factors)
    data = texts[1].read_bytes()[30_000:30_300]
    ours = BltModel.load(bundle, threads=1)
    theirs = BltModel.load(float_bundle, threads=1)
    np.testing.assert_allclose(ours.entropies(data), theirs.entropies(data), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.logits(data), theirs.logits(data), rtol=0, atol=2e-4)


def test_divided_observations_are_those_of_the_smoothed_model(
    float_bundle: Path, texts: list[Path], observations: Observations, tmp_path: Path
) -> None:
    smoothing = find_smoothing(float_bundle, observations.ranges("minmax"))
    bundle = smoothed_bundle(float_bundle, tmp_path / "smooth", smoothing.factors)
    truth = collect_observations(bundle, texts, **OPTIONS).ranges("mse")
    ours = collect_observations(float_bundle, texts, divisors=smoothing.divisors, **OPTIONS).ranges("mse")
    for weight in truth.limits:
        assert ours.scale(weight) == pytest.approx(truth.scale(weight), rel=2e-2), weight
        largest = truth.channel_max(weight).max()
        np.testing.assert_allclose(
            ours.channel_max(weight), truth.channel_max(weight), rtol=1e-3, atol=1e-4 * largest
        )


def test_activations_that_can_be_divided_are_found(float_bundle: Path) -> None:
    left = {
        "patcher": [],
        "encoder": [],
        "latent": [
            "latent.pooling.patch_embedding_projection.weight",
            "latent.pooling.o_proj.weight",
            "latent.token_embedding_projection.weight",
            "latent.patch_embedding_projection.weight",
        ],
        "decoder": [f"decoder.cross_attn_layers.{layer}.o_proj.weight" for layer in range(2)],
    }
    for stage, names in left.items():
        graph = ir.load(float_bundle / f"{stage}.onnx").graph
        found = [weight for migration in find_migrations(graph) for weight in migration.weights]
        products = [str(node.inputs[1].name) for node in linear_products(graph) if node.inputs[1]]
        assert len(found) == len(set(found))
        assert [name for name in products if name not in found] == names, stage


def test_factors_are_the_papers_formula(float_bundle: Path, observations: Observations) -> None:
    ranges = observations.ranges("minmax")
    smoothing = find_smoothing(float_bundle, ranges, strength=0.7)
    weight = "decoder.layers.1.mlp.gate_up_proj.weight"
    graph = ir.load(float_bundle / "decoder.onnx").graph
    tensor = graph.initializers[weight].const_value
    assert tensor is not None
    matrix = np.array(tensor.numpy(), np.float64)
    expected = ranges.channel_max(weight) ** 0.7 / np.abs(matrix).max(axis=1) ** 0.3
    expected /= np.exp(np.log(expected).mean())
    np.testing.assert_allclose(smoothing.divisors[weight], expected, rtol=1e-5)
    factors = smoothing.factors[weight]
    np.testing.assert_array_equal(factors.rows, smoothing.divisors[weight])
    # Its second half of outputs, `up`, is divided for the product that follows; the gate is not.
    down = smoothing.divisors["decoder.layers.1.mlp.down_proj.weight"]
    assert factors.columns is not None
    np.testing.assert_array_equal(factors.columns[: len(down)], 1)
    np.testing.assert_allclose(factors.columns[len(down) :], 1 / down)
    norm = smoothing.factors["decoder.layers.1.post_attention_layernorm.weight"]
    assert norm.rows is None
    np.testing.assert_allclose(norm.columns, 1 / smoothing.divisors[weight])


def test_query_heads_of_one_value_share_a_factor(float_bundle: Path, observations: Observations) -> None:
    smoothing = find_smoothing(float_bundle, observations.ranges("minmax"))
    # 4 heads of 8 over 2 key/value heads: heads 0 and 1 read the first.
    by_head = smoothing.divisors["encoder.stack.layers.0.self_attn.o_proj.weight"].reshape(4, 8)
    np.testing.assert_array_equal(by_head[0], by_head[1])
    np.testing.assert_array_equal(by_head[2], by_head[3])
    assert not np.array_equal(by_head[0], by_head[2])


def test_smoothing_levels_channels(float_bundle: Path, observations: Observations) -> None:
    ranges = observations.ranges("minmax")
    smoothing = find_smoothing(float_bundle, ranges, strength=1.0)
    for weight, divisor in smoothing.divisors.items():
        before = ranges.channel_max(weight)
        after = before / divisor
        assert after.max() / after.mean() <= before.max() / before.mean() * 1.0001, weight


def test_only_the_stages_asked_for_are_smoothed(float_bundle: Path, observations: Observations) -> None:
    smoothing = find_smoothing(float_bundle, observations.ranges("minmax"), stages=["decoder"])
    assert {name.split(".")[0] for name in smoothing.factors} == {"decoder"}


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), True, "half"])
def test_a_strength_outside_its_range_is_refused(
    float_bundle: Path, observations: Observations, strength: Any
) -> None:
    with pytest.raises(OptionError, match=r"smooth: got .* from 0 to 1"):
        find_smoothing(float_bundle, observations.ranges("minmax"), strength=strength)
