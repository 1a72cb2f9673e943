"""`blt-edge score`: one line per file, and a total that is the bytes' mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel


def test_table(cli, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"The first text.")
    (tmp_path / "b.txt").write_bytes(bytes(range(256)))
    result = cli("score", "-m", tiny_model.bundle, tmp_path / "a.txt", tmp_path / "b.txt", "--context", 100)
    assert result.exit_code == 0
    header, _, first, second, _, total = result.stdout.splitlines()
    assert header.split() == ["file", "bytes", "patches", "bytes/patch", "bits/byte", "bytes/s"]
    assert first.split()[:2] == [str(tmp_path / "a.txt"), "15"]
    assert second.split()[:2] == [str(tmp_path / "b.txt"), "256"]
    assert total.split()[:2] == ["total", "271"]
    assert result.stderr == "scoring a.txt\nscoring b.txt\n"


def test_json_agrees_with_the_runtime(cli, tiny_model, tmp_path: Path) -> None:
    texts = {"a.txt": b"The first text.", "stdin": bytes(range(256)) * 2}
    (tmp_path / "a.txt").write_bytes(texts["a.txt"])
    flags = ("--context", 100, "--json", "-", "-q")
    result = cli("score", "-m", tiny_model.bundle, tmp_path / "a.txt", "-", *flags, stdin=texts["stdin"])
    document = json.loads(result.stdout)
    assert result.stderr == ""
    model = BltModel.load(tiny_model.bundle, threads=1)
    bits = 0.0
    for line, (name, text) in zip(document["files"], texts.items(), strict=True):
        score = model.score(text, context=100)
        bits += score.bits_per_byte * len(text)
        assert Path(line["file"]).name == name
        assert line["bits_per_byte"] == pytest.approx(score.bits_per_byte)
        assert line["windows"] == score.windows
        assert line["patches"] == score.patches - score.windows
        assert line["bytes_per_patch"] == pytest.approx(len(text) / line["patches"])
    assert document["context"] == 100
    assert document["total"]["bits_per_byte"] == pytest.approx(bits / sum(map(len, texts.values())))


def test_json_to_a_file_keeps_the_table(cli, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    result = cli("score", "-m", tiny_model.bundle, tmp_path / "a.txt", "--json", tmp_path / "out.json")
    assert "bits/byte" in result.stdout
    assert "total" not in result.stdout
    assert json.loads((tmp_path / "out.json").read_text())["context"] == 500


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gone.txt"], "FILE: gone.txt does not exist"),
        (["/"], "FILE: / is a directory; give a file"),
        (["-"], "FILE: stdin is empty; there is nothing to score"),
        (["-", "-"], "FILE: - is given twice"),
        ([__file__, "--context", "1"], "--context: got 1, a whole number from 2 to 500 is needed"),
        ([__file__, "--context", "501"], "--context: got 501"),
        ([], "FILE is missing"),
    ],
)
def test_wrong_usage(refused, tiny_model, arguments: list[str], line: str) -> None:
    assert refused("score", "-q", "-m", tiny_model.bundle, *arguments).startswith(line)
