"""`blt-edge inspect`: what is shown, and what makes it fail."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.tools.cli.inspect import LINTS


def test_shows_what_is_there(cli, own_bundle: Path) -> None:
    write_manifest(own_bundle, load_manifest(own_bundle).with_validation(None))
    result = cli("inspect", own_bundle)
    assert (result.exit_code, result.stderr) == (0, "")
    for words in (
        "checkpoint (huggingface layout)",
        "ok (fast check",
        "patcher.onnx",
        "tables.bin",
        "patch_slots",
        "validation  none; blt-edge validate compares",
        "at full length",
    ):
        assert words in result.stdout


def test_json_is_one_document_with_the_whole_manifest(cli, tiny_model) -> None:
    result = cli("inspect", tiny_model.bundle, "--json", "-", "--verify", "-q")
    document = json.loads(result.stdout)
    assert document["manifest"] == load_manifest(tiny_model.bundle).to_dict()
    assert document["check"] == {"whole_files": True, "fault": None}
    on_disk = {path.name: path.stat().st_size for path in tiny_model.bundle.iterdir()}
    assert document["bytes"] == sum(on_disk.values()) - on_disk["manifest.json"]


def test_a_damaged_file_is_shown_and_fails(cli, own_bundle: Path) -> None:
    with (own_bundle / "encoder.onnx").open("r+b") as file:
        file.write(b"x")
    result = cli("inspect", own_bundle)
    assert result.exit_code == 1
    assert "DAMAGED" in result.stdout
    assert result.stderr.startswith("blt-edge: error: encoder.onnx was changed")
    # A graph that may be hostile is not parsed.
    document = json.loads(cli("inspect", own_bundle, "--lint", "tensorrt-11", "--json", "-").stdout)
    assert "encoder.onnx was changed" in document["check"]["fault"]
    assert document["lint"] == {"target": "tensorrt-11", "findings": None}


def test_a_damaged_manifest_fails(cli, own_bundle: Path) -> None:
    manifest = own_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace("fp32", "fp16"))
    result = cli("inspect", own_bundle)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "manifest.json was changed" in result.stderr


def test_a_failed_validation_is_shown(cli, own_bundle: Path) -> None:
    rows = [{"check": "logits", "ok": False}, {"check": "greedy", "ok": True}]
    report = {"passed": False, "against": "golden", "data_bytes": 9, "rows": rows}
    write_manifest(own_bundle, load_manifest(own_bundle).with_validation(report))
    assert "FAILED (logits), 2 checks against golden" in cli("inspect", own_bundle).stdout


def test_no_bundle(cli, tmp_path: Path) -> None:
    result = cli("inspect", tmp_path, "--json=-")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has no manifest.json" in result.stderr


@pytest.fixture
def two_findings(tmp_path: Path) -> Path:
    """A bundle whose encoder has two nodes of one kind that no TensorRT takes."""
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'blt-edge[export]'")
    from support.bundles import describe, write_bundle

    directory = tmp_path / "bundle"
    write_bundle(directory)
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[4])
    for stage in describe().stages:
        operator = "Unique" if stage == "encoder" else "Relu"
        nodes = [onnx.helper.make_node(operator, ["x"], [name], name=f"make {name}") for name in ("y", "z")]
        graph = onnx.helper.make_graph(nodes, stage, [value("x")], [value("y"), value("z")])
        imports = [onnx.helper.make_opsetid("", 20)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=imports), directory / f"{stage}.onnx")
    names = [path for path in directory.iterdir() if path.name != "manifest.json"]
    write_manifest(directory, describe().with_files({path.name: file_record(path) for path in names}))
    return directory


def test_lint_lists_each_kind_once_and_fails(cli, two_findings: Path) -> None:
    result = cli("inspect", two_findings, "--lint", "tensorrt-10.3")
    assert result.exit_code == 1
    assert (
        "encoder: 2 x Unique, first make y\n    there is no such operator; use the portable" in result.stdout
    )
    assert result.stderr.startswith("blt-edge: error: TensorRT 10.3 (JetPack 6.1 and 6.2) would refuse ")
    assert result.stderr.endswith(": encoder\n")
    document = json.loads(cli("inspect", two_findings, "--lint", "tensorrt-10.3", "--json", "-").stdout)
    assert document["lint"]["target"] == "tensorrt-10.3"
    assert [finding["node"] for finding in document["lint"]["findings"]] == ["make y", "make z"]


def test_lint_of_our_own(cli, tiny_model) -> None:
    from blt_edge.export.lint_tensorrt import RULES

    assert tuple(RULES) == LINTS
    for target in LINTS:
        result = cli("inspect", tiny_model.bundle, "--lint", target)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.endswith("would refuse nothing that can be seen in the graphs\n")
    document = json.loads(cli("inspect", tiny_model.bundle, "--lint", target, "--json", "-").stdout)
    assert document["lint"] == {"target": target, "findings": []}
    result = cli("inspect", tiny_model.bundle, "--lint", "tensorrt-7")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--lint: got 'tensorrt-7', this version has tensorrt-10.3 or tensorrt-11 or" in result.stderr
