"""Bundles with packed portable graphs: listed and checked like every file, kept by quantizing, and run."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.export.build_ort import build_engine
from blt_edge.export.quantize import quantize_bundle
from blt_edge.runtime import BltModel, BundleError, GenerationOptions, OptionError
from blt_edge.runtime.integrity import check_files
from blt_edge.runtime.manifest import Manifest, load_manifest
from blt_edge.runtime.names import STAGES, packed_graph_file
from support.random_models import RandomModel, base_config, export_random_model

MODEL = RandomModel("portable", base_config(local_attention_window_len=12, patcher={"sliding_window": 9}))
PROMPTS = (b"Once upon a time, in a", b"x", "Ένα μικρό μοντέλο".encode() * 3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_random_model(MODEL, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def packed(plain: Path) -> Path:
    return export_checkpoint(plain.parent / "checkpoint", plain.parent / "packed", rows=(2, 3))


def test_all_else_is_the_same(plain: Path, packed: Path) -> None:
    without, manifest = load_manifest(plain), load_manifest(packed)
    assert (without.rows, manifest.rows) == ((), (2, 3))
    assert "rows" not in json.loads((plain / "manifest.json").read_text())
    names = {packed_graph_file(stage, rows) for stage in STAGES for rows in (2, 3)}
    assert set(manifest.packed_files) == names == manifest.files.keys() - without.files.keys()
    assert {name: manifest.files[name] for name in without.files} == without.files
    # A state of one is good for the other.
    assert manifest.fingerprint == without.fingerprint


def test_they_are_checked_like_every_other_file(packed: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(packed, tmp_path / "bundle"))
    path = bundle / "decoder.rows3.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"^decoder\.rows3\.onnx was changed"):
        check_files(bundle, load_manifest(bundle))
    path.unlink()
    with pytest.raises(BundleError, match=r"decoder\.rows3\.onnx"):
        check_files(bundle, load_manifest(bundle))


@pytest.mark.parametrize("rows", [None, 2, "2", [1], [65], [2.0], [True], [3, 2], [2, 2], [4], {"2": 3}])
def test_other_rows_in_the_manifest_are_refused(packed: Path, rows: Any) -> None:
    payload = {**load_manifest(packed).to_dict(), "rows": rows}
    with pytest.raises(BundleError, match=r"^manifest\.json: rows: [^\n]*$"):
        Manifest.from_dict(payload)


@pytest.mark.parametrize("rows", [(1,), (2, 65), (2.5,), (True,), ("2",)])
def test_rows_that_no_graph_takes_are_refused(plain: Path, tmp_path: Path, rows: Any) -> None:
    for make in (build_engine, partial(export_checkpoint, output=tmp_path / "bundle")):
        with pytest.raises(OptionError, match=r"^rows is .*; allowed is a whole number from 2 to 64$"):
            make(plain, rows=rows)
    assert not list(tmp_path.iterdir())
    assert not (plain / "engines").exists()


def test_quantizing_keeps_them_over_its_own_weights(packed: Path, tmp_path: Path) -> None:
    bundle = quantize_bundle(packed, tmp_path / "half", precision="latent=fp16,decoder=fp16")
    assert load_manifest(bundle).rows == (2, 3)
    for stage in STAGES:
        one, together = (
            onnx.load(bundle / name, load_external_data=False).graph.initializer
            for name in (f"{stage}.onnx", packed_graph_file(stage, 2))
        )
        assert list(one) == list(together)
    check_generation(bundle)


def check_generation(bundle: Path) -> None:
    """Texts made together are those made one by one."""
    model = BltModel.load(bundle, "cpu", 1, portable=True, prefill_chunk=16)
    assert model.rows == (2, 3)
    options = GenerationOptions(max_new_bytes=24, draft="none")
    together = model.generate_many(PROMPTS, options)
    assert [result.data for result in together] == [model.generate(each, options).data for each in PROMPTS]


def test_the_runtime_runs_them(packed: Path) -> None:
    check_generation(packed)


def test_texts_are_scored_alike_with_and_without(plain: Path, packed: Path) -> None:
    first, second = (BltModel.load(each, "cpu", 1, portable=True) for each in (plain, packed))
    assert np.array_equal(first.logits(PROMPTS[0]), second.logits(PROMPTS[0]))
