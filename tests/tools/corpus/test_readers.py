"""What readers give, against the files' bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from blt_edge.tools.corpus import readers
from blt_edge.tools.corpus.readers import Reader
from blt_edge.tools.corpus.sources import find_sources
from blt_edge.tools.corpus.texts import Text, Unscored
from hypothesis import given, settings
from hypothesis import strategies as st


def read(*paths: Path, window: int = 10, key: str = "", **options: Any) -> list[Text | Unscored]:
    sources = find_sources(paths, lines=bool(key))
    events = list(Reader(sources, window, key, **options).texts())
    numbers = [event.number for event in events if isinstance(event, Text)]
    assert numbers == list(range(len(numbers)))
    assert all(1 <= len(event.data) <= window for event in events if isinstance(event, Text))
    done = [event.done for event in events]
    assert done == sorted(done)
    return events


def joined(events: list[Text | Unscored]) -> Iterator[tuple[str, int | None, bytes | str]]:
    """Texts put together again, each with what its last window tells checked."""
    data = b""
    for event in events:
        if isinstance(event, Unscored):
            yield event.name, event.line, event.note
            continue
        data += event.data
        if event.facts is not None:
            told = (event.facts.size, event.facts.words, event.facts.sha256)
            assert told == (len(data), len(data.split()), hashlib.sha256(data).hexdigest())
            yield event.name, event.line, data
            data = b""
    assert not data


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.binary(max_size=50), min_size=1, max_size=4), window=st.integers(1, 60))
def test_files_come_in_whole_windows(
    tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], window: int
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / str(at) for at in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    events = read(*paths, window=window)
    assert [data for _, _, data in joined(events)] == [text or "empty" for text in texts]
    parts = [event for event in events if isinstance(event, Text)]
    assert all(len(part.data) == window for part in parts if part.facts is None)
    assert events[-1].done == sum(map(len, texts))


LINES: list[tuple[bytes, bytes | str | None]] = [
    (b'{"text": "one"}', b"one"),
    (b"", None),
    (b'{"text": ""}', "empty"),
    (b"  \t", None),
    (b'{"text": "gr\xc3\xbc\xc3\x9fe \\u00fc \\ud83d\\ude00"}', "gr\u00fc\u00dfe \u00fc \U0001f600".encode()),
    (b'{"text": "half \\ud83d"}', "unreadable: text holds half a character (a lone surrogate)"),
    (b'{"text": "\xff"}', "unreadable: the line is no UTF-8"),
    (b'{"text": "cut', "unreadable: the line is no JSON"),
    (b"[" * 100_000, "unreadable: the line is no JSON"),
    (b'{"text": ' + b"1" * 9999 + b"}", "unreadable: the line is no JSON"),
    (b'["text"]', "unreadable: the line is no JSON object"),
    (b'{"other": "one"}', "unreadable: the line has no text"),
    (b'{"text": null}', "unreadable: text is null, not a text"),
    (b'{"text": true}', "unreadable: text is true or false, not a text"),
    (b'{"text": 1.5}', "unreadable: text is a number, not a text"),
    (b'{"text": ["a"]}', "unreadable: text is a list, not a text"),
    (b'{"text": {"text": "a"}}', "unreadable: text is an object, not a text"),
    (b'{"text": "the last one, longer than a window"}', b"the last one, longer than a window"),
]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_lines(tmp_path: Path, end: bytes, last: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(end.join(line for line, _ in LINES) + end * last)
    wanted = [(str(path), at, found) for at, (_, found) in enumerate(LINES, 1) if found is not None]
    assert list(joined(read(path, key="text"))) == wanted


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("a.b", b"way"),
        ("c.d", b"name"),
        ("a.x", "unreadable: the line has no a.x"),
        ("a.b.c", "unreadable: the line has no a.b.c"),
        ("a", "unreadable: a is an object, not a text"),
    ],
)
def test_a_field_is_a_key_or_a_way_of_them(tmp_path: Path, key: str, found: bytes | str) -> None:
    path = tmp_path / "a.ndjson.gz"
    line = {"a": {"b": "way"}, "c.d": "name", "c": {"d": "way"}}
    path.write_bytes(gzip.compress(json.dumps(line).encode()))
    assert [told for _, _, told in joined(read(path, key=key))] == [found]


def test_a_line_that_is_too_long_costs_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MOST_LINE", 40)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * size}) for size in (5, 500, 27, 28, 7)) + "\n")
    told = [data for _, _, data in joined(read(path, key="text"))]
    long = "unreadable: the line has more than 40 bytes"
    assert told == [b"x" * 5, long, b"x" * 27, long, b"x" * 7]


def test_a_packed_text_has_a_limit_and_damage_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MOST_DECOMPRESSED", 30)
    packed = gzip.compress(b"x" * 31)
    (tmp_path / "a.gz").write_bytes(packed)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"x" * 30))
    (tmp_path / "c").write_bytes(b"x" * 31)
    (tmp_path / "d.gz").write_bytes(packed[:-1])
    found = read(*(tmp_path / name for name in ("a.gz", "b.gz", "c", "d.gz", "missing")))
    notes = {Path(one.name).name: one.note for one in found if isinstance(one, Unscored)}
    assert notes["a.gz"].startswith("unreadable: it has more than 30 bytes once decompressed")
    assert notes["d.gz"].startswith("unreadable: damaged .gz data")
    assert notes["missing"] == "unreadable: No such file or directory"
    whole = [one.facts.size for one in found if isinstance(one, Text) and one.facts is not None]
    assert whole == [30, 31]


class Slow(io.RawIOBase):
    """A pipe, which gives a byte at a time."""

    def __init__(self, data: bytes) -> None:
        self._rest = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._rest.read(1)


def test_stdin_gives_as_much_as_it_has() -> None:
    data = b"Alice was beginning to get very tired"
    reader = Reader(find_sources([None]), 10, open_stdin=lambda: nullcontext(Slow(data)))
    events = list(reader.texts())
    assert list(joined(events)) == [("stdin", None, data)]
    assert [len(event.data) for event in events if isinstance(event, Text)] == [10, 10, 10, 7]


class Told:
    """Knows the texts of a list."""

    def __init__(self, *texts: bytes) -> None:
        self.texts = [hashlib.sha256(text).hexdigest() for text in texts]

    def knows(self, name: str, line: int | None) -> bool:
        return not name.endswith("new")

    def take(self, name: str, line: int | None, sha256: str) -> bool:
        return self.knows(name, line) and sha256 in self.texts


def test_what_was_told_is_left_out(tmp_path: Path) -> None:
    """Whatever it is: a whole file, an empty one, a line, a line without a text; not under another name."""
    bad = b'{"text": 5}\n'
    for name, data in {"a": b"x" * 25, "b": b"", "c": b"y", "new": b"y"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "d.jsonl").write_bytes(bad + b'{"text": "z"}\n{"text": "y"}\n{"text": ""}\n')
    passed: list[int] = []
    paths = [tmp_path / name for name in ("a", "b", "c", "new", "d.jsonl")]
    found = read(*paths, key="text", told=Told(b"x" * 25, b"", b"y", bad), passed=passed.append)
    told = [(Path(name).name, line, data) for name, line, data in joined(found)]
    assert told == [("new", None, b"y"), ("d.jsonl", 2, b"z")]
    assert len(passed) == 6
    assert passed == sorted(passed)
