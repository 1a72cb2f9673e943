"""The hidden directories beside an output: `.NAME.partial-PID-RANDOM` while a bundle is being written,
`.NAME.calibration-PID-RANDOM` for the float32 bundle that ranges are collected on, and
`.NAME.replaced-PID-RANDOM` for the old bundle in the moment it is exchanged; and clearing up after crashes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ._signals import uninterrupted

try:
    import fcntl
except ImportError:  # Windows: crashed exports are left for the user to remove
    fcntl = None  # type: ignore[assignment]

__all__ = ["claim", "clear_abandoned", "scratch", "sibling"]


def sibling(output: Path, kind: str) -> Path:
    """A fresh path beside `output` of kind "partial", "calibration" or "replaced"."""
    return output.with_name(f".{output.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def claim(directory: Path) -> int | None:
    """Lock a directory while this process lives and the returned descriptor is open; None = no lock was got.

    A process number alone would not do: in another container, or on another host with the same disk, it means
    another process.
    """
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def scratch(output: Path, kind: str) -> Iterator[Path]:
    """A new sibling that is removed at the end; after a crash, `clear_abandoned` removes it."""
    directory = sibling(output, kind)
    lock = None
    try:
        directory.mkdir()
        lock = claim(directory)
        yield directory
    finally:
        with uninterrupted():
            shutil.rmtree(directory, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def clear_abandoned(output: Path) -> None:
    """Remove what exports to `output` left that died on the way; nothing that may still be in use.

    An old bundle that died between the two renames of its replacement gets its name back.
    """
    pattern = re.compile(
        re.escape(f".{output.name}.") + r"(partial|calibration|replaced)-([0-9]{1,9})-[0-9a-f]{8}"
    )
    try:
        entries = [(path, pattern.fullmatch(path.name)) for path in output.parent.iterdir()]
    except OSError:
        return
    for path, match in entries:
        if match is None or path.is_symlink() or not path.is_dir() or not _abandoned(path, int(match[2])):
            continue
        if match[1] == "replaced" and not os.path.lexists(output):
            with suppress(OSError):
                path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _abandoned(directory: Path, process: int) -> bool:
    if fcntl is None or process == os.getpid() or _alive(process):
        return False
    try:
        descriptor = claim(directory)
    except OSError:
        return False
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
