"""Values on the command line: sizes, stop strings, files; messages name options as they were typed."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from blt_edge.tools.cli import options
from blt_edge.tools.cli.generate import command as generate
from blt_edge.tools.cli.verbs import FLAGS, spread
from blt_edge.tools.output import flagged, printable
from hypothesis import given
from hypothesis import strategies as st


def converted(kind: click.ParamType, value: str) -> object:
    return kind.convert(value, None, None)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (options.MemorySize, "1000", 1000),
        (options.MemorySize, "800MB", 800_000_000),
        (options.MemorySize, "1.5g", 1_500_000_000),
        (options.MemorySize, "2 GiB", 2 << 30),
        (options.MemorySize, "64k", 64_000),
        (options.MemorySize, "3KiB", 3072),
        (options.StopString, r"a\r\n\t\0b", b"a\r\n\t\0b"),
        (options.StopString, r"\x00\xff\xC3", b"\x00\xff\xc3"),
        (options.StopString, r"caf\u00e9", "café".encode()),
        (options.StopString, r"\U0001F407", "🐇".encode()),
        (options.StopString, r"\\n", rb"\n"),
        (options.StopString, r"\"\'", b"\"'"),
        (options.StopString, "line\nbreak", b"line\nbreak"),
        (options.StopString, os.fsdecode(b"\xff"), b"\xff"),
        *(
            (options.CheckpointSource, source, source)
            for source in ("demo", "facebook/blt-1b", "org/name_2.0", "org/name@refs/pr/1")
        ),
    ],
)
def test_values(kind: type[click.ParamType], text: str, value: object, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert converted(kind(), text) == value


WRONG = {
    options.MemorySize: ["", "0", "0MB", "-1", "1e9", "many", "5XB", "1.GB", "nan", "G"],
    options.StopString: ["\\", "a\\", r"\q", r"\x", r"\x1", r"\u12", r"\ud800", r"\U00110000", "", "\\\n"],
    options.CheckpointSource: [
        "gone",
        "/gone/x",
        "../gone",
        "a/b/c",
        "a/b@",
        "a@b/c",
        "~/gone",
        "~nobody-of-that-name/x",
        "name/",
        "",
    ],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind in WRONG for text in WRONG[kind]])
def test_wrong_values(kind: type[click.ParamType], text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(click.BadParameter, match="800MB or" if kind is options.MemorySize else None):
        converted(kind(), text)


@given(st.binary(min_size=1), st.text(st.characters(codec="utf-8", exclude_characters="\\"), min_size=1))
def test_every_byte_string_can_be_written_and_text_means_itself(data: bytes, text: str) -> None:
    assert converted(options.StopString(), "".join(f"\\x{byte:02x}" for byte in data)) == data
    assert converted(options.StopString(), text) == text.encode()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("top_k is -1; allowed is more", "--top-k is -1; allowed is more"),
        ("threads: got 0, more is needed", "--threads: got 0, more is needed"),
        ("a stop string is empty", "a stop string is empty"),
        ("unknown is 3", "unknown is 3"),
        ("top_knot is 3", "top_knot is 3"),
    ],
)
def test_messages_name_the_option(message: str, line: str) -> None:
    assert flagged(message, generate) == line


@given(st.text())
def test_printable_is_one_line_that_no_terminal_obeys(text: str) -> None:
    assert printable(text).isprintable()


def test_files_and_standard_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    for kind, does in ((options.InputFile(), "read"), (options.OutputFile(), "written")):
        assert converted(kind, "-") == options.STDIN
        with pytest.raises(click.BadParameter, match=f"can't be {does}; check its permissions"):
            converted(kind, str(file))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("b1 b2 --text x y z", "b1 b2 --text x --text y --text z"),
        ("--text x y b1 b2", "--text x --text y b1 b2"),
        ("--text x b1 y", "--text x b1 y"),
        ("--text x folder b2", "--text x --text folder b2"),
        ("--text=x y --seed 1 z", "--text=x --text y --seed 1 z"),
        ("--text x - --force", "--text x --text - --force"),
        ("--text x --calibration y z", "--text x --calibration y --calibration z"),
        ("--text --seed", "--text --seed"),
        ("--text x -- y z", "--text x -- y z"),
        ("b1 --textual x y", "b1 --textual x y"),
        ("", ""),
    ],
)
def test_several_files_after_one_flag(
    typed: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles and checkpoints belong to no flag, folders of texts do."""
    monkeypatch.chdir(tmp_path)
    for name, file in (("b1", "manifest.json"), ("b2", "config.json"), ("folder", "text")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    assert spread(typed.split(), FLAGS) == expected.split()
