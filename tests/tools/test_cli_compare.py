"""`blt-edge compare`: tables of what `compare.bundles` measures."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from blt_edge.runtime.errors import requirement

QUICK = ("--context", 60, "--prompts", 1, "--lead-bytes", 4, "--prompt-bytes", 20, "--new-bytes", 4)
QUICK = (*QUICK, "--repeat", 1, "--threads", 1)


def test_tables_and_json(cli, tiny_model, tmp_path: Path) -> None:
    from blt_edge.export import export_checkpoint

    small_tables = export_checkpoint(tiny_model.checkpoint, tmp_path / "small", tables="int4")
    (tmp_path / "a.txt").write_bytes(b"The first text, and some more of it.")
    (tmp_path / "b.txt").write_bytes(bytes(range(256)))
    files = (tmp_path / "a.txt", tmp_path / "b.txt", "--json", tmp_path / "out.json")
    result = cli("compare", tiny_model.bundle, small_tables, "--text", *files, *QUICK, code=0)
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["text_bytes"] == {"a.txt": 36, "b.txt": 256}
    first, second = document["bundles"]
    assert [first["tables"], second["tables"]] == ["fp32", "int4"]
    assert first["total"]["mean_kl_bits"] == 0 < second["total"]["mean_kl_bits"]
    lines = result.stdout.splitlines()
    assert "b.txt, 256 bytes" in lines
    assert lines[0] == "a.txt, 36 bytes"
    columns = ["bundle", "bits/byte", "more", "KL", "bits", "argmax", "false", "missed"]
    assert [line.split() for line in lines if "bits/byte" in line] == [columns] * 3
    figures = [text["bits_per_byte"] for text in (second["texts"]["a.txt"], first["texts"]["a.txt"])]
    assert lines[4].split()[:3] == ["small", f"{figures[0]:.4f}", f"{figures[0] - figures[1]:+.4f}"]
    # Over several texts there is a total; what it says is the JSON's.
    row = lines.index("all 2 texts, 292 bytes") + 4
    more = second["against_first"]["more_bits_per_byte"]
    assert lines[row].split()[:3] == ["small", f"{second['total']['bits_per_byte']:.4f}", f"{more:+.4f}"]
    assert max(map(len, result.stdout.splitlines()[:-4])) <= 80
    assert {"bundle: loading", "small: text 2 of 2"} <= {*result.stderr.splitlines()}


def test_what_ran_and_all_that_lies_on_disk_are_told(cli, tiny_model, tmp_path: Path) -> None:
    built = tmp_path / "built"
    shutil.copytree(tiny_model.bundle, built)
    cli("build", built, "-q", code=0)
    (tmp_path / "a.txt").write_bytes(b"Some text of which nobody knows the end.")
    files = ("--text", tmp_path / "a.txt", "--json", tmp_path / "out.json", "-q")
    shown = cli("compare", tiny_model.bundle, built, *files, *QUICK, code=0).stdout
    first, second = json.loads((tmp_path / "out.json").read_text())["bundles"]
    assert (first["built"], second["built"]) == (False, True)
    assert second["engine"].startswith("engines/onnxruntime-")
    assert second["disk_bytes"] == sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    head = next(line.split() for line in shown.splitlines() if " engine " in line)
    assert head == ["bundle", "engine", "on", "disk", "graphs", "tables"]
    rows = [line.split()[:2] for line in shown.splitlines() if " portable " in line or " built " in line]
    assert rows[:2] == [["bundle", "portable"], ["built", "built"]]
    assert f"do not compare: {tiny_model.bundle}; " in shown
    assert "all 1 texts" not in shown
    assert " bytes of 4, 1 prompt; " in shown


def test_json_alone_on_stdout(cli, tiny_model) -> None:
    flags = ("--json", "-", "-q", "--max-bytes", 30)
    result = cli("compare", tiny_model.bundle, "--text", "-", *flags, *QUICK, stdin=b"some text " * 10)
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["text_bytes"] == {"stdin": 30}


def test_a_picture_needs_matplotlib(cli, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    files = ("--text", tmp_path / "a.txt", "--plot", tmp_path / "p.png")
    assert f"pip install {requirement('plot')}" in cli("compare", tiny_model.bundle, *files, code=1).stderr
