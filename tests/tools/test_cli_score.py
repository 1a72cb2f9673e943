"""`blt-edge score`: one line per file, and a total that is the bytes' mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel


def test_table(cli, tiny_model, tmp_path: Path) -> None:
    one, other = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_bytes(b"The first text.")
    other.write_bytes(bytes(range(256)))
    result = cli("score", "-m", tiny_model.bundle, one, other, "--context", 100, code=0)
    header, _, *lines, _, total = result.stdout.splitlines()
    assert header.split() == ["file", "bytes", "patches", "bytes/patch", "bits/byte", "bytes/s"]
    rows = [line.split()[:2] for line in (*lines, total)]
    assert rows == [[str(one), "15"], [str(other), "256"], ["total", "271"]]
    assert result.stderr == "scoring a.txt\nscoring b.txt\n"
    alone = cli("score", "-m", tiny_model.bundle, one, "--json", tmp_path / "out.json")
    assert "bits/byte" in alone.stdout
    assert "total" not in alone.stdout
    assert json.loads((tmp_path / "out.json").read_text())["context"] == 500


def test_json_agrees_with_the_runtime(cli, tiny_model, model: BltModel, tmp_path: Path) -> None:
    texts = {"a.txt": b"The first text.", "stdin": bytes(range(256)) * 2}
    (tmp_path / "a.txt").write_bytes(texts["a.txt"])
    flags = ("--context", 100, "--json", "-", "-q")
    result = cli("score", "-m", tiny_model.bundle, tmp_path / "a.txt", "-", *flags, stdin=texts["stdin"])
    document = json.loads(result.stdout)
    assert (result.stderr, document["context"]) == ("", 100)
    bits = 0.0
    for line, (name, text) in zip(document["files"], texts.items(), strict=True):
        score = model.score(text, context=100)
        bits += score.bits_per_byte * len(text)
        told = (Path(line["file"]).name, line["windows"], line["patches"])
        assert told == (name, score.windows, score.patches - score.windows)
        assert line["bits_per_byte"] == pytest.approx(score.bits_per_byte)
        assert line["bytes_per_patch"] == pytest.approx(len(text) / line["patches"])
    assert document["total"]["bits_per_byte"] == pytest.approx(bits / sum(map(len, texts.values())))
