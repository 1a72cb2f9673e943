"""`blt-edge patches`: the text with its patches, files for people and programs, and other rules."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.runtime import BltModel
from support.random_models import RandomModel, base_config, write_random_model
from support.terminal import Terminal

OUTPUTS = ("--csv", "a.csv", "--html", "a.html", "--json", "a.json")
TEXT = "Alice, né 你|好\n\tx".encode() + b"\xff\0"


def test_pipe(cli, tiny_model) -> None:
    result = cli("patches", "-m", tiny_model.bundle, "-", stdin=TEXT)
    assert result.exit_code == 0
    lengths = BltModel.load(tiny_model.bundle, threads=1).patch_lengths(TEXT)[1:]
    text = result.stdout
    assert text.count("\n") == 2
    assert "⏎\n" in text
    assert text.count("│") + text.count("¦") == len(lengths)  # | is in the text
    shown = text.replace("│", "").replace("¦", "").replace("\n", "")
    assert shown == "Alice, né 你|好⏎⇥x\\xff␀"
    legend, counts, rule, *_ = result.stderr.splitlines()
    assert legend.startswith("│ stands before each patch")
    assert counts.startswith(f"{len(TEXT)} bytes, 17 characters, 1 invalid byte, {len(lengths)} patches: ")
    assert rule.startswith("a patch starts where entropy is over ")
    assert "patch lengths in bytes" in result.stderr


def test_quiet(cli, tiny_model) -> None:
    quiet = cli("patches", "-q", "-m", tiny_model.bundle, "some text")
    assert quiet.stderr == ""
    assert quiet.stdout.startswith("|s")


def test_files(cli, tiny_model, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'blt-edge[plot]'")
    (tmp_path / "text").write_bytes(TEXT)
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("png", "html", "json", "csv")}
    result = cli(
        *("patches", "-m", tiny_model.bundle, "--prompt-file", tmp_path / "text", "--plot", paths["png"]),
        *("--html", paths["html"], "--json", paths["json"], "--csv", paths["csv"]),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("│")
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert paths["html"].read_text().startswith("<!DOCTYPE html>")
    document = json.loads(paths["json"].read_text())
    model = BltModel.load(tiny_model.bundle, threads=1)
    for rows in (document["bytes"], list(csv.DictReader(io.StringIO(paths["csv"].read_text())))):
        assert bytes(int(row["byte"]) for row in rows) == TEXT
        assert [np.float32(row["entropy"]) for row in rows] == model.entropies(TEXT)[:-1].tolist()
        starts = [int(row["position"]) for row in rows if int(row["starts_patch"])]
        assert starts == np.cumsum([0, *model.patch_lengths(TEXT)[1:-1]]).tolist()
    assert document["rule"] == document["bundle_rule"]
    assert document["source"] == "checkpoint"
    assert {path.name for path in tmp_path.iterdir()} == {"text", *(path.name for path in paths.values())}


@pytest.mark.parametrize(
    ("flag", "start", "lines"),
    [("--json", "{", None), ("--csv", "position,", 5), ("--html", "<!DOCTYPE", None)],
)
def test_stdout_carries_one_thing(cli, tiny_model, flag: str, start: str, lines: int | None) -> None:
    result = cli("patches", "-m", tiny_model.bundle, "text", flag, "-")
    assert result.exit_code == 0
    assert result.stdout.startswith(start)
    assert lines in (None, len(result.stdout.splitlines()))
    assert result.stderr.startswith("4 bytes, ")


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--threshold", "1"], {"threshold": 1.0}),
        (["--threshold", "0.1", "--monotonic"], {"threshold": 0.1, "monotonic": True}),
        (["--threshold", "1", "--threshold-add", "0.2"], {"threshold": 1.0, "threshold_add": 0.2}),
        (["--threshold", "9", "--max-patch-length", "3"], {"threshold": 9.0, "max_patch_length": 3}),
        (["--mode", "space", "--max-patch-length", "0"], {"mode": "space", "max_patch_length": None}),
        (["--mode", "static", "--patch-size", "4"], {"mode": "static", "patch_size": 4}),
        (["--mode", "byte"], {"mode": "byte"}),
    ],
    ids=str,
)
def test_other_rules(cli, tiny_model, flags: list[str], changes: dict[str, object]) -> None:
    before = (tiny_model.bundle / "manifest.json").read_bytes()
    result = cli("patches", "-q", "-m", tiny_model.bundle, "some more text, né", *flags, "--json", "-")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["rule"] == {**document["bundle_rule"], **changes}
    assert (tiny_model.bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "TEXT is missing;"),
        (["x", "--prompt-file", __file__], "TEXT and --prompt-file are both given"),
        ([""], "TEXT is empty"),
        (["-"], "TEXT: stdin is empty"),
        (["--prompt-file", os.devnull], "--prompt-file: /dev/null is empty"),
        (["x", "--mode", "bpe"], "--mode: got 'bpe'"),
        (["x", "--mode", "space", "--threshold", "1"], "--threshold has no effect in mode space"),
        (["x", "--patch-size", "3"], "--patch-size has no effect in mode entropy"),
        (["x", "--monotonic", "--threshold-add", "1"], "--threshold-add has no effect in a monotonic rule"),
        (["x", "--mode", "static"], "--mode static has no patch_size"),
        (["x", "--max-patch-length", "-1"], "--max-patch-length is -1"),
        (["x", "--threshold", "nan"], "--threshold is nan"),
        (["x", "--plot", "picture.gif"], "--plot: got picture.gif"),
        (["x", "--csv", "-", "--json", "-"], "a file is given twice"),
        (["x", "--html", "/nowhere/x.html"], "--html: the directory /nowhere does not exist"),
        (["x", "--max-memory", "1KB"], "would need about"),
    ],
)
def test_refusals(
    refused, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    """They leave no file."""
    monkeypatch.chdir(tmp_path)
    code = 1 if "--max-memory" in arguments else 2
    assert line in refused("patches", "-m", tiny_model.bundle, *arguments, code=code)
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_a_file_is_taken_as_text_and_said_so(cli, tiny_model) -> None:
    result = cli("patches", "-m", tiny_model.bundle, __file__)
    assert result.stderr.startswith(f"note: this shows the name itself; --prompt-file {__file__} shows what")


def test_without_a_patcher(cli, tmp_path: Path) -> None:
    model = RandomModel("bytes", base_config(patch_in_forward=False), share=None)
    write_random_model(model, tmp_path / "checkpoint")
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    result = cli("patches", "-m", bundle, "é b", "--html", tmp_path / "p.html")
    assert result.exit_code == 0
    assert result.stdout == "|é¦| |b\n"
    assert "nats" not in result.stderr
    static = cli("patches", "-q", "-m", bundle, "abc", "--mode", "static", "--patch-size", "2", "--csv", "-")
    assert static.stdout.splitlines()[1:] == ["0,97,a,0,,1,1,first", "1,98,b,1,,1,0,", "2,99,c,2,,2,1,static"]
    refused = cli("patches", "-m", bundle, "abc", "--mode", "entropy", "--threshold", "1")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("blt-edge: error: this model has no entropy patcher")
    assert cli("patches", "-m", bundle, "abc", "--mode", "entropy").exit_code == 2


@pytest.mark.parametrize(
    ("environment", "colours"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, True),
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm"}, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
    ids=str,
)
def test_terminal(
    tiny_model, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], colours: bool
) -> None:
    for name in ("NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    code = "import sys; from blt_edge.tools.cli import main; main(sys.argv[1:])"
    arguments = ("patches", "-m", tiny_model.bundle, "Some né text\x1b[31m")
    terminal = Terminal(code, arguments, environment)
    assert terminal.end(60) == 0
    out = terminal.raw
    assert ("\x1b[38;" in out) == colours
    assert ("|S" in out) == (not colours)
    assert "\x1b[31m" not in out
    assert "␛" in out
    assert ("a patch starts where the colour changes" in out) == colours


def test_a_text_beyond_the_positions_is_shown_whole_in_windows(cli, tiny_model) -> None:
    result = cli("patches", "-m", tiny_model.bundle, "x" * 1200, code=0)
    assert result.stdout.replace("|", "").replace("\n", "") == "x" * 1200
    assert "read in 3 windows of up to 499 bytes, each from BOS" in result.stderr
