"""Results that outlive a run: whatever was cut off, going on ends in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime.errors import BltError, OptionError
from blt_edge.tools.corpus.joining import score_texts
from blt_edge.tools.corpus.lines import ResultLines
from blt_edge.tools.corpus.readers import Reader
from blt_edge.tools.corpus.results import Result
from blt_edge.tools.corpus.sources import find_sources
from blt_edge.tools.corpus.texts import ScoredText, Text
from hypothesis import given, settings
from hypothesis import strategies as st

RUN: dict[str, Any] = {
    "format": 1,
    "model": "a",
    "source": "s",
    "bundle": "0" * 64,
    "context": 11,
    "patching": {"mode": "entropy", "threshold": 1.5},
    "field": "text",
}


def engine(texts: Iterator[Text]) -> Iterator[ScoredText]:
    for text in texts:
        yield ScoredText(text.number, 0.1 * sum(text.data), 2, 1)


def score(out: Path, corpus: Path, *, resume: bool = False, stop: int = -1, run: Any = RUN) -> list[str]:
    """Score a corpus, or only its first `stop` texts; which texts were scored now."""
    scored = []
    with ResultLines(out, run, resume=resume) as lines:
        sources = find_sources([corpus], lines=True)
        texts = Reader(sources, 10, "text", told=lines if lines.former else None).texts()
        for result in score_texts(texts, engine):
            if len(scored) == stop:
                return scored
            lines.add(result)
            scored.append(f"{Path(result.name).name}:{result.line}")
        lines.finish(complete=True)
    return scored


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("a text that is longer than a window")
    (folder / "b.txt").touch()
    texts = ["one", "", 5, "one", "the last of them"]
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "d.txt").write_text("the end")
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run that nobody disturbs writes."""
    out = tmp_path_factory.mktemp("out") / "out"
    assert len(score(out, corpus)) == 8
    first, *rest, last = map(json.loads, out.read_text().splitlines())
    assert first == {"run": RUN}
    assert [line.get("line") for line in rest] == [None, None, 1, 2, 3, 4, 5, None]
    assert (last["complete"], last["total"]["texts"], last["total"]["unread"]) == (True, 5, 1)
    return out.read_bytes()


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_wherever_it_was_cut_off(
    corpus: Path, whole: bytes, tmp_path_factory: pytest.TempPathFactory, cuts: list[float]
) -> None:
    out = tmp_path_factory.mktemp("cut") / "out"
    out.write_bytes(whole)
    for cut in cuts:
        left = out.read_bytes()[: int(cut * len(whole))]
        out.write_bytes(left)
        scored = score(out, corpus, resume=True)
        assert out.read_bytes() == whole
        assert len(scored) == 8 - min(8, max(0, left.count(b"\n") - 1))


@pytest.mark.parametrize("stop", [0, 1, 3, 8])
def test_a_run_without_its_last_line(corpus: Path, whole: bytes, tmp_path: Path, stop: int) -> None:
    out = tmp_path / "out"
    score(out, corpus, stop=stop)
    assert whole.startswith(out.read_bytes())
    assert len(score(out, corpus, resume=True)) == 8 - stop
    assert out.read_bytes() == whole


