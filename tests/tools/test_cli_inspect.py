"""`blt-edge inspect`: what is shown, and what makes it fail; the memory that is foretold."""

from __future__ import annotations

import base64
import json
import re
from functools import partial
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.vocabulary import encode
from blt_edge.tools.cli.inspect import LINTS
from blt_edge.tools.memory import state_memory
from support.processors import ARM, become, elsewhere


def test_shows_what_is_there(cli, own_bundle: Path) -> None:
    result = cli("inspect", own_bundle, code=0)
    assert result.stderr == ""
    for words in ("huggingface layout", "ok (fast check", "patcher.onnx", "tables.bin", "at full length"):
        assert words in result.stdout
    assert "validation  none" in result.stdout


def test_shows_every_record_this_processors_first(
    cli, own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(monkeypatch, tmp_path, "aarch64", ARM)
    manifest = load_manifest(own_bundle).with_validation(elsewhere(None, "logits", "greedy"))
    for record in (elsewhere("aarch64 with dot product"), elsewhere("aarch64 with i8mm", "patcher")):
        manifest = manifest.with_validation(record)
    write_manifest(own_bundle, manifest)
    what = "checks against a golden file, 20 bytes of text, on"
    shown = cli("inspect", own_bundle, code=0).stdout.splitlines()
    first = next(number for number, line in enumerate(shown) if line.startswith("validation"))
    assert [" ".join(line.split()) for line in shown[first : first + 3]] == [
        f"validation passed, 1 {what} aarch64 with dot product (A Z80, ONNX Runtime 1.0)",
        f"FAILED (patcher), 1 {what} aarch64 with i8mm (A Z80, ONNX Runtime 1.0)",
        f"FAILED (logits, greedy), 2 {what} an unnamed processor",
    ]
    document = json.loads(cli("inspect", own_bundle, "--json", "-").stdout)
    records = document["manifest"]["validation"]
    assert [(one["kernels"], one["onnxruntime"], one["report"]["passed"]) for one in records] == [
        (None, None, False),
        ("aarch64 with dot product", "1.0", True),
        ("aarch64 with i8mm", "1.0", False),
    ]


def test_json_is_one_document_with_the_whole_manifest(cli, tiny_model) -> None:
    document = json.loads(cli("inspect", tiny_model.bundle, "--json", "-", "--verify", "-q").stdout)
    assert document["manifest"] == load_manifest(tiny_model.bundle).to_dict()
    assert document["check"] == {"whole_files": True, "fault": None}
    on_disk = {path.name: path.stat().st_size for path in tiny_model.bundle.iterdir()}
    assert document["bytes"] == sum(on_disk.values()) - on_disk["manifest.json"]


def test_what_is_damaged_fails(cli, refused, own_bundle: Path, tmp_path: Path) -> None:
    with (own_bundle / "encoder.onnx").open("r+b") as file:
        file.write(b"x")
    result = cli("inspect", own_bundle, code=1)
    assert "DAMAGED" in result.stdout
    assert result.stderr.startswith("blt-edge: error: encoder.onnx was changed")
    # A graph that may be hostile is not parsed.
    document = json.loads(cli("inspect", own_bundle, "--lint", "tensorrt-11", "--json", "-").stdout)
    assert "encoder.onnx was changed" in document["check"]["fault"]
    assert document["lint"] == {"target": "tensorrt-11", "findings": None}
    manifest = own_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace("fp32", "fp16"))
    assert "manifest.json was changed" in refused("inspect", own_bundle, code=1)
    assert "has no manifest.json" in refused("inspect", tmp_path, "--json=-")


