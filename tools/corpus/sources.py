"""Which files a corpus is: those that were named, and of folders those that a pattern or their contents pick.

What it does not know: how a file is read, what is done with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ...calibration.data import PROBE_BYTES, files_in, why_binary
from ...runtime.errors import OptionError
from .compressed import DamagedError, open_file, uncompressed_name

__all__ = ["STDIN_NAME", "Source", "find_sources", "is_lines"]

STDIN_NAME = "stdin"
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """A file to read texts from, or stdin."""

    path: Path | None
    """None = stdin."""
    lines: bool
    """Each line is a JSON object with a text; else the whole is one text."""
    size: int
    """Bytes on the disk; 0 where nobody knows."""

    @property
    def name(self) -> str:
        return STDIN_NAME if self.path is None else str(self.path)


def is_lines(path: Path) -> bool:
    """Whether a file's name says that its lines are JSON, compressed or not."""
    return uncompressed_name(path).lower().endswith(_LINES)


def find_sources(
    paths: Sequence[Path | None],
    patterns: Sequence[str] = (),
    *,
    lines: bool = False,
    without: Sequence[Path] = (),
) -> list[Source]:
    """The files at the paths (None: stdin), in the place of each folder those in it, in the order of paths.

    Of a folder, at any depth, what is hidden, a link or no regular file is left out. patterns: of the rest
    those are taken whose name one of them matches, or, where it has a slash, whose path within the folder;
    without patterns those that are text, which is looked for in the decompressed data. lines: files that end
    in .jsonl or .ndjson have a text a line. without: files that are no texts wherever they are.

    Raises OptionError for a folder of none, for patterns without a folder, and for `lines` without such a
    file; BltError where a library to decompress is missing.
    """
    if patterns and not any(path is not None and path.is_dir() for path in paths):
        raise OptionError("glob picks files of folders, and no FILE is a folder; leave it out, or give one")
    found: list[Path | None] = []
    hidden = {path.resolve() for path in without}
    for path in paths:
        if path is None or not path.is_dir():
            found.append(path)
            continue
        found += _in_folder(path, patterns, hidden)
    sources = [
        Source(path, lines and path is not None and is_lines(path), 0 if path is None else _size(path))
        for path in found
    ]
    if lines and not any(source.lines for source in sources):
        raise OptionError(
            "field is of lines of JSON, and no FILE ends in .jsonl or .ndjson; leave it out, or give one"
        )
    return sources


def _in_folder(folder: Path, patterns: Sequence[str], hidden: Collection[Path]) -> list[Path]:
    files = [path for path in files_in(folder) if not hidden or path.resolve() not in hidden]
    if patterns:
        texts = [path for path in files if _matches(path.relative_to(folder), patterns)]
        if not texts:
            told = f"none of the {len(files)} files in {folder} matches {' or '.join(patterns)}"
            raise OptionError(f"glob: {told}; give another PATTERN, or none for all that is text")
        return texts
    texts = [path for path in files if _is_text(path)]
    if not texts:
        raise OptionError(f"{folder} holds no text file ({len(files)} others); give a folder of texts")
    return texts


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path.as_posix() if "/" in one else path.name, one) for one in patterns)


def _is_text(path: Path) -> bool:
    try:
        with open_file(path) as (stream, _):
            return why_binary(stream.read(PROBE_BYTES)) is None
    except (DamagedError, OSError):  # whoever reads it says why not
        return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
