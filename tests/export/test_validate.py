"""Validation finds what was changed, names it, and passes what is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.export.golden import GOLDEN_TEXT, Golden, GoldenError, read_golden, write_golden
from blt_edge.export.quality import TOLERANCES
from blt_edge.export.reference import Reference
from blt_edge.export.validate import ValidationReport, ValidationRow, validate_bundle
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.runtime.errors import OptionError, PromptTooLongError
from blt_edge.runtime.manifest import load_manifest, write_manifest
from support.model_store import RandomModels
from support.processors import ARM, become
from support.random_models import PARITY_TEXT, RandomModel, base_config

CASE = RandomModel("validated", base_config(local_attention_window_len=32), share=0.4, seed=70)
NO_PATCHER = RandomModel("validated_bytes", base_config(patch_in_forward=False), share=None, seed=71)
TEXT = PARITY_TEXT[:150]


class Altered:
    """A bundle whose outputs are changed on their way out."""

    def __init__(self, model: BltModel) -> None:
        self.model, self.manifest, self.path = model, model.manifest, model.path
        self.change: Callable[[dict[str, np.ndarray]], Any] = lambda arrays: None
        self.lengths: Callable[[list[int]], list[int]] = lambda lengths: lengths
        self.data: Callable[[bytes], bytes] = lambda data: data

    def trace(self, data: bytes) -> Mapping[str, np.ndarray]:
        arrays = dict(self.model.trace(data))
        self.change(arrays)
        return arrays

    def patch_lengths(self, data: bytes) -> list[int]:
        return self.lengths(self.model.patch_lengths(data))

    def generate(self, prompt: bytes, options: GenerationOptions) -> Any:
        return SimpleNamespace(data=self.data(self.model.generate(prompt, options).data))


@pytest.fixture(scope="module")
def bundle(random_models: RandomModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(random_models.folder(CASE), tmp_path_factory.mktemp("validate") / "bundle")


@pytest.fixture(scope="module")
def golden(random_models: RandomModels, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    path = tmp_path_factory.mktemp("validate-golden") / "golden.safetensors"
    return read_golden(
        write_golden(random_models.folder(CASE), path, 20, reference=random_models.reference(CASE))
    )


@pytest.fixture
def model(bundle: Path) -> Altered:
    return Altered(BltModel.load(bundle, threads=1))


@pytest.fixture
def reference(random_models: RandomModels) -> Reference:
    return random_models.reference(CASE)


def validate(model: Altered, reference: Reference | Golden, **options: Any) -> ValidationReport:
    if isinstance(reference, Golden):
        return validate_bundle(model, reference, **options)
    return validate_bundle(model, reference, **{"texts": [TEXT], "greedy_bytes": 20, **options})


def breaches(report: ValidationReport) -> list[str]:
    assert not report.passed
    return [row.check for row in report.breaches]


def test_an_exact_bundle_passes(model: Altered, reference: Reference) -> None:
    said: list[str] = []
    report = validate(model, reference, texts=[TEXT, b"", b"short"], progress=said.append)
    assert report.passed, report.breaches
    assert [row.check.split(":")[0] for row in report.rows] == [
        "bundle", "patcher", "patcher", "patcher", "encoder", "latent",
        "decoder", "decoder", "decoder", "decoder", "greedy",
    ]  # fmt: skip
    assert report.against == reference.name
    assert report.precision == "fp32"
    assert report.data_bytes == len(TEXT) + 5
    assert said == ["file hashes", "text 1 of 3", "text 2 of 3", "text 3 of 3", "greedy bytes"]


def test_an_exact_bundle_passes_against_a_golden_file(model: Altered, golden: Golden) -> None:
    report = validate(model, golden)
    assert report.passed, report.breaches
    assert [row.check.split(":")[0] for row in report.rows] == [
        "bundle", "patcher", "patcher", "decoder", "decoder", "decoder", "decoder", "greedy"
    ]  # fmt: skip
    assert report.rows[-1].measured == 20


def test_without_patcher(random_models: RandomModels, tmp_path: Path) -> None:
    path = export_checkpoint(random_models.folder(NO_PATCHER), tmp_path / "bundle")
    report = validate_bundle(
        BltModel.load(path, threads=1), random_models.reference(NO_PATCHER), [TEXT], greedy_bytes=0
    )
    assert report.passed, report.breaches
    assert [row.check for row in report.rows if "patcher" in row.check] == ["patcher: boundaries that differ"]
    assert not any("greedy" in row.check for row in report.rows)


def test_default_text_is_cut_to_the_models_positions(
    model: Altered, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = model.manifest
    model.manifest = replace(manifest, model=replace(manifest.model, max_positions=50))
    report = validate_bundle(model, reference, greedy_bytes=0)
    assert report.passed
    assert report.data_bytes == 49
    assert len(GOLDEN_TEXT) > 49


def nudge(name: str, amount: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name].reshape(len(arrays[name]), -1)[7, -1] += amount

    return change


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("patcher_logits", "patcher: logits, largest difference / scale"),
        ("entropies", "patcher: entropies, largest difference in nats"),
        ("byte_states", "encoder: byte states, largest difference / scale"),
        ("patch_values", "latent: patch keys and values, largest difference / scale"),
        ("logits", "decoder: logits, largest difference / scale"),
    ],
)
def test_one_number_off_in_one_stage(model: Altered, reference: Reference, name: str, check: str) -> None:
    scale = float(np.abs(getattr(reference.trace(TEXT), name)).max()) if name != "entropies" else 1.0
    model.change = nudge(name, 2e-4 * scale)
    report = validate(model, reference)
    assert breaches(report) == [check]
    assert report.breaches[0].measured == pytest.approx(2e-4, rel=0.1)
    model.change = nudge(name, 0.5e-4 * scale)
    assert validate(model, reference).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_never_pass(model: Altered, reference: Reference, value: float) -> None:
    for name in ("byte_states", "logits", "entropies", "patcher_logits", "patch_values"):
        model.change = nudge(name, value)
        report = validate(model, reference, greedy_bytes=0)
        assert len(breaches(report)) == 1
        json.dumps(report.to_dict(), allow_nan=False)


def test_a_missing_or_misshapen_output(model: Altered, reference: Reference) -> None:
    model.change = lambda arrays: arrays.pop("patcher_logits")
    row = validate(model, reference, greedy_bytes=0).breaches[0]
    assert row.note == "the bundle has no patcher logits"
    model.change = lambda arrays: arrays.update(patch_values=arrays["patch_values"][:-1])
    row = validate(model, reference, greedy_bytes=0).breaches[0]
    assert row.note.startswith("shape [")
    assert row.measured == np.inf


def test_drift_shows_in_mean_cosine_and_argmax(model: Altered, reference: Reference) -> None:
    noise = np.random.default_rng(0).normal(size=(len(TEXT) + 1, 260))
    model.change = lambda arrays: arrays.update(logits=arrays["logits"] + noise)
    report = validate(model, reference, greedy_bytes=0)
    assert [check.removeprefix("decoder: logits, ") for check in breaches(report)] == [
        "largest difference / scale",
        "mean difference / scale",
        "cosine",
        "argmax agreement",
    ]
    assert report.breaches[-1].note.startswith("first differs at row ")


def shifted(at: int) -> Callable[[list[int]], list[int]]:
    """The lengths with the boundary after patch `at` left out."""
    return lambda lengths: [*lengths[:at], lengths[at] + lengths[at + 1], *lengths[at + 2 :]]


def test_a_missing_boundary(model: Altered, reference: Reference) -> None:
    lengths = reference.patch_lengths(TEXT)
    model.lengths = shifted(4)
    row = validate(model, reference, greedy_bytes=0).breaches[0]
    assert row.measured == 1
    start = sum(lengths[:5])
    assert row.note.startswith(
        f"only the reference starts a patch at position {start}; the reference's entropy"
    )


def test_an_extra_boundary_in_the_second_text(model: Altered, reference: Reference) -> None:
    def split(lengths: list[int]) -> list[int]:
        if sum(lengths) < 50:
            return lengths
        at = int(np.argmax(lengths))
        return [*lengths[:at], 1, lengths[at] - 1, *lengths[at + 1 :]]

    model.lengths = split
    row = validate(model, reference, texts=[b"short", TEXT], greedy_bytes=0).breaches[0]
    assert row.note.startswith("only the bundle starts a patch at position ")
    assert "of text 2" in row.note


def test_a_flip_within_rounding_says_so(model: Altered, golden: Golden) -> None:
    assert golden.entropies is not None
    model.lengths = shifted(4)
    position = sum(golden.patch_lengths[:5]) - 1
    near = replace(golden, threshold=float(golden.entropies[position]) - 3e-7)
    row = next(row for row in validate(model, near).breaches if "boundaries" in row.check)
    assert row.measured == 1
    assert f"entropy {golden.entropies[position]:.5f} is within 3e-07 of the threshold" in row.note


def test_greedy_bytes_that_differ(model: Altered, reference: Reference, golden: Golden) -> None:
    model.data = lambda data: data[:7] + bytes([data[7] ^ 1]) + data[8:]
    for expected in (reference, golden):
        row = validate(model, expected).breaches[0]
        assert row.check == "greedy: equal bytes of 20"
        assert (row.measured, row.allowed) == (7, 20)
        assert row.note.startswith("byte 7 is '")
    tied = replace(golden, greedy_margins=np.full(20, 2e-6, np.float32))
    assert validate(model, tied).breaches[0].note.endswith("two largest logits there are within 2e-06")


def test_greedy_text_that_ends_early_or_late(model: Altered, golden: Golden) -> None:
    model.data = lambda data: data[:5]
    row = validate(model, golden).breaches[0]
    assert row.measured == 5
    assert row.note.startswith("byte 5 is the end of the text, in the reference '")
    model.data = lambda data: data
    ended = replace(golden, greedy=golden.greedy[:9], greedy_margins=golden.greedy_margins[:9])
    row = validate(model, ended).breaches[0]
    assert (row.check, row.measured, row.ok) == ("greedy: equal bytes of 9", 20, False)
    assert "in the reference the end of the text" in row.note


def test_a_changed_file_is_a_breach(model: Altered, reference: Reference, tmp_path: Path) -> None:
    shutil.copytree(model.path, tmp_path / "copy")
    model.path = tmp_path / "copy"
    table = model.path / model.manifest.embedding.file
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    row = validate(model, reference, greedy_bytes=0).breaches[0]
    assert row.check == "bundle: files with the right sha256"
    assert table.name in row.note


def test_a_stale_golden_file_is_refused(model: Altered, golden: Golden) -> None:
    with pytest.raises(GoldenError, match="another checkpoint"):
        validate(model, replace(golden, checkpoint_sha256="0" * 64))


def test_options_that_make_no_sense(model: Altered, reference: Reference, golden: Golden) -> None:
    with pytest.raises(OptionError, match="golden file knows its own text only"):
        validate_bundle(model, golden, [TEXT])
    with pytest.raises(PromptTooLongError):
        validate(model, reference, texts=[b"x" * 30_000])


def test_unknown_precision_needs_tolerances(model: Altered, reference: Reference) -> None:
    stages = dict(model.manifest.stages)
    stages["latent"] = replace(stages["latent"], precision="int3")
    model.manifest = replace(model.manifest, stages=stages)
    with pytest.raises(OptionError, match="'int3', tolerances are known for fp32"):
        validate(model, reference)
    report = validate(model, reference, tolerances=TOLERANCES["fp32"])
    assert report.passed
    assert report.precision == "int3"


def test_the_report_fits_the_manifest(model: Altered, reference: Reference, tmp_path: Path) -> None:
    model.change = nudge("byte_states", np.nan)
    report = validate(model, reference)
    shutil.copytree(model.path, tmp_path / "copy")
    manifest = load_manifest(tmp_path / "copy").with_validation(report.record(model.model))
    write_manifest(tmp_path / "copy", manifest)
    (stored,) = load_manifest(tmp_path / "copy").validation
    assert stored == report.record(model.model)
    assert stored.report == report.to_dict()
    assert stored.report["passed"] is False
    assert list(stored.failed_checks) == breaches(report)


def test_the_record_names_what_computed(
    model: Altered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, own = ValidationReport("a golden file", "fp32", 20), copy(model.model)
    become(monkeypatch, tmp_path, "aarch64", ARM)
    machine = {
        "kernels": "aarch64 with dot product",
        "processor": "A aarch64",
        "onnxruntime": onnxruntime.__version__,
    }
    assert report.record(own).machine == machine
    assert own.kernels == machine["kernels"]
    own.engine = replace(own.engine, device="Orin\n, TensorRT 10.3", kernels="TensorRT on Orin")
    record = report.record(own)
    assert (record.kernels, record.processor) == ("TensorRT on Orin", "Orin?, TensorRT 10.3")
    assert record.onnxruntime is None


def test_rows() -> None:
    assert ValidationRow("x", 1.0, "<=", 1.0).ok
    assert not ValidationRow("x", float("nan"), "<=", 1.0).ok
    assert not ValidationRow("x", float("nan"), ">=", 1.0).ok
    assert not ValidationRow("x", float("nan"), "==", 1.0).ok
    assert ValidationRow("x", 2, ">=", 1).ok
    assert not ValidationReport("x", "fp32", 0, (ValidationRow("x", 2, "==", 1),)).passed
