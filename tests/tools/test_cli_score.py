"""`blt-edge score`: one line per file, and a total that is the bytes' mean."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.patching import PatchingRule
from support.chat import posix, start


def test_table(cli, tiny_model, tmp_path: Path) -> None:
    one, other = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_bytes(b"The first text.")
    other.write_bytes(bytes(range(256)))
    result = cli("score", "-m", tiny_model.bundle, one, other, "--context", 100, code=0)
    header, _, *lines, _, total, told = result.stdout.splitlines()
    assert header.split() == ["file", "bytes", "patches", "bytes/patch", "bits/byte", "bytes/s"]
    rows = [line.split()[:2] for line in (*lines, total)]
    assert rows == [[str(one), "15"], [str(other), "256"], ["total", "271"]]
    assert told.startswith("2 texts; 4 windows; ")
    assert result.stderr == "scoring a.txt\nscoring b.txt\n"
    assert len({len(line.rstrip()) for line in result.stdout.splitlines() if line[:1] == "\u2500"}) == 1
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


def test_a_folder_is_read_and_an_empty_file_is_a_row(cli, refused, tiny_model, tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("It is a text.")
    (tmp_path / "b/empty.txt").touch()
    (tmp_path / "b/picture").write_bytes(b"\0")
    result = cli("score", "-q", "-m", tiny_model.bundle, tmp_path, "--jsonl", tmp_path / "out", code=0)
    rows = [line.split()[:2] for line in result.stdout.splitlines()[2:]]
    names = [str(tmp_path / name) for name in ("b/a.txt", "b/empty.txt", "b/z.txt", "c.md")]
    assert rows[:4] == [[name, "0" if "empty" in name else "13"] for name in names]
    assert rows[-2:] == [["total", "39"], ["3", "texts;"]]
    assert "empty" in result.stdout.splitlines()[3].split()
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line.get("file") for line in lines] == [None, *names, None]
    assert (lines[2]["note"], lines[-1]["complete"]) == ("empty", True)
    told = refused("score", "-q", "-m", tiny_model.bundle, tmp_path / "b/empty.txt")
    assert told == f"FILE: {tmp_path}/b/empty.txt is empty; there is nothing to score\n"
    assert "is a model's directory" in refused("score", "-q", "-m", tiny_model.bundle, tiny_model.checkpoint)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of this name can't be read."""
    true = Path.open

    def opened(path: Path, *rest, **more):
        if path.name == "gone":
            raise OSError(5, "Input/output error", str(path))
        return true(path, *rest, **more)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.usefixtures("gone")
def test_a_file_that_went_away_leaves_the_others(cli, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "gone").touch()
    (tmp_path / "b").write_text("some text")
    result = cli(
        "score", "-q", "-m", tiny_model.bundle, tmp_path / "gone", tmp_path / "b", "--json", "-", code=1
    )
    assert result.stderr.splitlines() == [
        f"{tmp_path}/gone: Input/output error",
        "blt-edge: error: 1 of 2 files could not be read",
    ]
    document = json.loads(result.stdout)
    assert [one["bytes"] for one in document["files"]] == [0, 9]


@posix
def test_ctrl_c_loses_no_row(tiny_model, tmp_path: Path) -> None:
    """The first row is there before the second text is; what is endless is read in windows."""
    (tmp_path / "a").write_text("some text")
    flags = ("--json", tmp_path / "out", "-q")
    process = start("score", "-m", tiny_model.bundle, tmp_path / "a", "/dev/zero", *flags)
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[-1].split()[:2] == [str(tmp_path / "a").encode(), b"9"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (1, b"", b"blt-edge: interrupted\n")
    document = json.loads((tmp_path / "out").read_text())
    assert (document["complete"], document["total"]["bytes"]) == (False, 9)


def test_another_rule_shows_what_it_costs(cli, tiny_model, model: BltModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)))
    asked = ("score", "-m", tiny_model.bundle, tmp_path / "a.txt", "--json", "-", "-q")
    for flags, rule in (
        (("--threshold", 2.5), replace(model.manifest.patching, threshold=2.5)),
        (("--mode", "static", "--patch-size", 4), PatchingRule("static", patch_size=4)),
    ):
        score = model.with_patching(rule).score(bytes(range(256)))
        (told,) = json.loads(cli(*asked, *flags, code=0).stdout)["files"]
        assert told["bits_per_byte"] == pytest.approx(score.bits_per_byte)
        assert told["patches"] == score.patches - score.windows


