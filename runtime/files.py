"""The ground that files stand on: opened plainly, written whole or not at all.

Beside an output lie hidden directories while it is being made: `.NAME.partial-PID-RANDOM` while it is
written, `.NAME.calibration-PID-RANDOM` for the float32 bundle that ranges are collected on, and
`.NAME.replaced-PID-RANDOM` for the old one in the moment it is exchanged. An exception, Ctrl-C or a
termination signal removes them. Each is locked by the process that made it: what a killed one or a power
cut left behind is not, and is removed by the next attempt at the same output.
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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from .errors import BltError, BundleError
from .fields import AGAIN, MAX_JSON_BYTES
from .full_disk import FULL, OutputError, WriteError, check_space, explained
from .paths import linked_blob

try:
    import fcntl
    import resource
except ImportError:  # Windows: what a crash left is for the user to remove
    fcntl = resource = None  # type: ignore[assignment]

__all__ = [
    "OutputError",
    "WriteError",
    "bytes_on_disk",
    "check_replaceable",
    "claim",
    "clear_abandoned",
    "new_directory",
    "open_plain",
    "read_plain",
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
_MOUNTS = Path("/proc/self/mountinfo")
_Handler = Callable[[int, FrameType | None], Any] | int | None


# 1. Reading.


def open_plain(
    path: Path,
    *,
    rule: str = "a bundle holds regular files only",
    remedy: str = "copy the bundle again or export the checkpoint again",
    kind: type[BltError] = BundleError,
) -> BinaryIO:
    """Open a regular file for unbuffered reading. rule, remedy: for errors, of this kind.

    Raises BundleError when it is missing, a link (also one put there while we look; but for those to files of
    huggingface_hub's cache inside it), a directory, a pipe or device (which would block), or unreadable.
    """
    shown = path
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            if (blob := linked_blob(path)) is None:
                raise kind(f"{path} is a link, {rule}; replace it by the file itself")
            path, status = blob, blob.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise kind(f"{shown} is not a regular file; {remedy}")
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise kind(f"{shown} is missing; {remedy}") from None
    except OSError as error:
        raise kind(f"{shown} cannot be opened ({error.strerror}); check its permissions") from None
    return os.fdopen(descriptor, "rb", buffering=0)


def read_plain(path: Path) -> bytes:
    """Everything in a regular file of at most `MAX_JSON_BYTES`. Raises BundleError."""
    with open_plain(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise BundleError(f"{path} has more than {MAX_JSON_BYTES} bytes, the most allowed; {AGAIN}")
    return data


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
    lock = None
    try:
        temporary.touch(exist_ok=False)
        with suppress(BlockingIOError):  # whoever clears up what was abandoned may hold it for a moment
            lock = claim(temporary)
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
        if lock is not None:
            os.close(lock)


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
    check_replaceable(final, name)
    check_space(final.parent, name, what, needed, elsewhere)
    with termination_raises(), ExitStack() as stack:
        temporary = None
        try:
            temporary = stack.enter_context(_made(final, name, elsewhere))
            yield temporary
            _publish(temporary, final, name, check)
        except Exception as error:
            told = explained(error, final.parent, temporary, name, what, needed, elsewhere)
            if told is None:
                raise
            raise told from None


@contextmanager
def scratch(output: Path, kind: str, what: str = "", needed: int = 0) -> Iterator[Path]:
    """A new hidden sibling that is removed at the end; after a crash, the next `new_directory` removes it.

    what, needed: as for `new_directory`; WriteError then says that the disk is full.
    """
    made: list[tuple[Path, int | None]] = []
    check_space(output.parent, output.name, what, needed)
    try:
        with uninterrupted():
            made.append(_new_sibling(output, kind))
        yield made[0][0]
    except Exception as error:
        place = made[0][0] if made and what else None
        told = place and explained(error, output.parent, place, output.name, what, needed, "")
        if not told:
            raise
        raise told from None
    finally:
        for directory, lock in made:
            _remove(directory, lock)


def check_replaceable(final: Path, name: str) -> None:
    """Raise OutputError where a directory at `final` can't be exchanged for a new one, whatever is in it.

    The system would say so only when all the work is done.
    """
    if not final.is_dir():
        return
    if _is_mount(final):
        raise OutputError(f"{name} is a mount point, which can't be exchanged; give a directory inside it")
    parent, owner = final.parent.stat(), final.stat().st_uid
    if (
        parent.st_mode & stat.S_ISVTX
        and hasattr(os, "geteuid")
        and os.geteuid() not in (0, parent.st_uid, owner)
    ):
        raise OutputError(
            f"{name} belongs to another user, who alone may exchange it in {final.parent}; give a new name"
        )


def _is_mount(path: Path) -> bool:
    if path.is_mount():
        return True
    try:
        mounts = [line.split()[4] for line in _MOUNTS.read_bytes().splitlines()]
    except (OSError, IndexError):
        return False
    # A directory of the same disk may be mounted, too. Spaces and the like are octal there.
    plain = [re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), mount) for mount in mounts]
    return os.fsencode(path.resolve()) in plain


def remove_directory(directory: Path) -> None:
    """Remove a directory so that nobody sees a part of it under its name. Raises OSError."""
    hidden = _sibling(directory, "partial")
    with uninterrupted():
        # Locked under its own name: nobody takes it for abandoned, and after a kill it is just that.
        lock = claim(directory)
        try:
            directory.rename(hidden)
        except OSError:
            if lock is not None:
                os.close(lock)
            raise
        _remove(hidden, lock)


def bytes_on_disk(directory: Path) -> int:
    """Size of all files in a directory and below it; of links only the hub's cache's are followed."""
    files = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return sum((linked_blob(file) or file).lstat().st_size for file in files)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (*FULL, errno.EIO):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _made(final: Path, name: str, elsewhere: str) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(scratch(final, "partial"))
        except OSError as error:
            if error.errno in FULL:
                raise
            raise OutputError(
                f"{name}: nothing can be made in {final.parent} ({error.strerror}); "
                f"check its permissions{elsewhere}"
            ) from None
        yield temporary


def _publish(temporary: Path, final: Path, name: str, check: Callable[[], None]) -> None:
    # Renamed before its contents are on the disk, it could be whole in name only after a power cut.
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    replaced = _sibling(final, "replaced")
    with uninterrupted(), ExitStack() as stack:
        check()  # again: minutes have passed, and what came there meanwhile is not ours to replace
        try:
            if os.path.lexists(final):
                # Else another process would take it for abandoned, and give it its name back.
                if (lock := claim(final)) is not None:
                    stack.callback(os.close, lock)
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


def _remove(directory: Path, lock: int | None) -> None:
    with uninterrupted():
        shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


# 3. What is ours, what is in use, and what was abandoned.


def _sibling(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _new_sibling(output: Path, kind: str) -> tuple[Path, int | None]:
    """Make a sibling and lock it; until it is locked, another process takes it for abandoned."""
    while True:
        directory = _sibling(output, kind)
        directory.mkdir()
        with suppress(BlockingIOError, FileNotFoundError):
            lock = claim(directory)
            try:
                if lock is None or os.path.samestat(os.fstat(lock), directory.stat()):
                    mine, lock = lock, None
                    return directory, mine
            finally:
                if lock is not None:
                    os.close(lock)


def claim(directory: Path) -> int | None:
    """Lock a directory while this process lives and the returned descriptor is open; None = no locks here.

    Raises BlockingIOError when another has it. A process number would not do: in a container it is the same
    each time, and on another host with the same disk it means another process.
    """
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def clear_abandoned(output: Path) -> None:
    """Remove what writers of `output` left that died on the way; nothing that may still be in use.

    An old bundle that died between the two renames of its replacement gets its name back.
    """
    pattern = re.compile(
        re.escape(f".{output.name}.") + r"(partial|calibration|replaced)-[0-9]{1,9}-[0-9a-f]{8}"
    )
    try:
        entries = [(path, pattern.fullmatch(path.name)) for path in output.parent.iterdir()]
    except OSError:
        return
    for path, match in entries:
        if match is None or path.is_symlink() or not (path.is_dir() or path.is_file()):
            continue
        lock = None
        with suppress(OSError):
            lock = claim(path)
        if lock is None:
            continue
        if match[1] == "replaced" and not os.path.lexists(output):
            with suppress(OSError):
                path.rename(output)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        os.close(lock)


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
