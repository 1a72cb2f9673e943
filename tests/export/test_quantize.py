"""Bundles at lower precision: from a bundle and from the checkpoint, run, refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from blt_edge.calibration.observers import CalibrationRun, Ranges
from blt_edge.export import export_checkpoint, plan_export
from blt_edge.export.quantize import QuantizationOptions, quantize_bundle
from blt_edge.graphs.precision import MIXES
from blt_edge.graphs.quantize import linear_products
from blt_edge.graphs.stages import build_stage
from blt_edge.runtime.errors import BltError, BundleError, OptionError
from blt_edge.runtime.integrity import check_files, file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.model import BltModel
from blt_edge.runtime.names import STAGES
from blt_edge.runtime.vocabulary import encode
from support.ort_versions import VERSION, fuses_blocks
from support.quantized import BLOCKY, config_of
from support.random_models import write_random_model
from support.stage_kernels import FUSED, stage_kernels

TEXT = (Path(__file__).parents[1] / "data" / "alice.txt").read_bytes()[1000:1600]
CONFIG = config_of(BLOCKY)


def ranges(limit: float = 8.0) -> Ranges:
    """A range for every product."""
    graphs = [build_stage(CONFIG, stage).graph for stage in STAGES]
    names = [node.inputs[1].name for graph in graphs for node in linear_products(graph)]
    run = CalibrationRun(("some.txt",), 3, 100, 5)
    return Ranges("mse", run, dict.fromkeys(names, limit), {})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(BLOCKY, tmp_path_factory.mktemp("blocky") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return export_checkpoint(checkpoint, checkpoint.parent / "fp32")


@pytest.fixture(scope="module")
def quantized(bundle: Path) -> dict[str, Path]:
    """The bundle at every mix."""
    given = QuantizationOptions(ranges=ranges())
    return {
        mix: quantize_bundle(bundle, bundle.parent / mix, precision=mix, quantization=given)
        for mix in MIXES
        if mix != "fp32"
    }


@pytest.mark.parametrize("mix", ["fp16", "int8", "int8w", "int4"])
def test_mix_runs_and_says_what_it_is(bundle: Path, quantized: dict[str, Path], mix: str) -> None:
    manifest = load_manifest(quantized[mix])
    check_files(quantized[mix], manifest, full=True)
    assert {name: spec.precision for name, spec in manifest.stages.items()} == dict(MIXES[mix])
    assert manifest.validation == ()
    before = load_manifest(bundle)
    assert manifest.source == before.source
    assert manifest.embedding == before.embedding
    ours, theirs = BltModel.load(quantized[mix], threads=1), BltModel.load(bundle, threads=1)
    # Random weights make the worst of models to quantize: only gross faults show here.
    found, wanted = ours.entropies(TEXT), theirs.entropies(TEXT)
    assert np.corrcoef(found, wanted)[0, 1] > 0.98


@fuses_blocks
@pytest.mark.parametrize("mix", ["int8", "int8w", "int4"])
def test_fused_kernels_really_run(quantized: dict[str, Path], mix: str) -> None:
    for stage, spec in load_manifest(quantized[mix]).stages.items():
        kernels = stage_kernels(quantized[mix], stage)
        products = len(linear_products(build_stage(CONFIG, stage).graph))
        name = FUSED[spec.precision] + ("" if spec.precision == "int8" else "@4")
        assert kernels[name] == products, (stage, kernels)
        assert kernels["DequantizeLinear"] == 0, (stage, kernels)


@pytest.mark.parametrize("mix", ["int8", "int4"])
def test_chunks_and_steps_agree(quantized: dict[str, Path], mix: str) -> None:
    if mix == "int4" and VERSION < (1, 25):
        pytest.skip("before ONNX Runtime 1.25 one row and several of 4-bit products round differently")
    model = BltModel.load(quantized[mix], threads=1)
    whole, steps = model.sequence(), model.sequence()
    ids = encode(TEXT[:120])
    chunk = np.concatenate([result.logits.copy() for result in whole.extend(ids)])
    single = np.concatenate([result.logits.copy() for one in ids[:, None] for result in steps.extend(one)])
    assert whole.boundaries.starts == steps.boundaries.starts
    np.testing.assert_allclose(chunk, single, rtol=0, atol=1e-4)


def test_from_the_checkpoint_it_is_the_same_bundle(
    checkpoint: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    options = QuantizationOptions(ranges=ranges())
    direct = export_checkpoint(checkpoint, tmp_path / "direct", precision="int8", quantization=options)
    ours, theirs = load_manifest(direct), load_manifest(quantized["int8"])
    for stage in STAGES:
        assert ours.files[f"{stage}.onnx.data"] == theirs.files[f"{stage}.onnx.data"]
    assert ours.stages == theirs.stages
    assert ours.quantization == theirs.quantization
    assert ours.embedding.dtype == "int8"


def test_planned_sizes_are_what_is_written(checkpoint: Path, quantized: dict[str, Path]) -> None:
    plan = plan_export(str(checkpoint), precision="int4")
    assert plan.precisions == MIXES["int4"]
    for stage, planned in plan.graph_bytes.items():
        size = load_manifest(quantized["int4"]).files[f"{stage}.onnx.data"].bytes
        assert planned <= size <= planned + 4096 * 100


def test_manifest_tells_how(quantized: dict[str, Path]) -> None:
    assert json.loads((quantized["int8"] / "manifest.json").read_text())["quantization"] == {
        "search": "mse",
        "block_size": 32,
        "calibration": {
            "method": "mse",
            "texts": ["some.txt"],
            "windows": 3,
            "window_bytes": 100,
            "seed": 5,
            "smooth": None,
        },
    }
    spec = load_manifest(quantized["int4"]).quantization
    assert spec is not None
    assert spec.calibration is None
    assert load_manifest(quantized["fp16"]).quantization is None


def test_blocks_of_several_sizes_run_and_are_told(
    bundle: Path, quantized: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blt_edge.graphs.precision.LARGE_MATRIX", 1)
    output = quantize_bundle(bundle, tmp_path / "out", precision="int4,encoder=fp32")
    manifest = load_manifest(output)
    assert manifest.quantization is not None
    assert manifest.quantization.block_size == 64
    assert manifest.quantization.block_sizes == {"patcher": (32, 64), "latent": (32, 64), "decoder": (32,)}
    for stage in ("patcher", "latent"):
        before = load_manifest(quantized["int4"]).stage_bytes(stage)
        assert manifest.stage_bytes(stage) < before, stage
    ours, theirs = BltModel.load(output, threads=1), BltModel.load(bundle, threads=1)
    assert np.corrcoef(ours.entropies(TEXT), theirs.entropies(TEXT))[0, 1] > 0.98
    chosen = QuantizationOptions(block_size=32)
    again = quantize_bundle(bundle, tmp_path / "again", precision="int4", quantization=chosen)
    files = (load_manifest(one).files["latent.onnx.data"] for one in (again, quantized["int4"]))
    assert len({file.sha256 for file in files}) == 1


def test_tables_alone_can_change(bundle: Path, tmp_path: Path) -> None:
    done: list[tuple[str, int, int]] = []
    output = quantize_bundle(
        bundle, tmp_path / "out", tables="fp16", progress=lambda *report: done.append(report)
    )
    before, after = load_manifest(bundle), load_manifest(output)
    assert after.embedding.dtype == "float16"
    assert after.stages == before.stages
    assert [what for what, _, _ in done if what != "hashes"][-1] == "embedding tables"
    assert done[-1][1] == done[-1][2]
    ours, theirs = BltModel.load(output, threads=1), BltModel.load(bundle, threads=1)
    np.testing.assert_array_equal(ours.entropies(TEXT[:50]), theirs.entropies(TEXT[:50]))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def test_calibration_runs_when_no_ranges_are_given(
    bundle: Path, checkpoint: Path, tmp_path: Path, text: Path
) -> None:
    options = QuantizationOptions(texts=[text], method="minmax", windows=1, seed=3)
    output = quantize_bundle(bundle, tmp_path / "a", precision="encoder=int8", quantization=options)
    spec = load_manifest(output).quantization
    assert spec is not None
    assert spec.calibration is not None
    assert (spec.calibration.method, spec.calibration.texts) == ("minmax", ("text.txt",))
    direct = export_checkpoint(checkpoint, tmp_path / "b", precision="encoder=int8", quantization=options)
    ours, theirs = load_manifest(direct), load_manifest(output)
    for name in ("encoder.onnx", "encoder.onnx.data"):
        assert ours.files[name] == theirs.files[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "text.txt"]


def test_smoothing_changes_no_more_than_rounding(bundle: Path, tmp_path: Path, text: Path) -> None:
    options = QuantizationOptions(texts=[text], windows=1, smooth=0.5)
    output = quantize_bundle(bundle, tmp_path / "a", precision="encoder=int8", quantization=options)
    spec = load_manifest(output).quantization
    assert spec is not None
    assert spec.calibration is not None
    assert spec.calibration.smooth == 0.5
    ours, theirs = BltModel.load(output, threads=1).trace(TEXT), BltModel.load(bundle, threads=1).trace(TEXT)
    difference = np.linalg.norm(ours["byte_states"] - theirs["byte_states"])
    assert difference < 0.1 * np.linalg.norm(theirs["byte_states"])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"precision": "int3"}, {}, "precision: got 'int3', allowed are"),
        ({"precision": "latnt=int4"}, {}, "precision: got stage 'latnt'"),
        ({"precision": "int4"}, {"block_size": 48}, "block size: got 48, allowed are 32, 64, 128"),
        ({"precision": "int4"}, {"block_size": 128}, "block size: 128 does not divide the 64 inputs of"),
        ({"precision": "int4"}, {"block_size": True}, "block size: got True, allowed are 32, 64, 128"),
        ({"precision": "int4"}, {"search": "best"}, "search: got 'best', allowed are mse, rtn"),
        ({"precision": "int8"}, {"method": "guess"}, "calibration method: got 'guess'"),
        ({"precision": "int8"}, {"smooth": 2.0}, "smooth: got 2.0"),
        ({"precision": "int8"}, {"texts": ["absent.txt"]}, "absent.txt"),
        ({"precision": "int8"}, {"smooth": 0.5, "ranges": ranges()}, "smoothing: ranges were given"),
        ({"precision": "fp32"}, {}, "nothing to change"),
        ({"tables": "fp3"}, {}, "tables"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_left(
    bundle: Path, tmp_path: Path, values: dict[str, str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        quantize_bundle(bundle, tmp_path / "out", quantization=QuantizationOptions(**options), **values)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_quantized_bundle_is_not_quantized_again(quantized: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"is quantized already \(int4\); give the float32 bundle"):
        quantize_bundle(quantized["int4"], tmp_path / "out", precision="int8")


def test_existing_output_stays(bundle: Path, quantized: dict[str, Path]) -> None:
    with pytest.raises(BltError, match="exists"):
        quantize_bundle(bundle, quantized["int4"], precision="fp16")
    assert load_manifest(quantized["int4"]).stages["latent"].precision == "int4"


def test_a_bundle_is_not_replaced_by_what_is_made_of_it(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    with pytest.raises(OptionError, match="is the bundle that is read, and would be lost"):
        quantize_bundle(copy, tmp_path / "elsewhere" / ".." / "bundle", precision="int4", force=True)
    assert (copy / "manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("windows", [0, 96])
def test_texts_are_refused_before_anything_is_made(
    bundle: Path, checkpoint: Path, tmp_path: Path, precision: str, windows: int
) -> None:
    text = tmp_path / "short.txt"
    text.write_bytes(b"short")
    # Bundled texts are fine, but not in no windows.
    options = QuantizationOptions(texts=(text,) if windows else None, windows=windows)
    made: list[str] = []
    output, how = tmp_path / "out", {"precision": precision, "quantization": options}
    for make in (
        lambda: quantize_bundle(bundle, output, progress=lambda what, *_: made.append(what), **how),
        lambda: export_checkpoint(checkpoint, output, progress=lambda what, *_: made.append(what), **how),
        lambda: plan_export(str(checkpoint), **how),
    ):
        with pytest.raises(OptionError, match=r"has 5 bytes, a calibration window needs|windows: got 0"):
            make()
    assert made == []
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("location", ["../secret", "tables.bin", "/etc/passwd"])
def test_weights_outside_the_listed_file_are_refused(bundle: Path, tmp_path: Path, location: str) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bad"))
    (tmp_path / "secret").write_bytes(b"0" * 100_000)
    graph = onnx.load(folder / "encoder.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "encoder.onnx").write_bytes(graph.SerializeToString())
    manifest = load_manifest(folder)
    files = {**manifest.files, "encoder.onnx": file_record(folder / "encoder.onnx")}
    write_manifest(folder, replace(manifest, files=files))
    with pytest.raises(BundleError, match=r"encoder\.onnx.*(does not lie in|blt-edge wrote)"):
        quantize_bundle(folder, tmp_path / "out", precision="int4")
    assert not (tmp_path / "out").exists()


def test_a_graph_of_another_making_is_refused_without_a_word_of_its_own(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bad"))
    graph = onnx.load(folder / "encoder.onnx", load_external_data=False)
    graph.graph.node[-1].input[0] = "\x1b[2J is found in no scope"
    graph.graph.initializer[0].external_data.add(key="\x1b[2J is no key", value="1")
    del graph.opset_import[:]
    (folder / "encoder.onnx").write_bytes(graph.SerializeToString())
    manifest = load_manifest(folder)
    files = {**manifest.files, "encoder.onnx": file_record(folder / "encoder.onnx")}
    write_manifest(folder, replace(manifest, files=files))
    with pytest.raises(BundleError, match=r"is not a graph that blt-edge wrote \(\w+\); copy") as caught:
        quantize_bundle(folder, tmp_path / "out", precision="int8w")
    assert str(caught.value).isprintable()
    assert not caplog.records
    assert not recwarn.list
    assert not (tmp_path / "out").exists()
