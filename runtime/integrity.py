"""Are the files of a bundle what its manifest says: all there, no links, right sizes, right contents.

The fast check reads small files whole and samples of large ones, so that opening a bundle of gigabytes
takes milliseconds; it finds truncated, exchanged and overwritten files. Only the full check finds every
changed byte of a large file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from .errors import BundleError
from .files import open_plain
from .manifest import FileRecord, Manifest
from .paths import linked_blob

__all__ = ["FULL_HASH_LIMIT", "Progress", "check_files", "check_records", "file_record"]

FULL_HASH_LIMIT = 64 << 20
"""Files of up to this many bytes are always hashed whole."""

_SAMPLES = 64
_SAMPLE_BYTES = 4096
_CHUNK = 4 << 20

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def file_record(path: str | os.PathLike[str], progress: Progress | None = None) -> FileRecord:
    """Size and both hashes of a regular file, as they go into the manifest. Raises BundleError.

    The sample is of 64 evenly spaced blocks of 4 KiB, the first and the last included; of a file of up to
    256 KiB, everything.
    """
    with open_plain(Path(path)) as file:
        size = _size(file)
        return FileRecord(size, sha256=_hash(file, _Meter(progress, size)), sample_sha256=_sample(file))


def check_files(
    directory: str | os.PathLike[str],
    manifest: Manifest,
    full: bool = False,
    progress: Progress | None = None,
) -> None:
    """Compare every file that the manifest lists with its record; other files are not looked at.

    Without `full`, files over `FULL_HASH_LIMIT` are compared by size and sample only.
    Raises BundleError naming the first file that is missing, no regular file, of another size or changed, and
    any link inside the directory (which may itself be reached through one) but `linked_blob`'s.
    """
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() and linked_blob(path) is None:
                raise BundleError(
                    f"{path} is a link, a bundle holds regular files only; replace it by what it points to"
                )
    check_records(Path(directory), manifest.files, full=full, progress=progress)


def check_records(
    root: Path,
    files: Mapping[str, FileRecord],
    *,
    full: bool = False,
    progress: Progress | None = None,
    remedy: str = "copy the bundle again or export the checkpoint again",
) -> None:
    """Compare the files of these plain names in `root` with their records; see `check_files`.

    remedy: what to do, as the end of an error's line.
    """
    # Sizes first: they are free, and a missing file should not show after minutes of hashing.
    for name, record in files.items():
        with open_plain(root / name) as file:
            size = _size(file)
        if size != record.bytes:
            state = "is truncated" if size < record.bytes else "has extra bytes"
            raise BundleError(
                f"{name} {state}: it has {size} bytes, the manifest says {record.bytes}; {remedy}"
            )
    whole = {name for name, record in files.items() if full or record.bytes <= FULL_HASH_LIMIT}
    meter = _Meter(progress, sum(files[name].bytes for name in whole))
    for name, record in files.items():
        with open_plain(root / name) as file:
            if name in whole:
                same = _hash(file, meter) == record.sha256
            else:
                same = _sample(file) == record.sample_sha256
        if not same:
            raise BundleError(f"{name} was changed after it was written (its sha256 differs); {remedy}")


class _Meter:
    """Adds up bytes for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _hash(file: BinaryIO, meter: _Meter) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        meter.add(len(chunk))
    return digest.hexdigest()


def _sample(file: BinaryIO) -> str:
    size = _size(file)
    starts, length = [0], size
    if size > _SAMPLES * _SAMPLE_BYTES:
        length = _SAMPLE_BYTES
        starts = [index * (size - length) // (_SAMPLES - 1) for index in range(_SAMPLES)]
    digest = hashlib.sha256()
    for start in starts:
        file.seek(start)
        digest.update(file.read(length))
    return digest.hexdigest()
