"""Opening the bundle's files: regular files only, never through a link.

Signals around work to be undone: termination becomes an exception, and moments are uninterrupted.

The hidden directories beside an output: `.NAME.partial-PID-RANDOM` while a bundle is being written,
`.NAME.calibration-PID-RANDOM` for the float32 bundle that ranges are collected on, and
`.NAME.replaced-PID-RANDOM` for the old bundle in the moment it is exchanged; and clearing up after crashes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from .errors import BundleError

__all__ = [
    "claim",
    "clear_abandoned",
    "open_plain",
    "scratch",
    "sibling",
    "termination_raises",
    "uninterrupted",
]

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


_TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_ALL = (signal.SIGINT, *_TERMINATION)
_Handler = Callable[[int, FrameType | None], Any] | int | None


@contextmanager
def termination_raises() -> Iterator[None]:
    """Inside, the first of Ctrl-C, SIGTERM and SIGHUP raises, and all that follow are ignored.

    SIGTERM and SIGHUP raise SystemExit (128 + signal), so that cleaning up happens, and a second Ctrl-C does
    not interrupt it. Handlers that somebody else set, or ignored signals, are left alone; so is everything
    outside the main thread, where Python does not deliver signals.
    """
    before: dict[int, _Handler] = {}
    if threading.current_thread() is threading.main_thread():
        ours = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in _ALL if signal.getsignal(number) in ours}

    def leave(number: int, frame: FrameType | None) -> None:
        for every in before:
            signal.signal(every, _ignore)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) in (leave, _ignore):
                signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C and termination wait; they take effect at the end. For moments only."""
    waiting: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _ALL}
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


try:
    import fcntl
except ImportError:  # Windows: crashed exports are left for the user to remove
    fcntl = None  # type: ignore[assignment]


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
