"""What happens with graphs that are not what the manifest says."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from blt_edge.runtime import BltError, BltModel, BundleError
from blt_edge.runtime.backends.ort_session import import_onnxruntime, new_session, session_options
from blt_edge.runtime.backends.signatures import check_signature, check_weights_file
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest
from onnx import helper


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def seal(bundle: Path) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    manifest = load_manifest(bundle)
    write_manifest(bundle, manifest.with_files({name: file_record(bundle / name) for name in manifest.files}))


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("decoder", {"layers": 1}),
        ("decoder", {"layers": 3}),
        ("encoder", {"kv_heads": 9}),
        ("latent", {"head_dim": 2}),
        ("patcher", {"kv_heads": 1}),
    ],
)
def test_a_manifest_that_misdescribes_a_graph_is_refused(
    bundle: Path, stage: str, change: dict[str, int]
) -> None:
    manifest = load_manifest(bundle)
    stages = {**manifest.stages, stage: replace(manifest.stages[stage], **change)}
    write_manifest(bundle, replace(manifest, stages=stages))
    with pytest.raises(BundleError, match=f"{stage}.onnx: (in|out)put"):
        BltModel.load(bundle, threads=1)


def test_exchanged_graphs_are_refused(bundle: Path) -> None:
    shutil.copy(bundle / "encoder.onnx", bundle / "decoder.onnx")
    shutil.copy(bundle / "encoder.onnx.data", bundle / "decoder.onnx.data")
    seal(bundle)
    with pytest.raises(BltError, match=r"decoder\.onnx"):
        BltModel.load(bundle, threads=1)


@pytest.mark.parametrize("junk", [b"", b"not a graph", bytes(range(256)) * 40])
def test_a_file_that_is_no_graph_gets_one_line(bundle: Path, junk: bytes) -> None:
    (bundle / "encoder.onnx").write_bytes(junk)
    seal(bundle)
    with pytest.raises(BltError) as caught:
        BltModel.load(bundle, threads=1)
    assert "encoder.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["../secret.data", "/etc/passwd"])
def test_weights_outside_the_bundle_are_refused(bundle: Path, location: str) -> None:
    shutil.copy(bundle / "encoder.onnx.data", bundle.parent / "secret.data")
    proto = onnx.load(bundle / "encoder.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(proto, bundle / "encoder.onnx")
    seal(bundle)
    with pytest.raises(
        BundleError, match=r"^encoder\.onnx: its weights do not all lie in encoder\.onnx\.data"
    ):
        BltModel.load(bundle, threads=1)


@pytest.mark.parametrize(
    "spelling",
    [
        b"\x6a\x1a\x12\x0e../secret.data\x0a\x08location",  # the value first
        b"\x6a\x1b\x0a\x88\x00location\x12\x0e../secret.data",  # a length in two bytes
        b"\x6a\x2d\x0a\x08location\x12\x11encoder.onnx.data\x12\x0e../secret.data",  # the last value counts
    ],
)
def test_weights_elsewhere_are_refused_however_they_are_spelled(tmp_path: Path, spelling: bytes) -> None:
    graph = tmp_path / "encoder.onnx"
    right = b"\x6a\x1d\x0a\x08location\x12\x11encoder.onnx.data"
    graph.write_bytes(b"..." + right + b"..." + right)
    check_weights_file(graph, "encoder.onnx.data")
    graph.write_bytes(b"..." + right + b"..." + spelling)
    with pytest.raises(BundleError, match="do not all lie in encoder"):
        check_weights_file(graph, "encoder.onnx.data")


@pytest.mark.parametrize("axis", ["\x1b[2J", "\u202e", "\U0010ffff", "x" * 5000])
def test_an_axis_named_by_a_graph_is_shown_safely(axis: str) -> None:
    with pytest.raises(BundleError, match=r"input 'x' is \[") as caught:
        check_signature("encoder.onnx", ({"x": (1,)}, {}), ({"x": (axis, 1)}, {}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_size_beyond_all_memory_is_no_line_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    size = helper.make_tensor("size", onnx.TensorProto.INT64, [1], [2**63 - 1])
    node = helper.make_node("ConstantOfShape", ["size"], ["y"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [], [y], [size])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    ort = import_onnxruntime()
    with suppress(BltError):
        new_session(ort, "x.onnx", model.SerializeToString(), session_options(ort, "fp32", 1))
    assert capfd.readouterr().err == ""
