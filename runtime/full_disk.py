"""What a full disk, a quota and a file that may not grow look like, in one line for people.

Libraries and inference engines say no more than that writing failed: what was written, and what is free,
tells the rest.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from .errors import BltError, OptionError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

__all__ = ["FULL", "OutputError", "WriteError", "check_space", "explained"]

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of a system's errors where there is no room."""

_NEARLY_FULL = 1 << 20
_PROBE = bytes(1 << 16)
_FAT_LIMIT = 2**32 - 1


class OutputError(OptionError):
    """A path cannot become an output: it exists, is something else, or nothing can be made there."""


class WriteError(BltError):
    """Something could not be written: the disk is full, or will be, or the system refuses."""


def check_space(parent: Path, name: str, what: str, needed: int, elsewhere: str = "") -> None:
    """Raise WriteError where `what` needs more bytes (> 0) than are free beside `parent`."""
    if needed and (free := shutil.disk_usage(parent).free) < needed:
        raise WriteError(
            f"{name}: the {what} needs {_shown(needed)}, {_shown(free)} are free; free some space{elsewhere}"
        )


def explained(
    error: Exception, parent: Path, temporary: Path | None, name: str, what: str, needed: int, elsewhere: str
) -> WriteError | None:
    """The one line for a disk, a quota or a file that may not grow; None for other errors."""
    if isinstance(error, (OutputError, WriteError)):
        return None
    number = error.errno if isinstance(error, OSError) else None
    sizes = [path.lstat().st_size for path in temporary.rglob("*") if path.is_file()] if temporary else []
    free = shutil.disk_usage(parent).free
    if number is None and temporary is not None:
        number = _next_error(error, temporary, sizes, free, needed)
    if number == errno.EFBIG:
        return WriteError(
            f"{name}: a file became larger than the file system or `ulimit -f` allows; raise the limit"
            + (elsewhere or ", or use another disk")
        )
    if number not in FULL:
        return None
    which = "the disk is full" if number == errno.ENOSPC else "your quota on this disk is used up"
    need = f"the {what} needs {_shown(needed)}, " if needed else ""
    left = f", {_shown(free)} were left" if number == errno.ENOSPC else ""
    return WriteError(
        f"{name}: {which}; {need}{_shown(sum(sizes))} were written{left}; free some space{elsewhere}"
    )


def _next_error(error: Exception, temporary: Path, sizes: list[int], free: int, needed: int) -> int | None:
    """The number behind an error that has none: numpy reports a write that was cut short without one, and
    inference engines say no more than that something failed.
    """
    limit = _FAT_LIMIT if resource is None else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if {_FAT_LIMIT, limit} & set(sizes):
        return errno.EFBIG
    if free < _NEARLY_FULL:
        return errno.ENOSPC
    try:
        (temporary / "probe").write_bytes(_PROBE)
    except OSError as met:
        return met.errno
    if not isinstance(error, OSError) or "requested and" not in str(error):
        return None
    # The file is gone already, where another library wrote it, and its space is free again.
    if resource is not None and limit != resource.RLIM_INFINITY:
        return errno.EFBIG
    return errno.ENOSPC if free < needed - sum(sizes) else errno.EDQUOT


def _shown(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count} bytes ({count / size:.1f} {unit})"
    return f"{count} bytes"
