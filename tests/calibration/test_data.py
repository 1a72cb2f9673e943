"""Texts are refused for one stated reason; windows are spread, apart, and the same for a seed."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from blt_edge.calibration.data import (
    CalibrationText,
    Window,
    bundled_texts,
    choose_windows,
    open_texts,
    texts_in,
)
from blt_edge.runtime import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st


def text(tmp_path: Path, size: int, name: str = "text.txt") -> CalibrationText:
    (tmp_path / name).write_bytes((b"It is a text. " * (size // 14 + 1))[:size])
    return open_texts([tmp_path / name])[0]


def test_bundled_texts_are_small_and_hold_many_scripts() -> None:
    english, multilingual = bundled_texts()
    assert english.bytes <= 120_000
    assert multilingual.bytes <= 60_000
    assert english.name == "bundled:english.txt"
    assert english.path.read_bytes().isascii()
    characters = set(multilingual.path.read_text(encoding="utf-8"))
    assert characters >= set("éßжعのक한தกმա的አ")
    # The default windows read every language.
    windows = choose_windows([english, multilingual], 96, 511)
    assert len(windows) == 96
    assert len([window for window in windows if window.text is multilingual]) >= 28


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\x00", "binary"),
        (b"text, then \x00 a zero", "zero byte at offset 11"),
        ("UTF-16 has zeros".encode("utf-16"), "binary"),
        (gzip.compress(bytes(range(256)) * 40), "binary"),
        (bytes(range(1, 256)) * 9, "control characters"),
    ],
)
def test_no_text_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "given.txt"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=reason) as caught:
        open_texts([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"missing\.txt cannot be read \(No such file"):
        open_texts([tmp_path / "missing.txt"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OptionError, match="not a regular file"):
        open_texts([tmp_path / "pipe"])
    with pytest.raises(OptionError, match="no calibration text"):
        open_texts([])


def test_of_a_folder_its_texts_are_read(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.txt", tmp_path / "texts"
    (folder / "b" / ".git").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    outside.write_text("a secret")
    for name in ("c.txt", "b/z.md", "b/a.txt", ".hidden.txt", ".hidden/x.txt", "b/.git/config"):
        (folder / name).write_text("It is a text.")
    (folder / "empty.txt").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x00\x00")
    (folder / "link.txt").symlink_to(outside)
    (folder / "away").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    found = [path.relative_to(folder).as_posix() for path in texts_in(folder)]
    assert found == ["b/a.txt", "b/z.md", "c.txt", "empty.txt"]
    opened = open_texts([folder, outside], 8)
    assert [text.name for text in opened] == ["b/a.txt", "b/z.md", "c.txt", "outside.txt"]
    with pytest.raises(OptionError, match="none of its texts has 99 bytes"):
        open_texts([folder], 99)
    (folder / "b" / ".git" / "config").write_bytes(b"\0")
    with pytest.raises(OptionError, match=r"\.git holds no text file"):
        texts_in(folder / "b" / ".git")


def test_binary_data_further_in_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "late.txt"
    path.write_bytes(b"a" * 100_000 + b"\x00" * 100)
    window = Window(open_texts([path])[0], 99_990, 50)
    with pytest.raises(OptionError, match="zero byte at offset 100000"):
        window.read()


def test_a_text_that_shrank_is_refused(tmp_path: Path) -> None:
    given_text = text(tmp_path, 1000)
    window = choose_windows([given_text], 1, 900)[0]
    given_text.path.write_bytes(b"short")
    with pytest.raises(OptionError, match="became shorter"):
        window.read()


def test_every_encoding_of_single_bytes_is_text(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Größe, naïveté\r\n\tet cetera\x0c".encode("latin-1") * 3)
    assert open_texts([path])[0].name == "latin.txt"


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    short = text(tmp_path, 510)
    with pytest.raises(OptionError, match="has 510 bytes, a calibration window needs 511"):
        choose_windows([short], 4, 511)
    assert len(choose_windows([short], 4, 510)) == 1


@pytest.mark.parametrize(
    ("count", "seed", "reason"),
    [
        *((count, 0, "at least 2") for count in (0, 1, -3, True, 2.0)),
        *((2, seed, f"seed: got {seed}, a whole number of at least 0") for seed in (-1, True, 1.5)),
    ],
)
def test_fewer_windows_than_texts_and_seeds_that_are_none_are_refused(
    tmp_path: Path, count: int, seed: int, reason: str
) -> None:
    texts = [text(tmp_path, 600, "one"), text(tmp_path, 600, "two")]
    with pytest.raises(OptionError, match=reason):
        choose_windows(texts, count, 100, seed)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(50, 5000), min_size=1, max_size=4),
    size=st.integers(1, 50),
    more=st.integers(0, 60),
    seed=st.integers(0, 2**32),
)
def test_windows_are_apart_inside_and_repeatable(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], size: int, more: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    texts = [text(folder, length, f"{index}") for index, length in enumerate(sizes)]
    count = len(texts) + more
    windows = choose_windows(texts, count, size, seed)
    assert windows == choose_windows(texts, count, size, seed)
    assert len(windows) <= count
    for given_text in texts:
        own = [window for window in windows if window.text is given_text]
        assert 1 <= len(own) <= given_text.bytes // size
        ends = [0, *(window.start + window.size for window in own)]
        assert all(window.start >= end for window, end in zip(own, ends, strict=False))
        assert ends[-1] <= given_text.bytes
        assert all(len(window.read()) == size for window in own)


def test_seeds_choose_differently(tmp_path: Path) -> None:
    texts = [text(tmp_path, 100_000)]
    assert choose_windows(texts, 5, 100, 1) != choose_windows(texts, 5, 100, 2)


def test_windows_begin_where_a_character_does(tmp_path: Path) -> None:
    path = tmp_path / "thai.txt"
    path.write_text("ปฏิญญาสากลว่าด้วยสิทธิมนุษยชน🐇" * 60, encoding="utf-8")
    for window in choose_windows(open_texts([path]), 12, 100, 3):
        assert window.read()[0] & 0xC0 != 0x80
