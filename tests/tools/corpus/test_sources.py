"""Which files a corpus is."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.tools.corpus.sources import find_sources, is_lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/z.txt", "b/a.md", "c.txt", ".git/x.txt", ".hidden", "lines.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("It is a text.")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\0")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"It is a text, too."))
    (tmp_path / "binary.gz").write_bytes(gzip.compress(bytes(9)))
    (tmp_path / "broken.gz").write_bytes(b"no gzip at all")
    (tmp_path / "link.txt").symlink_to(tmp_path / "c.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def names(folder: Path, *given: Path, **options) -> list[str]:
    found = find_sources(given or (folder,), **options)
    return [Path(source.name).relative_to(folder).as_posix() for source in found]


def test_of_a_folder_what_is_text(folder: Path) -> None:
    """Packed texts by what is in them; one that can't be read is told when it is."""
    assert names(folder) == ["a.txt.gz", "b/a.md", "b/z.txt", "broken.gz", "c.txt", "lines.jsonl"]
    assert names(folder, without=[folder / "b/../c.txt"])[-2:] == ["broken.gz", "lines.jsonl"]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["*.txt"], ["b/z.txt", "c.txt", "picture.txt"]),
        (["*.md", "c.*"], ["b/a.md", "c.txt"]),
        (["b/*"], ["b/a.md", "b/z.txt"]),
        (["*.TXT"], None),
        ([".hidden"], None),
    ],
)
def test_patterns_pick_by_name_or_by_path(
    folder: Path, patterns: list[str], wanted: list[str] | None
) -> None:
    if wanted is None:
        with pytest.raises(OptionError, match=r"glob: none of the 8 files in .* matches"):
            names(folder, patterns=patterns)
    else:
        assert names(folder, patterns=patterns) == wanted


def test_files_that_are_named_are_taken_as_they_are(folder: Path) -> None:
    given = [folder / "picture.txt", None, folder / "b"]
    found = find_sources(given)
    assert [source.name for source in found] == [
        str(folder / "picture.txt"),
        "stdin",
        str(folder / "b/a.md"),
        str(folder / "b/z.txt"),
    ]
    assert [source.size for source in found] == [5, 0, 13, 13]


def test_lines_are_known_by_their_names(folder: Path) -> None:
    assert all(map(is_lines, map(Path, ("a.jsonl", "a.JSONL.gz", "a.ndjson.zst"))))
    assert not any(map(is_lines, map(Path, ("a.json", "jsonl", "a.jsonl.txt"))))
    found = find_sources([folder], lines=True)
    assert [source.name for source in found if source.lines] == [str(folder / "lines.jsonl")]
    assert not any(source.lines for source in find_sources([folder]))
    with pytest.raises(OptionError, match="field is of lines of JSON"):
        find_sources([folder / "c.txt"], lines=True)


def test_what_can_not_be_meant(folder: Path) -> None:
    with pytest.raises(OptionError, match="glob picks files of folders"):
        find_sources([folder / "c.txt"], ["*"])
    (folder / "empty").mkdir()
    with pytest.raises(OptionError, match="holds no text file"):
        find_sources([folder / "empty"])
