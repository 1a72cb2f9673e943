"""`blt-edge inspect`, and the memory it foretells."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.host import available_memory, peak_resident
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.vocabulary import encode
from blt_edge.tools.cli.inspect import LINTS
from blt_edge.tools.memory import state_memory


def test_shows_what_is_there(cli, own_bundle) -> None:
    write_manifest(own_bundle, load_manifest(own_bundle).with_validation(None))
    result = cli("inspect", own_bundle)
    assert result.exit_code == 0
    assert result.stderr == ""
    for word in (
        "checkpoint (huggingface layout)",
        "ok (fast check",
        "patcher.onnx",
        "tables.bin",
        "patch_slots",
    ):
        assert word in result.stdout
    assert "validation  none; blt-edge validate compares" in result.stdout
    assert "at full length" in result.stdout


def test_json_is_one_document_with_the_whole_manifest(cli, tiny_model) -> None:
    result = cli("inspect", tiny_model.bundle, "--json", "-", "--verify", "-q")
    document = json.loads(result.stdout)
    assert document["manifest"] == load_manifest(tiny_model.bundle).to_dict()
    assert document["check"] == {"whole_files": True, "fault": None}
    assert document["bytes"] == sum(
        path.stat().st_size for path in tiny_model.bundle.iterdir() if path.name != "manifest.json"
    )


def test_a_damaged_file_is_shown_and_fails(cli, own_bundle: Path) -> None:
    with (own_bundle / "encoder.onnx").open("r+b") as file:
        file.write(b"x")
    result = cli("inspect", own_bundle)
    assert result.exit_code == 1
    assert "DAMAGED" in result.stdout
    assert result.stderr.startswith("blt-edge: error: encoder.onnx was changed")
    document = json.loads(cli("inspect", own_bundle, "--json", "-").stdout)
    assert "encoder.onnx was changed" in document["check"]["fault"]


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


def test_state_memory_is_what_the_runtime_takes(tiny_model) -> None:
    model = BltModel.load(tiny_model.bundle, threads=1)
    foretold = state_memory(model.manifest)
    sequence = model.sequence()
    text = bytes(range(256)) * 2
    sequence.append(encode(text[: foretold.positions - 1]))
    assert sequence.length == foretold.positions
    taken = sequence.state_bytes
    patches = foretold.patches * foretold.per_patch
    # The global cache is made for as many patches as it may need at once, and buffers are powers of two.
    assert foretold.at_full_length - patches <= taken + foretold.per_patch
    most = foretold.fixed + foretold.windowed + foretold.positions * foretold.per_patch
    assert taken <= 1.5 * most


def test_state_memory_of_a_longer_chunk_is_larger(tiny_model) -> None:
    manifest = load_manifest(tiny_model.bundle)
    assert state_memory(manifest, prefill_chunk=512).fixed > state_memory(manifest).fixed
    assert state_memory(manifest, rollback=0).windowed < state_memory(manifest).windowed


def test_the_machine_is_asked() -> None:
    peak, free = peak_resident(), available_memory()
    assert peak is None or peak > 1 << 20
    assert free is None or free > 0


@pytest.mark.parametrize("flag", ["--verify", "--json=-"])
def test_wrong_bundle(cli, tmp_path: Path, flag: str) -> None:
    result = cli("inspect", tmp_path, flag)
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


@pytest.mark.parametrize("target", LINTS)
def test_lint_of_our_own(cli, tiny_model, target: str) -> None:
    result = cli("inspect", tiny_model.bundle, "--lint", target)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("would refuse nothing that can be seen in the graphs\n")
    document = json.loads(cli("inspect", tiny_model.bundle, "--lint", target, "--json", "-").stdout)
    assert document["lint"] == {"target": target, "findings": []}


def test_lint_of_a_damaged_bundle_is_not_made(cli, own_bundle: Path) -> None:
    (own_bundle / "encoder.onnx").write_bytes(b"")
    result = cli("inspect", own_bundle, "--lint", "tensorrt-11", "--json", "-")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["lint"] == {"target": "tensorrt-11", "findings": None}


def test_lint_knows_its_targets(cli, tiny_model) -> None:
    from blt_edge.export.lint_tensorrt import RULES

    assert tuple(RULES) == LINTS
    result = cli("inspect", tiny_model.bundle, "--lint", "tensorrt-7")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--lint: got 'tensorrt-7', this version has tensorrt-10.3 or tensorrt-11 or" in result.stderr
