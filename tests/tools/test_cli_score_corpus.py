"""`blt-edge score` over many texts: packed files, lines of JSON, tables, and runs that go on."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import math
import random
import time
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel
from blt_edge.tools.cli import score_corpus
from support.chat import posix, start

TEXTS = ["The first text.", "", "gr\u00fc\u00dfe " * 40, "\n\n  spaces\tand   lines\n"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    lines = [json.dumps({"id": at, "d": {"text": text}}) for at, text in enumerate(TEXTS)]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, '{"id": 5}']).encode()))
    (folder / "b.txt.xz").write_bytes(lzma.compress(b"It is packed. " * 30))
    (folder / "deep" / "c.txt").write_text("plain")
    return folder


WANTED = [
    ("a.jsonl.gz", 1, TEXTS[0]),
    ("a.jsonl.gz", 2, ""),
    ("a.jsonl.gz", 3, TEXTS[2]),
    ("a.jsonl.gz", 4, TEXTS[3]),
    ("a.jsonl.gz", 5, None),
    ("b.txt.xz", None, "It is packed. " * 30),
    ("c.txt", None, "plain"),
]


def test_every_output_says_what_the_runtime_does(
    cli, tiny_model, model: BltModel, corpus: Path, tmp_path: Path
) -> None:
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "jsonl", "csv")}
    files = [part for kind, path in out.items() for part in (f"--{kind}", path)]
    asked = ("score", "-q", "-m", tiny_model.bundle, corpus, "--field", "d.text", "--context", 100)
    result = cli(*asked, *files, code=1)
    assert result.stderr.splitlines() == [
        f"{corpus}/a.jsonl.gz:5: the line has no d.text",
        "blt-edge: error: 1 of 7 texts could not be read",
    ]
    run, *rows, last = map(json.loads, out["jsonl"].read_text().splitlines())
    document = json.loads(out["json"].read_text())
    with out["csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(Path(row["file"]).name, row.get("line")) for row in rows] == [one[:2] for one in WANTED]
    assert document["files"] == rows
    assert {**document, "files": 0, "total": 0, "complete": 0} == {
        **run["run"],
        "files": 0,
        "total": 0,
        "complete": 0,
    }
    bits, words = [], 0
    for row, cells, (_, _, text) in zip(rows, table, WANTED, strict=True):
        assert cells == {**dict.fromkeys(cells, ""), **{name: str(value) for name, value in row.items()}}
        if not text:
            assert row["bytes"] == 0
            assert row["note"] == ("empty" if text == "" else "unreadable: the line has no d.text")
            continue
        score = model.score(text, context=100)
        assert (row["bytes"], row["windows"]) == (score.bytes, score.windows)
        assert row["patches"] == score.patches - score.windows
        assert row["words"] == len(text.encode().split())
        assert row["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-12)
        bits.append(row["bits"])
        words += row["words"]
    total = last["total"]
    assert document["total"] == {
        **total,
        "seconds": document["total"]["seconds"],
        "bytes_per_second": pytest.approx(total["bytes"] / document["total"]["seconds"]),
    }
    assert (total["texts"], total["empty"], total["unread"], total["words"]) == (5, 1, 1, words)
    assert total["bits"] == math.fsum(bits)
    assert total["byte_perplexity"] == pytest.approx(2 ** (total["bits"] / total["bytes"]))
    assert f"{words:,} words; perplexity {total['byte_perplexity']:.4f} a byte" in result.stdout


def test_lines_on_stdout_and_few_rows(cli, tiny_model, corpus: Path, tmp_path: Path) -> None:
    asked = ("score", "-q", "-m", tiny_model.bundle, corpus, "--glob", "*.txt", "--glob", "*.xz")
    out = cli(*asked, "--jsonl", "-", code=0).stdout.splitlines()
    assert [Path(json.loads(line).get("file", "")).name for line in out] == ["", "b.txt.xz", "c.txt", ""]
    few = cli(*asked, "--max-rows", 1, code=0).stdout.splitlines()
    assert [line.split()[0] for line in few[2:]] == [str(corpus / "b.txt.xz"), "...", few[4], "total", "2"]
    none = cli(*asked, "--max-rows", 0, code=0).stdout.splitlines()
    assert [line.split()[0] for line in none[-2:]] == ["total", "2"]
    assert len(none) == 5


def test_a_terminal_is_shown_a_hundred_rows(
    cli, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_corpus, "is_terminal", lambda stream: True)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 103)
    asked = ("score", "-q", "-m", tiny_model.bundle, tmp_path / "a.jsonl", "--field", "text")
    for flags, rows in (((), 100), (("--max-rows", 102), 102), (("--max-rows", 200), 103)):
        lines = cli(*asked, *flags, code=0).stdout.splitlines()
        assert sum(line.startswith(str(tmp_path)) for line in lines) == rows
        assert any(line.startswith("... (--max-rows N shows more") for line in lines) == (rows < 103)


def test_a_sweep_reads_packed_files(cli, tiny_model, corpus: Path) -> None:
    asked = ("score", "-q", "-m", tiny_model.bundle, "--sweep", 1, "--json", "-")
    document = json.loads(cli(*asked, corpus / "b.txt.xz", code=0).stdout)
    assert (document["bytes"], len(document["points"])) == (420, 2)
    (corpus / "bad.gz").write_bytes(b"no gzip")
    told = cli(*asked, corpus / "b.txt.xz", corpus / "bad.gz", code=1)
    assert "unreadable: damaged .gz data" in told.stderr
    assert "bad.gz: damaged" in cli(*asked, corpus / "bad.gz", code=1).stderr


def test_a_packed_file_alone_that_is_damaged(refused, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "a.xz").write_bytes(b"no xz")
    told = refused("score", "-q", "-m", tiny_model.bundle, tmp_path / "a.xz", code=1)
    assert told.startswith(f"{tmp_path}/a.xz: damaged .xz data: ")


def test_a_run_goes_on(cli, tiny_model, corpus: Path, tmp_path: Path) -> None:
    """Its results, written into the corpus itself, are none of its texts."""
    out = corpus / "deep" / "out.jsonl"
    asked = ("score", "-m", tiny_model.bundle, corpus, "--field", "d.text", "--jsonl", out, "--resume")
    first = cli(*asked, code=1)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    again = cli(*asked, "--csv", tmp_path / "out.csv", code=1)
    assert out.read_bytes() == whole
    assert f"{out} tells of 3 texts already" in again.stderr
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert (tmp_path / "out.csv").read_text().count("\n") == 8
    told = cli(*asked, "--context", 50, code=2).stderr
    assert told == (
        f"blt-edge: error: --resume: {out} is of context 500, this run is of 50; "
        "give that one, or another FILE\n"
    )
    assert out.read_bytes() == whole


@posix
def test_kill_loses_and_repeats_no_text(cli, tiny_model, tmp_path: Path) -> None:
    """Killed twice at random moments, it ends in the bytes of a run that nobody disturbed."""
    texts, whole, out = (tmp_path / name for name in ("a.jsonl", "whole", "out"))
    texts.write_text("".join(json.dumps({"text": f"text {number} " * 20}) + "\n" for number in range(80)))
    asked = ("score", "-q", "-m", tiny_model.bundle, texts, "--field", "text", "--threads", 1)
    cli(*asked, "--jsonl", whole, code=0)
    order, lines = random.Random(), 0

    def written() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    for kill in (True, True, False):
        process = start(*asked, "--jsonl", out, "--resume")
        lines += order.randrange(1, 30)
        while kill and process.poll() is None and written() <= lines:
            time.sleep(0.002)
        if kill:
            process.kill()
        process.communicate(timeout=120)
        assert whole.read_bytes().startswith(out.read_bytes())
        if kill:
            with out.open("ab") as file:  # what a kill in the middle of a write leaves
                file.write(b'{"file": "a.js')
    assert process.returncode == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--resume",), "--resume goes on with a file of results; add --jsonl FILE"),
        (("--resume", "--jsonl", "-"), "--resume goes on with a file of results"),
        (("-", "--resume", "--jsonl", "out"), "--resume: stdin can't be read again; give files"),
        (("--resume", "--jsonl", "/dev/null"), "--resume: /dev/null is no plain file"),
        (("--glob", "*.md"), "--glob picks files of folders, and no FILE is a folder"),
        (("--field", "text"), "--field is of lines of JSON, and no FILE ends in .jsonl or .ndjson"),
        (("--field", ""), "--field is empty"),
        (("--max-rows", "-1"), "--max-rows is -1"),
        (("--parquet", "-"), "--parquet: - is stdout"),
        (("--csv", "out", "--jsonl", "out"), "--jsonl, --csv: out is given twice"),
        (("--csv", "out", "--jsonl", "../there/out"), "--jsonl, --csv: out is given twice"),
        (("--json", "-", "--csv", "-"), "--json, --csv: - is given twice"),
        (("--jsonl", "a.txt"), "--jsonl: a.txt is one of the texts; give another FILE to write"),
        (("--csv", "../there/a.txt"), "--csv: ../there/a.txt is one of the texts"),
        (("--parquet", "a.txt"), "--parquet: a.txt is one of the texts"),
        (("--sweep", "1", "--json", "a.txt"), "--json: a.txt is one of the texts"),
        (("--sweep", "1", "--field", "a"), "--field and --sweep are both given"),
        (("--sweep", "1", "--csv", "out"), "--csv and --sweep are both given"),
        (("--sweep", "1", "--max-rows", "0"), "--max-rows and --sweep are both given"),
        (("--sweep", "1", "--resume", "--jsonl", "out"), "--jsonl and --sweep are both given"),
        (("--sweep", "1", "--resume"), "--resume goes on with a file of results"),
        (("--context", "501"), "--context is 501; allowed is a whole number from 2 to 500"),
    ],
)
def test_refused(refused, tiny_model, tmp_path: Path, monkeypatch, flags: tuple[str, ...], line: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    (there / "a.txt").write_bytes(b"text")
    assert line in refused("score", "-m", tiny_model.bundle, "a.txt", "-q", *flags)
    assert [(path.name, path.read_bytes()) for path in there.iterdir()] == [("a.txt", b"text")]


def test_parquet_without_pyarrow_is_refused_at_once(
    refused, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.txt").write_bytes(b"text")
    flags = ("--parquet", tmp_path / "out", "-q")
    told = refused("score", "-m", tiny_model.bundle, tmp_path / "a.txt", *flags, code=1)
    assert "--parquet needs the package pyarrow, which is not installed: pip install" in told
