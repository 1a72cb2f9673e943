"""Reading a system's files and asking its commands, in one place: tests present other machines."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["System"]

_PATIENCE = 5.0


def _run(command: Sequence[str]) -> str | None:
    """What a command prints; None when it is not there, fails, or does not end."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class System:
    """A machine's file system and commands. Nothing is ever written or changed."""

    root: Path = Path("/")
    """Where its file system begins."""
    run: Callable[[Sequence[str]], str | None] = _run
    """What a command prints; None when it cannot be had."""

    def text(self, path: str) -> str:
        """A file's text without the NULs and spaces at its ends; empty where it can't be read."""
        try:
            return self._path(path).read_text("utf-8", "replace").strip("\0 \n\t")
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        try:
            return self._path(path).exists()
        except OSError:
            return False

    def names(self, folder: str) -> list[str]:
        """What a folder holds, sorted; nothing where it can't be read."""
        try:
            return sorted(entry.name for entry in self._path(folder).iterdir())
        except OSError:
            return []

    def number(self, path: str) -> int | None:
        """A file that is one whole number."""
        text = self.text(path)
        return int(text) if text.isdecimal() else None

    def _path(self, path: str) -> Path:
        return self.root / path.lstrip("/")