def test_a_sweep_is_a_table_a_document_and_a_picture(
    cli, tiny_model, model: BltModel, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'blt-edge[plot]'")
    (tmp_path / "a.txt").write_bytes(b"The first text, and more of it.")
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png", "-q")
    shown = cli("score", "-m", tiny_model.bundle, tmp_path / "a.txt", "--sweep", "0,9", *files, code=0).stdout
    head, _, *rows, _ = (line.split() for line in shown.splitlines())
    assert head == ["threshold", "bytes/patch", "bits/byte", "more", "bytes/s"]
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    # The bundle's own comes first: the others are compared with it.
    assert [row[0] for row in rows] == [f"{model.manifest.patching.threshold:.4g}", "0", "9"]
    assert rows[0][1] == "(bundle)"
    assert points[1]["bits_per_byte"] == pytest.approx(
        model.score(b"The first text, and more of it.").bits_per_byte
    )
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("gone")
def test_a_sweep_loses_no_row(cli, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to Ctrl-C nor to a file that is empty or unreadable."""
    (tmp_path / "a.txt").write_bytes(b"The first text.")
    (tmp_path / "empty").touch()
    (tmp_path / "gone").touch()
    real, calls = BltModel.score, []

    def score(*given, **options):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **options)

    texts = [tmp_path / name for name in ("empty", "a.txt", "gone")]
    flags = ("--sweep", "0,9", "--json", tmp_path / "out.json", "-q")
    for interrupted in (True, False):
        with monkeypatch.context() as patch:
            if interrupted:
                patch.setattr(BltModel, "score", score)
            result = cli("score", "-m", tiny_model.bundle, *texts, *flags, code=1)
        *notes, why = result.stderr.splitlines()
        assert [note.partition(": ")[0] for note in notes] == [str(texts[0]), str(texts[2])]
        wanted = "interrupted" if interrupted else "error: 1 of 3 files could not be read"
        assert why == f"blt-edge: {wanted}"
        document = json.loads((tmp_path / "out.json").read_text())
        assert document["complete"] != interrupted
        assert len(document["points"]) == 3 - interrupted
        assert len(result.stdout.splitlines()) == 6 - interrupted
        assert [one["bytes"] for one in document["files"]] == [0, 15, 0]


def test_only_empty_files_are_nothing_to_score(cli, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    for flags in ((), ("--sweep", "1")):
        told = cli("score", "-q", "-m", tiny_model.bundle, tmp_path / "a", tmp_path / "b", *flags, code=2)
        assert told.stderr.endswith("FILE: all 2 files are empty; there is nothing to score\n")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--plot", "a.png"), "--plot draws a sweep; add --sweep"),
        (("--sweep", "1", "--threshold", "2"), "--threshold and --sweep are both given"),
        (("--sweep", "1,x"), "--sweep: 'x' is not"),
        (("--sweep", "nan"), "--sweep"),
        (("--sweep", "1", "--mode", "space"), "--mode and --sweep are both given"),
        (("--sweep", "1", "--max-patch-length", "0"), "--max-patch-length and --sweep are both given"),
        (("--sweep", "1", "--no-monotonic"), "--monotonic and --sweep are both given"),
        (("--patch-size", "4"), "--patch-size has no effect in mode entropy"),
    ],
)
def test_refused_rules_and_sweeps(
    refused, tiny_model, tmp_path: Path, flags: tuple[str, ...], line: str
) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    assert line in refused("score", "-m", tiny_model.bundle, tmp_path / "a.txt", "-q", *flags)
