"""Bundles in huggingface_hub's cache, where files are links, and under names that are no UTF-8."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from blt_edge.export.build_ort import build_engine
from blt_edge.export.quantize import QuantizationOptions, quantize_bundle
from blt_edge.runtime import BltModel
from blt_edge.runtime import paths as module
from blt_edge.runtime.embedding import EmbeddingTable
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.files import bytes_on_disk
from blt_edge.runtime.integrity import check_files
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.paths import linked_blob, native_path
from support.quantized import BLOCKY
from support.random_models import export_random_model

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names, or no /proc")


def cached(bundle: Path, hub: Path) -> Path:
    """The bundle as `snapshot_download` leaves it."""
    repository = hub / "models--me--bundle"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(bundle.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def open_bundle(directory: Path) -> None:
    manifest = load_manifest(directory)
    check_files(directory, manifest, full=True)
    EmbeddingTable.open(directory, manifest.embedding)


def test_a_bundle_in_the_cache_is_one(bundle: Path, tmp_path: Path) -> None:
    snapshot = cached(bundle, tmp_path / "hub")
    open_bundle(snapshot)
    (tmp_path / "short").symlink_to(snapshot)
    open_bundle(tmp_path / "short")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_bundle_in_the_cache_is_quantized_and_built(tmp_path: Path, precision: str) -> None:
    """Weights are read for both, and neither onnx_ir nor ONNX Runtime reads any through a link."""
    snapshot = cached(export_random_model(BLOCKY, tmp_path / "float"), tmp_path / "hub")
    how = QuantizationOptions(windows=2, smooth=0.5 if precision == "int8" else None)
    small = quantize_bundle(snapshot, tmp_path / "small", precision=precision, quantization=how)
    linked = cached(small, tmp_path / "other")
    assert build_engine(linked).directory is not None
    model = BltModel.load(linked)
    assert model.engine.reason is None
    assert bytes_on_disk(linked) > load_manifest(linked).total_bytes


@pytest.mark.parametrize(
    "target",
    [
        "{hub}/outside",  # by any name
        "../../../models--me--other/blobs/x",  # another repository's
        "../../refs/x",  # not a blob
        "../{revision}/patcher.onnx",  # a link's own place
        "../../blobs/leaves",  # a blob that is a link itself
        "../../blobs",  # no file
        "../../blobs/none",
    ],
)
def test_links_that_leave_the_cache_are_refused(bundle: Path, tmp_path: Path, target: str) -> None:
    hub = tmp_path / "hub"
    snapshot = cached(bundle, hub)
    blob = (snapshot / "tables.bin").resolve()
    for name in ("outside", "models--me--other/blobs/x", "models--me--bundle/refs/x"):
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        (hub / name).write_bytes(blob.read_bytes())
    (hub / "models--me--bundle/blobs/leaves").symlink_to(hub / "outside")
    (snapshot / "tables.bin").unlink()
    (snapshot / "tables.bin").symlink_to(target.format(hub=hub, revision=snapshot.name))
    with pytest.raises(BundleError, match=r"tables\.bin|patcher\.onnx"):
        open_bundle(snapshot)


def test_elsewhere_a_folder_of_that_name_is_no_cache(bundle: Path, tmp_path: Path) -> None:
    snapshot = cached(bundle, tmp_path)
    (tmp_path / "models--me--bundle").rename(tmp_path / "mine")
    moved = tmp_path / "mine" / "snapshots" / snapshot.name
    assert linked_blob(moved / "tables.bin") is None
    with pytest.raises(BundleError, match="is a link"):
        open_bundle(moved)


@linux
def test_it_runs_and_is_built_there_and_under_a_name_of_other_bytes(
    tiny_bundle: Path, model: BltModel, tmp_path: Path
) -> None:
    hub = Path(os.fsdecode(os.fsencode(tmp_path) + b"/h\xe9t\xe9"))
    snapshot = cached(tiny_bundle, hub)
    wanted = model.logits(b"some text")
    loaded = BltModel.load(snapshot, device="cpu", threads=1)
    np.testing.assert_array_equal(loaded.logits(b"some text"), wanted)
    build_engine(snapshot)
    built = BltModel.load(snapshot, device="cpu", threads=1)
    assert built.engine.directory is not None
    np.testing.assert_allclose(built.logits(b"some text"), wanted, rtol=1e-4, atol=1e-4)


@linux
def test_names_for_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with native_path(tmp_path / "a\u00e9") as name:
        assert name == str(tmp_path / "a\u00e9")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    odd.mkdir()
    file = odd / os.fsdecode(b"\xff.bin")
    file.write_text("x")
    (odd / "beside").write_text("y")
    for path, text in ((file, "x"), (odd / "beside", "y")):
        with native_path(path) as name:
            assert name.encode()
            assert Path(name).read_text() == text
    with native_path(odd / "new") as name:
        Path(name).write_text("z")
        assert (Path(name).parent / "beside").read_text() == "y"
    assert (odd / "new").read_text() == "z"
    assert not Path(name).exists()
    monkeypatch.setattr(module, "_DESCRIPTORS", tmp_path / "none")
    with pytest.raises(BundleError, match="is no UTF-8"), native_path(odd / "new"):
        pass
