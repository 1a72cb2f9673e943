"""What real sequences show an observer is what the reference computes without any cache."""

from __future__ import annotations

import hashlib
import re
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from blt_edge.calibration.collect import (
    WeightProduct,
    check_method,
    collect_observations,
    read_window,
    tapped_model,
)
from blt_edge.calibration.data import choose_windows, open_texts
from blt_edge.calibration.observers import CalibrationError
from blt_edge.runtime import BltModel, BundleError, OptionError
from blt_edge.runtime.errors import BackendError
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest

if TYPE_CHECKING:
    from blt_edge.export.reference import Reference

WINDOWS, SIZE, SEED = 3, 300, 4

# Our weights and the module of transformers that reads the same input.
MODULES = [
    (r"patcher\.stack\.(.*)", r"model.patcher.\1"),
    (r"encoder\.stack\.(.*)", r"model.local_encoder.\1"),
    (r"latent\.stack\.(.*)", r"model.global_transformer.\1"),
    (r"latent\.pooling\.(patch_embedding_projection\..*)", r"model.local_encoder.\1"),
    (r"latent\.pooling\.(.*)", r"model.local_encoder.cross_attn_layers.0.\1"),
    (r"latent\.token_embedding_projection\.(.*)", r"model.global_transformer.token_embedding_projection.\1"),
    (r"latent\.patch_embedding_projection\.(.*)", r"model.local_decoder.patch_embedding_projection.\1"),
    (r"latent\.patch_values\.(.*)", r"model.local_decoder.cross_attn_layers.\1"),
    (r"decoder\.(.*)", r"model.local_decoder.\1"),
]


def module_of(weight: str) -> str:
    for pattern, name in MODULES:
        if re.fullmatch(pattern, weight):
            name = re.sub(pattern, name, weight).removesuffix(".weight")
            return name.replace("qkv_proj", "q_proj").replace("kv_proj", "k_proj").replace("gate_up", "gate")
    raise AssertionError(weight)


