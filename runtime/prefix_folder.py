"""A store's states as files of a folder, so that a text is not read again after a restart either.

Each state is a file of `state_file`, named by a hash of its text and its bundle, that is written whole or not
at all and checked when it is read. The folder is the owner's alone; whatever else lies there is left alone.
What can't be used is removed: it is a cache.
What this does not know: which texts are worth keeping.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import BackendError, BltError, StateError
from .files import OutputError, WriteError, claim, clear_abandoned
from .prefix_store import PrefixStore
from .sequence import Sequence

__all__ = ["Loaded", "PrefixFolder", "make_folder"]

_NAME = re.compile(r"[0-9a-f]{64}\.state")
_UNFINISHED = re.compile(r"\.([0-9a-f]{64}\.state)\.partial-.*")


@dataclass(frozen=True)
class Loaded:
    """What was found in a folder."""

    states: int = 0
    """States that are in the store now."""
    dropped: tuple[str, ...] = ()
    """Why files were of no use, one line each; they are removed."""


def make_folder(path: Path, *, private: bool = False) -> Path:
    """A directory that can be written, made for the owner alone where there is none.

    private: nobody else may use one that is there, and it is no link. Raises OutputError where it can't be.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat() if private else path.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise OutputError(f"{path} is a link; remove it")
        if private and os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
            raise OutputError(f"others may use {path}, which is for texts; chmod 700 it, or remove it")
        if os.name == "posix" and status.st_mode & 0o002 and not status.st_mode & stat.S_ISVTX:
            raise OutputError(f"others may put their folders into {path}; chmod o-w it, or give another")
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise OutputError(f"{path} can't be written; check its permissions")
    except FileExistsError:
        raise OutputError(f"{path} is not a directory; give one, or a new name") from None
    except OSError as error:
        raise OutputError(f"{path} can't be made ({error.strerror}); give another directory") from None
    return path


class PrefixFolder:
    """One store's folder, which no other process uses until it is closed."""

    def __init__(self, path: Path) -> None:
        """Makes it where there is none. Raises OutputError where it can't be used."""
        self.path = make_folder(path, private=True)
        try:
            self._lock = claim(self.path)
        except BlockingIOError:
            raise OutputError(f"{path} is in use by another process; give each its own") from None

    def close(self) -> None:
        """Let another process have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self, store: PrefixStore) -> Loaded:
        """Put the states into a store that has none, those used last first, as many as its memory holds."""
        dropped, chosen, left = [], [], store.memory
        for path, size in self._files():
            left -= size
            if left >= 0:
                chosen.append(path)
            else:
                dropped.append(f"{path}: there is no room for it")
                _remove([path])
        states = 0
        for path in reversed(chosen):  # what is kept last goes last
            try:
                store.keep(store.model.restore(path))
                states += 1
            except StateError as error:
                dropped.append(str(error))
                _remove([path])
            except BackendError as error:  # memory was short, or the device is lost
                dropped.append(str(error))
        return Loaded(min(states, store.figures.states), tuple(dropped))

    def save(self, store: PrefixStore) -> None:
        """Let the folder have the store's states and no others, those used last first, in as many bytes as
        its memory. Those that are there already are not written again. Raises WriteError, and when all others
        are there the StateError or BackendError of a state that can't be saved.
        """
        # Not held, so that what the store drops meanwhile is gone: writing may take minutes.
        kept = [(self._path(store, one), weakref.ref(one)) for one in reversed(store.sequences())]
        paths = [path for path, _ in kept]
        others = {path for path, _ in self._files()}.difference(paths)
        now, left = time.time_ns(), store.memory
        failed: BltError | None = None
        for place, (path, there) in enumerate(kept):
            try:
                if not path.exists() and not self._write(path, there(), others, left):
                    continue
                left -= path.stat().st_size
                os.utime(path, ns=(now - place, now - place))
            except (StateError, BackendError) as error:  # it holds no numbers, or its device is lost
                failed = failed or error
                continue
            except OSError as error:
                raise WriteError(f"{path} can't be written ({error.strerror})") from error
            if left < 0:
                others.update(paths[place:])
                break
        _remove(others)  # last: whoever is killed before has at least what was there
        if failed is not None:
            raise failed

    def _write(self, path: Path, sequence: Sequence | None, others: set[Path], room: int) -> bool:
        """Whether the file is there now: not of a state that is gone, or for which there is no room."""
        # A file that is written only to be removed wears the disk each time.
        if sequence is None or sequence.state.saved_bytes > room:
            return False
        try:
            sequence.save(path)
        except WriteError:
            if not others:
                raise
            _remove(others)  # there may be room then
            others.clear()
            sequence.save(path)
        return True

    def _path(self, store: PrefixStore, sequence: Sequence) -> Path:
        digest = hashlib.sha256(store.model.manifest.fingerprint.encode())
        digest.update(sequence.ids.tobytes())
        return self.path / f"{digest.hexdigest()}.state"

    def _files(self) -> list[tuple[Path, int]]:
        """State files (and links of their names), with sizes, those used last first. What was never finished
        is removed.
        """
        found = []
        for path in self.path.iterdir():
            if unfinished := _UNFINISHED.fullmatch(path.name):
                clear_abandoned(self.path / unfinished[1])
            elif _NAME.fullmatch(path.name):
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):  # which is none of ours
                    found.append((status.st_mtime_ns, path, status.st_size))
        return [(path, size) for _, path, size in sorted(found, reverse=True)]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):  # what can't be removed is found again the next time
            path.unlink(missing_ok=True)
