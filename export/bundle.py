"""Making a bundle directory: all of it or nothing, and never over what is no bundle; progress on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..runtime.errors import BltError
from ..runtime.files import OutputError, new_directory, open_plain
from ..runtime.integrity import file_record
from ..runtime.manifest import Manifest, write_manifest
from ..runtime.names import MANIFEST_NAME

__all__ = ["FileProgress", "Meter", "Progress", "finish", "new_bundle"]

Progress = Callable[[str, int, int], None]
"""progress(what is being written, bytes done, bytes in all)."""
FileProgress = Callable[[int, int], None]
"""progress(bytes done, bytes in all) of one file after the other."""


class Meter:
    """Adds up what the parts have written, for one progress display."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def of(self, what: str) -> Callable[[int], None]:
        """A callback for one part: bytes written since its last call."""

        def advance(count: int) -> None:
            self._done += count
            if self._progress is not None:
                self._progress(what, min(self._done, self._total), self._total)

        return advance

    def up_to(self, what: str) -> Callable[[int, int], None]:
        """A callback for one part that reports (bytes written of the part, bytes of the part)."""
        advance, before = self.of(what), self._done

        def reached(done: int, _all: int) -> None:
            advance(before + done - self._done)

        return reached


_MAX_MANIFEST_BYTES = 16 << 20
ELSEWHERE = ", or give an --output on another disk"


@contextmanager
def new_bundle(output: str | os.PathLike[str], *, force: bool = False, needed: int = 0) -> Iterator[Path]:
    """A directory to fill and `finish`; on success it is at `output`, on any failure nothing is.

    needed: estimated bytes of the bundle, checked against the free space first; 0 = unknown. force: a bundle
    that is at `output` is replaced, at the very end. The parent directory must exist.

    Raises OutputError when `output` exists (with `force`: when it is no bundle and not empty), or cannot be
    made there; WriteError when the disk is or becomes full. Everything else passes through.
    """
    final = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output
    _check_parent(final, output)
    name, may_replace = f"output {output}", partial(_check_output, final, output, force)
    with new_directory(
        final, name, "bundle", needed=needed, elsewhere=ELSEWHERE, check=may_replace
    ) as directory:
        yield directory
        assert (directory / MANIFEST_NAME).is_file(), "finish was not called"


def finish(directory: Path, manifest: Manifest, progress: FileProgress | None = None) -> Manifest:
    """Hash every file of `directory`, put them on the disk, and write the manifest with their records.

    `manifest` is complete but for `files`. progress(bytes hashed, bytes in all). Returns what was written.
    Raises BundleError when a file is no regular file, or the manifest and the files contradict each other.
    """
    paths = sorted(directory.iterdir())
    total = sum(path.lstat().st_size for path in paths)
    files, done = {}, 0
    for path in paths:
        base = done

        def advance(count: int, _: int, base: int = base) -> None:
            if progress is not None:
                progress(base + count, total)

        files[path.name] = file_record(path, advance)
        done += files[path.name].bytes
    manifest = manifest.with_files(files)
    write_manifest(directory, manifest)
    return manifest


def _check_parent(final: Path, output: object) -> None:
    if not final.name:
        raise OutputError(f"output is {output}; give the name of a new directory")
    if not final.parent.is_dir():
        reason = "is not a directory" if os.path.lexists(final.parent) else "does not exist"
        raise OutputError(f"output {output}: its parent {final.parent} {reason}; create it first")


def _check_output(final: Path, output: object, force: bool) -> None:
    if not os.path.lexists(final):
        return
    if final.is_symlink():
        raise OutputError(f"output {output} is a link; give the directory itself, or a new name")
    if not final.is_dir():
        raise OutputError(f"output {output} is a file, a bundle is a directory; give a new name")
    if not force:
        raise OutputError(f"output {output} exists; give a new name, or --force to replace a bundle")
    if not _is_bundle(final) and any(final.iterdir()):
        raise OutputError(
            f"output {output} is not a bundle and not empty, so --force does not replace it; "
            "give a new name, or remove it yourself"
        )


def _is_bundle(directory: Path) -> bool:
    """Whether its manifest is one of ours, of any version: other programs have a `manifest.json`, too."""
    try:
        with open_plain(directory / MANIFEST_NAME) as file:
            manifest = json.loads(file.read(_MAX_MANIFEST_BYTES))
    except (BltError, OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"schema", "blt_edge", "files"} <= manifest.keys()