@pytest.fixture(scope="module")
def everything(
    reference: Reference, texts: list[Path], watch_linears: Any
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """By our weights' pattern-free module names: all inputs of all windows, float64 [rows, K]."""
    collected: dict[str, list[np.ndarray[Any, Any]]] = {}
    for window in choose_windows(open_texts(texts), WINDOWS, SIZE, SEED):
        data = window.read()
        lengths, done = reference.patch_lengths(data), reference.trace(data).patch_lengths[:-1]
        for name, array in watch_linears(reference, data).items():
            rows = array.astype(np.float64)
            if name.startswith("model.local_encoder.cross") and name.endswith("k_proj"):
                rows = rows[: sum(done)]
            elif _per_patch(name):
                rows = rows[: len(rows) // len(lengths) * len(done)]
            collected.setdefault(name, []).append(rows)
    return {name: np.concatenate(parts) for name, parts in collected.items()}


def _per_patch(name: str) -> bool:
    parts = ("local_encoder.cross", "patch_embedding", "global_transformer")
    values = "local_decoder.cross" in name and name.endswith(("k_proj", "v_proj"))
    return values or any(part in name for part in parts)


@pytest.fixture(scope="module")
def observations(float_bundle: Path, texts: list[Path]) -> Any:
    return collect_observations(float_bundle, texts, windows=WINDOWS, window_bytes=SIZE, seed=SEED, threads=1)


def test_every_product_sees_what_the_reference_computes(
    observations: Any, everything: dict[str, np.ndarray[Any, Any]]
) -> None:
    assert len(observations.observers) == 40
    ranges = observations.ranges("minmax")
    for weight, observer in observations.observers.items():
        rows = everything[module_of(weight)]
        assert observer.rows == len(rows), weight
        largest = np.abs(rows).max()
        expected = np.abs(rows).max(axis=0)
        np.testing.assert_allclose(observer.channel_max, expected, rtol=1e-3, atol=1e-4 * largest)
        assert observer.histogram.total == rows.size
        assert ranges.scale(weight) == observer.channel_max.max()


def test_taps_change_no_result_and_see_chunks_and_steps(float_bundle: Path, texts: list[Path]) -> None:
    data = texts[0].read_bytes()[2000:2390]
    counts: dict[str, set[int]] = {}

    def watch(product: WeightProduct, values: Any) -> None:
        counts.setdefault(product.weight, set()).add(len(values))

    manifest = load_manifest(float_bundle)
    model = tapped_model(float_bundle, manifest, manifest.stages, watch, 1)
    expected = BltModel.load(float_bundle, threads=1).logits(data)
    np.testing.assert_allclose(model.logits(data), expected, rtol=0, atol=1e-5)
    counts.clear()
    read_window(model, choose_windows(open_texts(texts), 2, SIZE)[0])
    assert {1, 256} <= counts["decoder.layers.0.mlp.down_proj.weight"]
    assert {1, 256} <= counts["patcher.stack.layers.0.mlp.down_proj.weight"]
    assert len(counts["latent.pooling.kv_proj.weight"]) > 1


def test_the_bundle_is_left_alone(float_bundle: Path, texts: list[Path]) -> None:
    def state() -> dict[str, tuple[str, int]]:
        return {
            path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in float_bundle.iterdir()
        }

    before = state()
    collect_observations(float_bundle, texts, windows=2, window_bytes=50, threads=1)
    assert state() == before


def test_a_seed_gives_the_same_ranges_again(float_bundle: Path, texts: list[Path]) -> None:
    def limits(seed: int) -> Any:
        options: dict[str, Any] = {"windows": 3, "window_bytes": 80, "seed": seed, "threads": 1}
        return collect_observations(float_bundle, texts, **options).ranges("mse").limits

    assert limits(1) == limits(1)
    assert limits(1) != limits(2)


def test_only_the_stages_asked_for_are_observed_and_progress_ends_at_its_total(
    float_bundle: Path, texts: list[Path]
) -> None:
    seen: list[tuple[int, int]] = []
    ranges = collect_observations(
        float_bundle,
        texts,
        windows=3,
        window_bytes=60,
        stages=["encoder", "decoder"],
        threads=1,
        progress=lambda done, total: seen.append((done, total)),
    ).ranges("minmax")
    assert seen == [(60, 180), (120, 180), (180, 180)]
    assert {weight.split(".")[0] for weight in ranges.limits} == {"encoder", "decoder"}
    with pytest.raises(CalibrationError, match=r"no range was collected for latent\.x"):
        ranges.scale("latent.x")


def test_memory_does_not_grow_with_the_text(float_bundle: Path, texts: list[Path]) -> None:
    def peak(windows: int) -> int:
        tracemalloc.start()
        try:
            collect_observations(float_bundle, texts, windows=windows, window_bytes=120, threads=1)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # imports and caches of the first run
    few, many = peak(2), peak(24)
    assert many < 1.1 * few + 100_000


@pytest.fixture
def copied(float_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float_bundle, tmp_path / "bundle"))


def sealed(bundle: Path) -> None:
    """Let the manifest of a changed bundle agree with its files."""
    manifest = load_manifest(bundle)
    write_manifest(bundle, manifest.with_files({name: file_record(bundle / name) for name in manifest.files}))


def test_a_quantized_bundle_is_refused(copied: Path) -> None:
    manifest = load_manifest(copied)
    stages = {**manifest.stages, "latent": replace(manifest.stages["latent"], precision="int8")}
    write_manifest(copied, replace(manifest, stages=stages))
    with pytest.raises(OptionError, match="latent stage is int8; calibration needs the float32 bundle"):
        collect_observations(copied)


def test_a_model_that_is_not_finite_is_refused_by_name(copied: Path, texts: list[Path]) -> None:
    table = np.fromfile(copied / "tables.bin", np.uint8)
    table[: 260 * 32 * 2] = 0xFF  # NaN, in float16 and float32
    table.tofile(copied / "tables.bin")
    sealed(copied)
    with pytest.raises(CalibrationError, match=r"encoder\.stack\.layers\.0\S+ an activation is NaN"):
        collect_observations(copied, texts, windows=2, window_bytes=60, threads=1)


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (lambda _graph: b"no graph", BundleError, "encoder.onnx is not a graph"),
        (lambda graph: graph.replace(b"Sigmoid", b"Sigmund"), BackendError, "encoder.onnx: ONNX Runtime"),
        (
            lambda graph: graph.replace(b"encoder.onnx.data", b"/etc/weights.data"),
            BundleError,
            "weights do not",
        ),
        (lambda graph: graph.replace(b"byte_embeds", b"byte_embedz"), BundleError, "input 'byte_embed"),
    ],
)
def test_another_graph_is_refused(
    copied: Path, texts: list[Path], change: Callable[[bytes], bytes], kind: type[Exception], reason: str
) -> None:
    path = copied / "encoder.onnx"
    path.write_bytes(change(path.read_bytes()))
    sealed(copied)
    with pytest.raises(kind, match=reason):
        collect_observations(copied, texts, windows=2, window_bytes=60, threads=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window_bytes": 400}, "from 1 to 399"),
        ({"window_bytes": 0}, "from 1 to 399"),
        ({"windows": 0}, "windows: got 0"),
        ({"texts": ["nowhere.txt"]}, "nowhere.txt cannot be read"),
    ],
)
def test_wrong_usage_gets_one_line(float_bundle: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        collect_observations(float_bundle, **options)
    with pytest.raises(OptionError, match="got 'magic', allowed are minmax, percentile, entropy, mse"):
        check_method("magic")
