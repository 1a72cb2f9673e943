"""Opening the bundle's files: regular files only, never through a link."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import BundleError

__all__ = ["open_plain"]

# Not every system has these; there the check before opening stands alone.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
)


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for unbuffered reading.

    Raises BundleError when it is missing, a link (also one put there while we look), a directory, a pipe or
    device (which would block), or unreadable.
    """
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise BundleError(
                f"{path} is a link, a bundle holds regular files only; replace it by the file itself"
            )
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path} is not a regular file; export the checkpoint again")
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise BundleError(
            f"{path} is missing; copy the bundle again or export the checkpoint again"
        ) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be opened ({error.strerror}); check its permissions") from None
    return os.fdopen(descriptor, "rb", buffering=0)
