"""Texts to calibrate on, and the windows of them that are read: chosen by a seed, spread over every text.

Files are never read whole: a window is read when it is its turn, so a file may be of any size. What of a
folder is text, is decided here for every verb that takes texts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.errors import OptionError

__all__ = [
    "BUNDLED_TEXTS",
    "PROBE_BYTES",
    "CalibrationText",
    "Window",
    "bundled_texts",
    "choose_windows",
    "files_in",
    "open_texts",
    "texts_in",
    "why_binary",
]

BUNDLED_TEXTS = ("english.txt", "multilingual.txt")
"""The texts that come with the package: English prose, and the same declaration in 28 languages."""

PROBE_BYTES = 1 << 16
"""Of a file's beginning, which show whether it is text."""

_FOLDER = Path(__file__).parent / "text"
_CONTROL_SHARE = 0.05
# What text may hold below 0x20: tab, line feed, vertical tab, form feed, carriage return, escape.
_CONTROL = np.ones(256, bool)
_CONTROL[[9, 10, 11, 12, 13, 27, *range(32, 127), *range(128, 256)]] = False


@dataclass(frozen=True)
class CalibrationText:
    """A plain text file."""

    path: Path
    name: str
    """What reports and manifests call it: the file's name, "bundled:..." for the package's own."""
    bytes: int


@dataclass(frozen=True)
class Window:
    """A stretch of a text, to be read from BOS."""

    text: CalibrationText
    start: int
    """Offset of its first byte."""
    size: int
    """In bytes."""

    def read(self) -> bytes:
        """Its bytes. Raises OptionError when the file changed or the stretch is binary."""
        data = _read(self.text.path, self.start, self.size)
        if len(data) < self.size:
            raise OptionError(f"{self.text.path} became shorter while it was read; calibrate again")
        _refuse_binary(self.text.path, data, self.start)
        return data


def bundled_texts() -> list[CalibrationText]:
    """The package's own texts, 180 KB in all."""
    return [_open(_FOLDER / name, f"bundled:{name}") for name in BUNDLED_TEXTS]


def texts_in(folder: Path) -> list[Path]:
    """The text files of a folder at any depth, in the order of their paths, empty ones too.

    What is hidden, a link, no regular file, or binary is left out. Raises OptionError when none is left, or
    the folder can't be read.
    """
    found = files_in(folder)
    texts = [path for path in found if _is_text(path)]
    if not texts:
        raise OptionError(f"{folder} holds no text file ({len(found)} others); give a folder of plain texts")
    return texts


def files_in(folder: Path) -> list[Path]:
    """The files of a folder at any depth, in the order of their paths, whatever is in them.

    What is hidden, a link or no regular file is left out. Raises OptionError when it can't be read.
    """

    def refuse(error: OSError) -> None:
        raise OptionError(f"{error.filename} cannot be read ({error.strerror}); check its permissions")

    found: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return [path for path in sorted(found) if _is_regular(path)]


def why_binary(data: bytes, start: int = 0) -> str | None:
    """What shows that data from an offset of a file are no text: a zero byte, or more control characters than
    any text has. None for text."""
    zero = data.find(0)
    if zero >= 0:
        return f"a zero byte at offset {start + zero}"
    control = int(_CONTROL[np.frombuffer(data, np.uint8)].sum())
    if control > _CONTROL_SHARE * len(data):
        return f"{control} control characters in {len(data)} bytes from offset {start}"
    return None


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # whoever reads it says why not
        return True


def _is_text(path: Path) -> bool:
    try:
        return why_binary(_read(path, 0, PROBE_BYTES)) is None
    except OSError:  # whoever reads it says why not
        return True


def open_texts(paths: Sequence[str | Path], least: int = 1) -> list[CalibrationText]:
    """The user's texts, of folders what `texts_in` finds there of `least` bytes or more.

    Raises OptionError for a file that is missing, no regular file, empty or binary, and for a folder without
    such texts.
    """
    if not paths:
        raise OptionError("there is no calibration text; give one or more text files")
    opened: list[CalibrationText] = []
    for path in map(Path, paths):
        if not path.is_dir():
            opened.append(_open(path, path.name))
            continue
        texts = [text for text in texts_in(path) if text.stat().st_size >= least]
        if not texts:
            raise OptionError(f"{path}: none of its texts has {least} bytes; give a folder with longer ones")
        opened += [_open(text, text.relative_to(path).as_posix()) for text in texts]
    return opened


def choose_windows(texts: Sequence[CalibrationText], count: int, size: int, seed: int = 0) -> list[Window]:
    """At most `count` windows of `size` bytes that do not overlap; the same ones for the same seed.

    Each text gets windows by its share of all bytes, at least one, and no more than it has room for; each
    lies at a random place within its own equal part of the text. Raises OptionError for a text shorter than a
    window, for a count below the number of texts, and for a seed below 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise OptionError(f"seed: got {seed!r}, a whole number of at least 0 is needed")
    if isinstance(count, bool) or not isinstance(count, int) or count < len(texts):
        raise OptionError(
            f"windows: got {count!r}, a whole number of at least {len(texts)} is needed, one for each text"
        )
    for text in texts:
        if text.bytes < size:
            raise OptionError(
                f"{text.path} has {text.bytes} bytes, a calibration window needs {size}; give a longer text"
            )
    random = np.random.default_rng(seed)
    windows = []
    for text, share in zip(texts, _shares(texts, count), strict=True):
        parts = min(share, text.bytes // size)
        for index in range(parts):
            first, end = text.bytes * index // parts, text.bytes * (index + 1) // parts
            start = int(random.integers(first, end - size + 1))
            windows.append(Window(text, _character_start(text.path, first, start), size))
    return windows


def _shares(texts: Sequence[CalibrationText], count: int) -> list[int]:
    # One each, the rest by size, largest remainders first.
    total, rest = sum(text.bytes for text in texts), count - len(texts)
    exact = [rest * text.bytes / total for text in texts]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(texts)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: rest - sum(shares)]:
        shares[index] += 1
    return [1 + share for share in shares]


def _character_start(path: Path, first: int, start: int) -> int:
    # Texts do not begin inside a UTF-8 character: go back to where it begins, within its own part.
    before = max(first, start - 3)
    data = list(enumerate(_read(path, before, start - before + 1), before))
    return next((offset for offset, byte in reversed(data) if byte & 0xC0 != 0x80), start)


def _open(path: Path, name: str) -> CalibrationText:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OptionError(f"{path} is not a regular file; calibration needs text files")
        if status.st_size == 0:
            raise OptionError(f"{path} is empty; calibration needs text")
        _refuse_binary(path, _read(path, 0, PROBE_BYTES), 0)
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); calibration needs text files") from None
    return CalibrationText(path, name, status.st_size)


def _read(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _refuse_binary(path: Path, data: bytes, start: int) -> None:
    why = why_binary(data, start)
    if why is not None:
        raise OptionError(
            f"{path} is binary ({why}); calibration needs plain text, UTF-8 or another encoding of "
            "single bytes"
        )
