"""Values on the command line: stop strings with escapes, and options named as the user typed them."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from blt_edge.runtime import DEVICES as RUNTIME_DEVICES
from blt_edge.runtime.names import DEVICES, DRAFTS
from blt_edge.runtime.names import DRAFTS as RUNTIME_DRAFTS
from blt_edge.tools.cli.generate import command as generate
from blt_edge.tools.cli.options import STDIN, CheckpointSource, InputFile, MemorySize, OutputFile, StopString
from blt_edge.tools.output import flagged, printable
from hypothesis import given
from hypothesis import strategies as st


def test_devices_are_the_runtimes() -> None:
    assert DEVICES == RUNTIME_DEVICES
    assert DRAFTS == RUNTIME_DRAFTS


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000", 1000),
        ("800MB", 800_000_000),
        ("1.5g", 1_500_000_000),
        ("2 GiB", 2 << 30),
        ("64k", 64_000),
        ("3KiB", 3072),
    ],
)
def test_memory_sizes(text: str, count: int) -> None:
    assert MemorySize().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "0", "0MB", "-1", "1e9", "many", "5XB", "1.GB", "nan", "G"])
def test_wrong_memory_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="800MB or"):
        MemorySize().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("end", b"end"),
        (r"\n", b"\n"),
        (r"a\r\n\t\0b", b"a\r\n\t\0b"),
        (r"\x00\xff\xC3", b"\x00\xff\xc3"),
        (r"caf\u00e9", "café".encode()),
        (r"\U0001F407", "🐇".encode()),
        (r"\\n", rb"\n"),
        (r"\"\'", b"\"'"),
        ("line\nbreak", b"line\nbreak"),
        ("é", "é".encode()),
        (os.fsdecode(b"\xff"), b"\xff"),
    ],
)
def test_stop_strings(text: str, data: bytes) -> None:
    assert StopString().convert(text, None, None) == data


@pytest.mark.parametrize(
    "text", ["\\", "a\\", r"\q", r"\x", r"\x1", r"\u12", r"\ud800", r"\U00110000", "", "\\\n"]
)
def test_wrong_stop_strings(text: str) -> None:
    with pytest.raises(click.BadParameter):
        StopString().convert(text, None, None)


@given(st.binary(min_size=1, max_size=20))
def test_every_byte_string_can_be_written(data: bytes) -> None:
    assert StopString().convert("".join(f"\\x{byte:02x}" for byte in data), None, None) == data


@given(st.text(st.characters(exclude_characters="\\", exclude_categories=["Cs"]), min_size=1))
def test_text_without_backslash_means_itself(text: str) -> None:
    assert StopString().convert(text, None, None) == text.encode()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("top_k is -1; allowed is more", "--top-k is -1; allowed is more"),
        ("threads: got 0, more is needed", "--threads: got 0, more is needed"),
        ("max_new_bytes is 0; more", "--max-new-bytes is 0; more"),
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


def test_unreadable_and_unwritable_files(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(click.BadParameter, match="can't be read; check its permissions"):
        InputFile().convert(str(file), None, None)
    with pytest.raises(click.BadParameter, match="can't be written; check its permissions"):
        OutputFile().convert(str(file), None, None)


def test_dash_is_a_standard_stream() -> None:
    assert InputFile().convert("-", None, None) == STDIN
    assert OutputFile().convert("-", None, None) == STDIN


@pytest.mark.parametrize("source", ["demo", "facebook/blt-1b", "org/name_2.0"])
def test_sources_that_may_exist(source: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CheckpointSource().convert(source, None, None) == source


@pytest.mark.parametrize(
    "source", ["gone", "/gone/x", "../gone", "a/b/c", "~/gone", "~nobody-of-that-name/x", "name/", ""]
)
def test_sources_that_cannot_exist(source: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(click.BadParameter):
        CheckpointSource().convert(source, None, None)
