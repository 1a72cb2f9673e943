"""The ground that files stand on: opened plainly, written whole or not at all.

Beside an output lie hidden directories while it is being made: `.NAME.partial-PID-RANDOM` while it is
written, `.NAME.calibration-PID-RANDOM` for the float32 bundle that ranges are collected on, and
`.NAME.replaced-PID-RANDOM` for the old one in the moment it is exchanged. An exception, Ctrl-C or a
termination signal removes them; what a killed process or a power cut left behind is removed by the next
attempt at the same output.
"""

from __future__ import annotations

import errno
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

from .errors import BltError, BundleError, OptionError

try:
    import fcntl
except ImportError:  # Windows: what a crash left is for the user to remove
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "OutputError",
    "WriteError",
    "bytes_on_disk",
    "new_directory",
    "open_plain",
    "remove_directory",
    "scratch",
    "sync",
    "termination_raises",
    "uninterrupted",
    "write_whole",
]

# Not every system has these; there the check before opening stands alone.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
)
_TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_ALL = (signal.SIGINT, *_TERMINATION)
_Handler = Callable[[int, FrameType | None], Any] | int | None
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEARLY_FULL = 1 << 20


class OutputError(OptionError):
    """A path cannot become an output: it exists, is something else, or nothing can be made there."""


class WriteError(BltError):
    """Something could not be written: the disk is full, or will be, or the system refuses."""


# 1. Reading.


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


# 2. One file, or one directory, whole or not at all.


def write_whole(target: Path, write: Callable[[Path], object], *, lasting: bool = False) -> None:
    """Let `write` make a file that becomes `target`, whole or not at all. Raises what `write` does.

    lasting: wait until it is on the disk before it takes its name. A pipe or a device is written to directly.
    """
    if target.exists() and not target.is_file():
        write(target)
        return
    short = os.fsencode(target.name)[:100].decode("utf-8", "ignore")  # names are limited in bytes
    temporary = target.with_name(f".{short}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write(temporary)
        if lasting:
            sync(temporary)
        temporary.replace(target)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(target)  # the one that a person knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(
    final: Path,
    name: str,
    what: str,
    *,
    needed: int = 0,
    elsewhere: str = "",
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """A directory to fill; on success it is at `final`, on any failure what was there is as it was.

    name, what, elsewhere: for errors, "output b", "bundle", and what else can be done than to free space.
    needed: bytes that it will take, looked for first; 0 = unknown. (While the old one and the new one exist,
    both take space.) check: raises when `final` may not be replaced; asked first, and again at the end.

    Raises OutputError when nothing can be made beside `final`; WriteError when the disk is or becomes full,
    or the new one can't be put in place. Everything else passes through.
    """
    clear_abandoned(final)
    check()
    if needed and (free := shutil.disk_usage(final.parent).free) < needed:
        raise WriteError(
            f"{name}: the {what} needs {_shown(needed)}, {_shown(free)} are free; free some space{elsewhere}"
        )
    temporary = _sibling(final, "partial")
    with termination_raises():
        lock = None
        try:
            lock = _make(temporary, name, elsewhere)
            yield temporary
            _publish(temporary, final, name, check)
        except Exception as error:
            explained = _full_disk(error, temporary, name, what, needed, elsewhere)
            if explained is None:
                raise
            raise explained from None
        finally:
            _remove(temporary, lock)


@contextmanager
def scratch(output: Path, kind: str) -> Iterator[Path]:
    """A new hidden sibling that is removed at the end; after a crash, the next `new_directory` removes it."""
    directory = _sibling(output, kind)
    lock = None
    try:
        directory.mkdir()
        lock = _claim(directory)
        yield directory
    finally:
        _remove(directory, lock)


def remove_directory(directory: Path) -> None:
    """Remove a directory so that nobody sees a part of it under its name. Raises OSError."""
    hidden = _sibling(directory, "replaced")
    with uninterrupted():
        directory.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def bytes_on_disk(directory: Path) -> int:
    """Size of all files in a directory and below it; links are not followed."""
    files = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return sum(file.lstat().st_size for file in files)


def sync(path: Path) -> None:
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


def _make(temporary: Path, name: str, elsewhere: str) -> int | None:
    try:
        temporary.mkdir()
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise OutputError(
            f"{name}: nothing can be made in {temporary.parent} ({error.strerror}); "
            f"check its permissions{elsewhere}"
        ) from None
    return _claim(temporary)


def _publish(temporary: Path, final: Path, name: str, check: Callable[[], None]) -> None:
    # Renamed before its contents are on the disk, it could be whole in name only after a power cut.
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    replaced = _sibling(final, "replaced")
    with uninterrupted():
        check()  # again: minutes have passed, and what came there meanwhile is not ours to replace
        try:
            if os.path.lexists(final):
                final.rename(replaced)
            temporary.rename(final)
        except OSError as error:
            if replaced.exists() and not os.path.lexists(final):
                replaced.rename(final)
            raise WriteError(
                f"{name} cannot be put in place ({error.strerror}); what was there is unchanged"
            ) from None
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def _full_disk(
    error: Exception, temporary: Path, name: str, what: str, needed: int, elsewhere: str
) -> WriteError | None:
    """The one line for a full disk or a file too large for the file system; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EFBIG:
        return WriteError(
            f"{name}: a file became larger than the file system or `ulimit -f` allows"
            + (elsewhere.replace(", or", ";") or "; use another disk")
        )
    if isinstance(error, (OutputError, WriteError)):
        return None
    free = shutil.disk_usage(temporary.parent).free
    # numpy reports a write that was cut short without a number, and inference engines say no more than that
    # something failed.
    if number not in _FULL and not (number is None and free < _NEARLY_FULL):
        return None
    written = sum(path.lstat().st_size for path in temporary.glob("*") if path.is_file())
    need = f"the {what} needs {_shown(needed)}, " if needed else ""
    return WriteError(
        f"{name}: the disk is full; {need}{_shown(written)} were written, {_shown(free)} were left; "
        f"free some space{elsewhere}"
    )


def _shown(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count} bytes ({count / size:.1f} {unit})"
    return f"{count} bytes"


def _remove(directory: Path, lock: int | None) -> None:
    with uninterrupted():
        shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


# 3. What is ours, what is in use, and what was abandoned.


def _sibling(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _claim(directory: Path) -> int | None:
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
    descriptor = None
    with suppress(OSError):
        descriptor = _claim(directory)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return not isinstance(error, ProcessLookupError)
    return True


# 4. Signals around work that has to be undone.


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
        handlers = {number: signal.getsignal(number) for number in _ALL}
        before = {number: handler for number, handler in handlers.items() if handler is not None}
    for number in before:
        signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
