"""Memory of this process, as far as the kernel tells: None everywhere but on Linux."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

__all__ = ["PrivatePeak", "mapped_resident", "peak_resident", "reset_peak_resident"]

_STATUS = Path("/proc/self/status")
_SMAPS = Path("/proc/self/smaps")
_CLEAR = Path("/proc/self/clear_refs")
_INTERVAL = 0.01


def peak_resident() -> int | None:
    """Most resident memory so far, mapped files included, in bytes."""
    return _status("VmHWM:")


def reset_peak_resident() -> bool:
    """Let `peak_resident` count from now on; False where the kernel does not do that."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def mapped_resident(path: Path) -> int | None:
    """How much of a mapped file is in memory and counted as ours, in bytes."""
    try:
        lines = _SMAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    wanted, total, inside = str(path.resolve()), 0, False
    for line in lines:
        name, _, value = line.partition(" ")
        if not name.endswith(":"):  # an address range, permissions, ... and the file
            inside = line.endswith(" " + wanted)
        elif inside and name == "Rss:":
            total += int(value.split()[0]) * 1024
    return total


class PrivatePeak:
    """Watches memory that belongs to no file while its block runs; `bytes` is the most there was."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PrivatePeak:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        now = _status("RssAnon:")
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(name)]
    return int(values[0]) * 1024 if values else None
