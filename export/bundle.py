"""One progress report for work that several parts do one after the other.

Making a bundle directory: all of it or nothing, whatever interrupts, and never over what is no bundle.

Everything is written to a hidden sibling of the output that takes the output's name at the end. An exception,
Ctrl-C or a termination signal removes it; what a killed process or a power cut left behind is removed by the
next export to the same output.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import BltError, OptionError
from ..runtime.files import claim, clear_abandoned, open_plain, sibling, termination_raises, uninterrupted
from ..runtime.integrity import file_record
from ..runtime.manifest import Manifest, write_manifest
from ..runtime.names import MANIFEST_NAME

__all__ = ["Meter", "OutputError", "Progress", "WriteError", "check_free_space", "finish", "new_bundle"]

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


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEARLY_FULL = 1 << 20
_MAX_MANIFEST_BYTES = 16 << 20


class OutputError(OptionError):
    """The output path cannot become a bundle: it exists, is something else, or has no usable parent."""


class WriteError(BltError):
    """The bundle could not be written: the disk is full, or will be."""


@contextmanager
def new_bundle(output: str | os.PathLike[str], *, force: bool = False, needed: int = 0) -> Iterator[Path]:
    """A directory to fill and `finish`; on success it is at `output`, on any failure nothing is.

    needed: estimated bytes of the bundle, checked against the free space first; 0 = unknown. force: a bundle
    that is at `output` is replaced, at the very end, so that a failure leaves the old one as it was. (While
    both exist, both take space.) The parent directory must exist.

    Raises OutputError when `output` exists (with `force`: when it is no bundle and not empty), or cannot be
    made there; WriteError when the disk is or becomes full. Everything else passes through.
    """
    final = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output
    _check_parent(final, output)
    clear_abandoned(final)
    _check_output(final, output, force)
    if needed:
        check_free_space(final.parent, needed)
    temporary = sibling(final, "partial")
    with termination_raises():
        lock = None
        try:
            lock = _make(temporary, output)
            yield temporary
            assert (temporary / MANIFEST_NAME).is_file(), "finish was not called"
            _publish(temporary, final, output, force)
        except OSError as error:
            explained = _write_error(error, temporary, output, needed)
            if explained is None:
                raise
            raise explained from None
        finally:
            with uninterrupted():
                shutil.rmtree(temporary, ignore_errors=True)
                if lock is not None:
                    os.close(lock)


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
        # Renamed before its contents are on the disk, a bundle could be whole in name only after a power cut.
        _sync(path)
    manifest = manifest.with_files(files)
    write_manifest(directory, manifest)
    _sync(directory)
    return manifest


def check_free_space(directory: str | os.PathLike[str], needed: int) -> None:
    """Raise WriteError when the disk that holds `directory` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise WriteError(
            f"{directory}: the bundle needs {_shown(needed)}, {_shown(free)} are free; "
            "free some space or give an --output on another disk"
        )


# 1. May the output be written?


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


# 2. Making the directory and giving it its name.


def _make(temporary: Path, output: object) -> int | None:
    try:
        temporary.mkdir()
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise OutputError(
            f"output {output}: nothing can be made in {temporary.parent} ({error.strerror}); "
            "check its permissions, or give another --output"
        ) from None
    return claim(temporary)


def _publish(temporary: Path, final: Path, output: object, force: bool) -> None:
    replaced = sibling(final, "replaced")
    with uninterrupted():
        # Again: minutes have passed, and what came there meanwhile is not ours to replace.
        _check_output(final, output, force)
        try:
            if os.path.lexists(final):
                final.rename(replaced)
            temporary.rename(final)
        except OSError as error:
            if replaced.exists() and not os.path.lexists(final):
                replaced.rename(final)
            raise WriteError(
                f"output {output} cannot be put in place ({error.strerror}); what was there is unchanged"
            ) from None
        _sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file or directory is on the disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (*_FULL, errno.EIO):
            raise
    finally:
        os.close(descriptor)


# 3. What to say when writing fails.


def _write_error(error: OSError, temporary: Path, output: object, needed: int) -> WriteError | None:
    """The one line for a full disk or a file too large for the file system; None for other errors."""
    if error.errno == errno.EFBIG:
        return WriteError(
            f"output {output}: a file became larger than the file system or `ulimit -f` allows; "
            "give an --output elsewhere"
        )
    free = shutil.disk_usage(temporary.parent).free
    # numpy's tofile reports a write that was cut short without an error number.
    if error.errno not in _FULL and not (error.errno is None and free < _NEARLY_FULL):
        return None
    written = sum(path.lstat().st_size for path in temporary.glob("*") if path.is_file())
    need = f"the bundle needs {_shown(needed)}, " if needed else ""
    return WriteError(
        f"output {output}: the disk is full; {need}{_shown(written)} were written, {_shown(free)} were left; "
        "free some space or give an --output on another disk"
    )


def _shown(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count} bytes ({count / size:.1f} {unit})"
    return f"{count} bytes"
