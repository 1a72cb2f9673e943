"""Validation of quantized bundles: what is demanded, what is reported, and that damage is found."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from blt_edge.calibration.data import bundled_texts
from blt_edge.export import export_checkpoint
from blt_edge.export.golden import read_golden
from blt_edge.export.quality import TOLERANCES, prose, tolerances_of
from blt_edge.export.quantize import quantize_bundle
from blt_edge.export.validate import BundleReference, ValidationReport, ValidationRow, validate_bundle
from blt_edge.runtime import BltModel, OptionError
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.names import PRECISIONS
from support.random_models import RandomModel, base_config, export_random_model

TEXT = b"A short text, and \xd0\xbf\xd0\xbe-\xd1\x80\xd1\x83\xd1\x81\xd1\x81\xd0\xba\xd0\xb8 too. " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint and its float32 bundle; another one that patches without a patcher."""
    wide = {"hidden_size": 64, "intermediate_size": 64}
    sizes = {"decoder": {"intermediate_size": 64}, "global_stack": {"intermediate_size": 96}}
    config = base_config(patcher=wide, **sizes)
    fixed = base_config(patch_in_forward=False, **sizes)
    folder = tmp_path_factory.mktemp("validate-quantized")
    export_random_model(RandomModel("even", config, share=0.3), folder)
    export_random_model(RandomModel("fixed", fixed, share=None), folder / "fixed")
    return folder


def validate(bundle: Path, reference: Path) -> ValidationReport:
    return validate_bundle(BltModel.load(bundle), BundleReference.load(reference), [TEXT], greedy_bytes=10)


def corrupt_scale(bundle: Path, stage: str, factor: float) -> None:
    """Multiply one of the stage's weight scales."""

    def change(scales: np.ndarray) -> np.ndarray:
        scales[0] *= factor
        return scales

    change_scales(bundle, stage, change, first=True)


def change_scales(
    bundle: Path, stage: str, change: Callable[[np.ndarray], np.ndarray], *, first: bool = False
) -> None:
    """Change the stage's weight scales, matrix by matrix or the first's only; files are recorded as whole."""
    manifest = load_manifest(bundle)
    graph = bundle / manifest.stages[stage].file
    model = ir.load(graph)
    named = model.graph.initializers.items()
    values = [value for name, value in named if str(name).endswith(".weight.scales")]
    for value in values[: 1 if first else None]:
        tensor = value.const_value
        assert tensor is not None
        scales = np.array(tensor.numpy())
        scales = change(scales.reshape(-1)).reshape(scales.shape)
        if isinstance(tensor, ir.ExternalTensor):
            data = np.memmap(bundle / manifest.stages[stage].data, np.uint8, "r+")
            start = tensor.offset or 0
            data[start : start + scales.nbytes] = scales.reshape(-1).view(np.uint8)
            data.flush()
        else:
            value.const_value = ir.tensor(scales, name=tensor.name)
            ir.save(model, graph)
    files = {name: file_record(bundle / name, lambda *_: None) for name in manifest.files}
    write_manifest(bundle, manifest.with_files(files))


def test_every_precision_has_tolerances() -> None:
    assert set(TOLERANCES) == set(PRECISIONS)
    limits = list(TOLERANCES.values())
    for closer, wider in pairwise(limits):
        assert closer.stage <= wider.stage
        assert closer.argmax >= wider.argmax
        assert closer.cosine >= wider.cosine


def test_a_float32_bundle_is_its_own_reference(folder: Path) -> None:
    report = validate(folder / "bundle", folder / "bundle")
    assert report.passed
    assert report.against == "the float32 bundle bundle"
    assert {row.measured for row in report.rows if "difference" in row.check} == {0.0}


@pytest.mark.parametrize(("precision", "tables"), [("fp16", "fp32"), ("int8w", "fp32"), ("int4", "int4")])
def test_rows_of_a_quantized_bundle(folder: Path, tmp_path: Path, precision: str, tables: str) -> None:
    quantize_bundle(folder / "bundle", tmp_path / "out", precision=precision, tables=tables)
    report = validate(tmp_path / "out", folder / "bundle")
    assert report.precision == precision
    rows = {row.check: row for row in report.rows}
    for name in ("false", "missed"):
        assert rows[f"patcher: {name} boundaries, share"].allowed == TOLERANCES[precision].boundaries
    greedy = rows["greedy: of 10 bytes, chosen too"]
    assert (greedy.rule, greedy.allowed) == (">=", 10)
    assert rows["encoder: byte states, relative error"].measured > 0
    assert 0 <= rows["predictions: mean KL, bits per byte"].measured < 0.5
    if precision == "fp16":
        assert report.passed, report.breaches


def test_tables_count_as_a_part(folder: Path, tmp_path: Path) -> None:
    quantize_bundle(folder / "bundle", tmp_path / "out", tables="int8")
    assert tolerances_of(load_manifest(tmp_path / "out")) == TOLERANCES["int8w"]
    assert validate(tmp_path / "out", folder / "bundle").precision == "int8w"


