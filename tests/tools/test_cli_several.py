"""Several files after one flag."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.cli.options import spread


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("b1 b2 --text x y z", "b1 b2 --text x --text y --text z"),
        ("--text x y b1 b2", "--text x --text y b1 b2"),
        ("--text x b1 y", "--text x b1 y"),
        ("--text=x y --seed 1 z", "--text=x --text y --seed 1 z"),
        ("--text x - --force", "--text x --text - --force"),
        ("--text x --text y z", "--text x --text y --text z"),
        ("--text --seed", "--text --seed"),
        ("--text", "--text"),
        ("--text x -- y z", "--text x -- y z"),
        ("b1 --textual x y", "b1 --textual x y"),
        ("", ""),
    ],
)
def test_spread(given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b1", "b2"):
        (tmp_path / name).mkdir()
    assert spread(given.split(), ["--text"]) == expected.split()