def test_without_resume_it_begins_anew(corpus: Path, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("what is there is longer " * 999)
    score(tmp_path / "out", corpus)
    assert (tmp_path / "out").read_bytes() == whole


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.txt").write_text(f"this is text {name}")
    (folder / "e.jsonl").write_text('{"text": "the last"}\n')
    return folder


def told(out: Path) -> tuple[list[str], dict[str, Any]]:
    _, *lines, last = map(json.loads, out.read_text().splitlines())
    return [Path(line["file"]).name for line in lines], last["total"]


def test_other_texts_come_behind_and_changed_ones_are_scored_again(own: Path, tmp_path: Path) -> None:
    """The totals are those of what is in the file, which has one line for each text."""
    out = tmp_path / "out"
    score(out, own)
    (own / "b.txt").write_text("this is another text")
    (own / "bb.txt").write_text("this is a new text")
    assert score(out, own, resume=True) == ["b.txt:None", "bb.txt:None"]
    names, total = told(out)
    assert names == ["a.txt", "c.txt", "d.txt", "e.jsonl", "b.txt", "bb.txt"]
    score(tmp_path / "anew", own)
    assert total == told(tmp_path / "anew")[1]
    assert score(out, own, resume=True) == []
    assert told(out) == (names, total)


def test_a_text_that_could_not_be_read_is_tried_again(own: Path, tmp_path: Path) -> None:
    out, gone = tmp_path / "out", own / "b.txt.gz"
    gone.write_bytes(b"no gzip")
    score(out, own)
    assert told(out)[1]["unread"] == 1
    gone.unlink()
    (own / "b.txt").write_text("this is text b")
    assert score(out, own, resume=True) == []
    assert told(out) == (["a.txt", "b.txt", "c.txt", "d.txt", "e.jsonl"], {**told(out)[1], "unread": 0})


def test_a_text_that_is_given_twice_has_two_lines(own: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", Result(str(own / "a.txt"), None, 4, 1, 1, 1, 8.0, "0" * 64)
    with ResultLines(out, RUN) as lines:
        lines.add(text)
        lines.add(text)
    again = ResultLines(out, RUN, resume=True)
    taken = [again.take(text.name, None, "0" * 64) for _ in range(3)]
    assert (again.former, taken) == (2, [True, True, False])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"format": 2}, "is of format 1, this version writes 2"),
        (
            {"bundle": "1" * 64},
            r"another bundle \(s, fingerprint 0{16}; this one is s, fingerprint 1{16}\)",
        ),
        ({"context": 12}, "is of context 11, this run is of 12"),
        (
            {"patching": {"mode": "space"}},
            "by mode entropy, threshold 1.5, this run is of mode space, threshold none",
        ),
        ({"field": None}, "is of field text, this run is of whole files"),
    ],
)
def test_another_run_is_refused(own: Path, tmp_path: Path, change: dict[str, Any], line: str) -> None:
    out = tmp_path / "out"
    score(out, own)
    before = out.read_bytes()
    with pytest.raises(OptionError, match=line):
        score(out, own, resume=True, run={**RUN, **change})
    assert out.read_bytes() == before
    assert score(out, own, resume=True, run={**RUN, "model": "moved", "source": "renamed"}) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"my novel", "is no file of results"),
        (b"my novel\nin lines\n", "is no file of results"),
        (b'{"run": 5}\n', "does not say what it is of"),
        (b'{"run": {"format": 1}}\n', "does not say what it is of"),
        (b'{"run": ' + b"[" * 90_000 + b"\n", "does not say what it is of"),
        (json.dumps({"run": {**RUN, "patching": 5}}).encode() + b"\n", "does not say what it is of"),
        (json.dumps({"run": RUN}).encode() + b"\n{}\n", "line 2 of .* is no result"),
        (json.dumps({"run": RUN}).encode() + b"\n\0\0\n", "line 2 of .* is no result"),
        (
            json.dumps({"run": RUN}).encode() + b'\n{"total": null}\n{"total": null}\n',
            "behind its total, in line 3",
        ),
        (json.dumps({"run": RUN}).encode() + b"\n" + b"x" * (1 << 20), "line 2 of .* is too long"),
    ],
)
def test_what_is_no_file_of_results_is_refused(own: Path, tmp_path: Path, text: bytes, line: str) -> None:
    out = tmp_path / "out"
    out.write_bytes(text)
    with pytest.raises(OptionError, match=line):
        score(out, own, resume=True)
    assert out.read_bytes() == text


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with ResultLines(tmp_path / "out", RUN) as lines:
        with pytest.raises(BltError, match="another run is writing it"), ResultLines(tmp_path / "out", RUN):
            pass
        lines.finish(complete=False)
    with ResultLines(tmp_path / "out", RUN, resume=True):
        pass


def test_results_can_be_read_while_more_come(tmp_path: Path) -> None:
    texts = [Result(str(number), None, 1, 1, 1, 1, 2.0, "0" * 64) for number in range(5)]
    for path in (None, tmp_path / "out"):
        with ResultLines(path, RUN) as lines:
            for number, text in enumerate(texts):
                lines.add(text)
                assert list(lines.results()) == texts[: number + 1]
            lines.finish(complete=True)
            assert list(lines.results()) == texts
    with ResultLines(None, RUN, kept=False) as lines:
        lines.add(texts[0])
        lines.finish(complete=True)
        assert (list(lines.results()), lines.totals.texts) == ([], 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk, as Linux has one")
def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the size of files is the disk of a process of its own."""
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from blt_edge.tools.corpus.lines import ResultLines\n"
        "from blt_edge.tools.corpus.results import Result\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"run = {RUN!r}\n"
        "try:\n"
        "    with ResultLines(Path(sys.argv[1]), run) as lines:\n"
        "        try:\n"
        "            for n in range(99): lines.add(Result(str(n), None, 1, 1, 1, 1, 2.0, '0' * 64))\n"
        "        finally:\n"
        "            lines.finish(complete=False)\n"
        "except OSError as error: print(error.strerror, error.filename)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, str(out)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    assert said == f"File too large {out}\n"
    again = ResultLines(out, RUN, resume=True)
    assert again.former == out.read_bytes().count(b"\n") - 1 > 0


@pytest.mark.parametrize("kept", [True, False])
def test_an_error_names_where_results_are_kept(tmp_path: Path, monkeypatch, kept: bool) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    with ResultLines(None, RUN, kept=kept) as lines:
        lines._file = Full()
        with pytest.raises(OSError, match="No space") as failed:
            lines.add(Result("a", None, 1, 1, 1, 1, 2.0, "0" * 64))
    assert failed.value.filename == (str(tmp_path) if kept else None)