@pytest.mark.parametrize("stage", ["encoder", "latent", "decoder"])
def test_a_damaged_scale_is_found(folder: Path, tmp_path: Path, stage: str) -> None:
    fixed = folder / "fixed" / "bundle"
    quantize_bundle(fixed, tmp_path / "out", precision="int8w")
    before = validate(tmp_path / "out", fixed)
    assert before.passed, before.breaches
    corrupt_scale(tmp_path / "out", stage, 1000.0)
    report = validate(tmp_path / "out", fixed)
    assert not report.passed
    assert report.rows[0].ok  # the files are as the manifest says


def test_a_damaged_scale_of_the_patcher_is_found(folder: Path, tmp_path: Path) -> None:
    quantize_bundle(folder / "bundle", tmp_path / "out", precision="patcher=int8w")
    row = "patcher: logits, relative error"
    assert row not in {row.check for row in validate(tmp_path / "out", folder / "bundle").breaches}
    corrupt_scale(tmp_path / "out", "patcher", 1000.0)
    assert row in {row.check for row in validate(tmp_path / "out", folder / "bundle").breaches}


def test_a_quantized_bundle_is_no_reference(folder: Path, tmp_path: Path) -> None:
    quantize_bundle(folder / "bundle", tmp_path / "out", precision="int8w")
    with pytest.raises(OptionError, match="is quantized; give the float32 bundle"):
        BundleReference.load(tmp_path / "out")


DEMO = Path(str(resources.files("blt_edge.export"))) / "demo"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo in float32 and in two mixes."""
    folder = tmp_path_factory.mktemp("demo")
    export_checkpoint(DEMO, folder / "fp32")
    for precision in ("int8w", "int4"):
        quantize_bundle(folder / "fp32", folder / precision, precision=precision, tables="int8")
    return folder


def of_demo(bundle: Path, reference: Path) -> dict[str, ValidationRow]:
    model = BltModel.load(bundle, threads=1)
    report = validate_bundle(model, BundleReference.load(reference, threads=1), greedy_bytes=40)
    assert report.data_bytes > 6000
    return {row.check: row for row in report.rows}


@pytest.mark.parametrize("precision", ["int8w", "int4"])
def test_the_demo_passes_with_room(demo: Path, precision: str) -> None:
    rows = of_demo(demo / precision, demo / "fp32")
    assert all(row.ok for row in rows.values()), rows
    # What prose shows is within two thirds of what is allowed, and no limit is out of reach.
    for name in ("predictions: mean KL, bits per byte", "predictions: more bits per byte"):
        assert abs(rows[name].measured) < 0.67 * rows[name].allowed < 0.02
    assert rows["greedy: of 40 bytes, chosen too"].allowed >= 38
    golden = validate_bundle(BltModel.load(demo / precision), read_golden(DEMO / "golden.safetensors"))
    assert golden.passed, golden.breaches


@pytest.mark.parametrize(
    ("precision", "stage", "damage", "found"),
    [
        ("int8w", "patcher", "next block", "patcher: missed boundaries, share"),
        ("int8w", "latent", "next block", "latent: patch keys and values, relative error"),
        ("int4", "decoder", "all larger", "predictions: more bits per byte"),
    ],
)
def test_a_quietly_wrong_demo_fails(
    demo: Path, tmp_path: Path, precision: str, stage: str, damage: str, found: str
) -> None:
    """One matrix whose blocks have their neighbours' scales, or a stage's scales all a seventh too large."""
    shutil.copytree(demo / precision, tmp_path / "out")
    if damage == "next block":
        change_scales(tmp_path / "out", stage, lambda scales: np.roll(scales, 1), first=True)
    else:
        change_scales(tmp_path / "out", stage, lambda scales: scales * np.float32(1.15))
    assert not of_demo(tmp_path / "out", demo / "fp32")[found].ok


def test_prose_is_in_no_other_text() -> None:
    """Nothing longer than a phrase of it is in the texts that calibration reads."""
    text, calibration = prose(), b"".join(one.path.read_bytes() for one in bundled_texts())
    pieces = {calibration[at : at + 32] for at in range(len(calibration) - 31)}
    assert 5000 < len(text) < 8000
    assert not any(text[at : at + 32] in pieces for at in range(len(text) - 31))


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks that die with their process")
def test_a_killed_calibration_is_cleaned_up(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code = (
        "import sys\nfrom blt_edge.export import export_checkpoint\n"
        "export_checkpoint(sys.argv[1], sys.argv[2], precision='decoder=int8')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder / "checkpoint"), str(output)])
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.glob(".out.calibration-*")):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.glob(".out.calibration-*"))
    export_checkpoint(folder / "checkpoint", output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
