"""What is said in a pipe, by a clock that the test turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.corpus.progress import CorpusProgress, left
from blt_edge.tools.corpus.sources import Source


class Said:
    """A clock, and the lines that were said."""

    def __init__(self, *sizes: int) -> None:
        self.now, self.lines = 0.0, [""]
        sources = [Source(Path(f"/nowhere/{at}"), False, size) for at, size in enumerate(sizes)]
        self.progress = CorpusProgress(self.show, sources, lambda: self.now)

    def show(self, what: str, done: int, total: int) -> None:
        if what != self.lines[-1]:
            self.lines.append(what)


def test_few_files_are_named() -> None:
    said = Said(10, 10)
    for name in ("/x/a", "/x/a", "/x/b"):
        said.progress.reading(name)
        said.progress.passed(5)
    assert said.lines == ["", "scoring a", "scoring b"]


def test_of_many_there_is_a_line_a_minute() -> None:
    """What a former run scored is no speed of this one."""
    said = Said(*[1_000_000] * 100)
    said.progress.skipped(40_000_000)
    for step in range(1, 16):
        said.now = 10.0 * step
        said.progress.reading(str(step))
        said.progress.passed(40_000_000 + 1_000_000 * step)
    assert said.lines == [
        "",
        "scoring 100 files",
        "scored 46.0 MB of 100.0 MB (46%), about 9 min left",
        "scored 52.0 MB of 100.0 MB (52%), about 8 min left",
    ]


def test_where_nobody_knows_how_much_there_is() -> None:
    said = Said(0)
    said.progress.reading("stdin")
    said.now = 61.0
    said.progress.passed(2_000_000)
    assert said.lines[-1] == "scored 2.0 MB"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7200, "2 h"), (3e5, "3 days")],
)
def test_times(seconds: float, words: str) -> None:
    assert left(seconds) == f"about {words} left"