def test_lint_lists_each_kind_once_and_fails(cli, own_bundle: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'blt-edge[export]'")
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[4])
    nodes = [onnx.helper.make_node("Unique", ["x"], [name], name=f"make {name}") for name in "yz"]
    graph = onnx.helper.make_graph(nodes, "encoder", [value("x")], [value("y"), value("z")])
    imports = [onnx.helper.make_opsetid("", 20)]
    path = own_bundle / "encoder.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports), path)
    manifest = load_manifest(own_bundle)
    write_manifest(own_bundle, manifest.with_files({**manifest.files, path.name: file_record(path)}))
    command = ("inspect", own_bundle, "--lint", "tensorrt-10.3")
    result = cli(*command, code=1)
    assert "encoder: 2 x Unique, first make y\n    there is no such operator" in result.stdout
    assert re.match(r"blt-edge: error: TensorRT 10\.3 .* would refuse .*: encoder\n$", result.stderr)
    document = json.loads(cli(*command, "--json", "-").stdout)
    assert document["lint"]["target"] == "tensorrt-10.3"
    assert [finding["node"] for finding in document["lint"]["findings"]] == ["make y", "make z"]


def test_lint_of_our_own(cli, refused, tiny_model) -> None:
    from blt_edge.export.lint_tensorrt import RULES

    assert tuple(RULES) == LINTS
    for target in LINTS:
        result = cli("inspect", tiny_model.bundle, "--lint", target, code=0)
        assert result.stderr == ""
        assert result.stdout.endswith("would refuse nothing that can be seen in the graphs\n")
    document = json.loads(cli("inspect", tiny_model.bundle, "--lint", target, "--json", "-").stdout)
    assert document["lint"] == {"target": target, "findings": []}
    assert "--lint: got 'tensorrt-7'" in refused("inspect", tiny_model.bundle, "--lint", "tensorrt-7")


def test_state_memory_is_what_the_runtime_takes(model: BltModel) -> None:
    foretold = state_memory(model.manifest)
    sequence = model.sequence()
    sequence.append(encode((bytes(range(256)) * 2)[: foretold.positions - 1]))
    assert sequence.length == foretold.positions
    taken = sequence.state_bytes
    patches = foretold.patches * foretold.per_patch
    # The global cache is made for as many patches as it may need at once, and buffers are powers of two.
    assert foretold.at_full_length - patches <= taken + foretold.per_patch
    assert taken <= 1.5 * (foretold.fixed + foretold.windowed + foretold.positions * foretold.per_patch)
    assert state_memory(model.manifest, prefill_chunk=512).fixed > foretold.fixed
    assert state_memory(model.manifest, rollback=0).windowed < foretold.windowed


def test_a_saved_state_is_described(cli, refused, tiny_model, model: BltModel, tmp_path: Path) -> None:
    sequence = model.sequence()
    sequence.append(encode(b"\xff first\n" + "ü".encode() * 100 + b"\x1b last\\"))
    path = tmp_path / "a.state"
    sequence.save(path)
    result = cli("inspect", path, code=0)
    assert result.stderr == ""
    shown = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    shown = {name: told.strip() for name, told in shown.items()}
    patches = sequence.boundaries.count - 1
    assert shown["bundle"] == f"checkpoint, fingerprint {model.manifest.fingerprint[:16]}"
    assert shown["text"] == f"215 bytes in {patches} patches"
    assert shown["engine"] == "portable graphs"
    assert shown["begins with"].startswith("\\xff first\\nü")
    assert shown["ends with"].endswith("\\x1b last\\\\")
    document = json.loads(cli("inspect", path, "--verify", "--json", "-", "-q", code=0).stdout)
    assert document["bundle"] == model.manifest.fingerprint
    assert (document["text_bytes"], document["patches"]) == (215, patches)
    assert (document["bytes"], document["check"]) == (path.stat().st_size, {"whole_file": True})
    assert base64.b64decode(document["end_base64"]).endswith(b"\x1b last\\")
    assert document["beginning"].startswith("\ufffd first")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "(fast check" in cli("inspect", path, code=0).stdout
    assert "was changed after it was written" in refused("inspect", path, "--verify", code=1)
    assert "--lint is of a bundle's graphs" in refused("inspect", path, "--lint", "tensorrt-11")
    path.write_bytes(b"some notes")
    assert f"{path}: it is no saved state" in refused("inspect", path, code=1)
    assert "BUNDLE|STATE" in refused("inspect", tmp_path / "gone")
