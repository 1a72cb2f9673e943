"""Python interpreters of this machine: one for each minor release, that can make a virtual environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Interpreter", "InterpreterError", "candidates", "find", "this_python"]

_NEWEST_MINOR = 30
"""Of the names python3.N that are looked for on PATH."""

# Debian's Python has no ensurepip without python3-venv; packages are compiled for CPython with a GIL.
_QUESTION = """
import ensurepip, json, platform, sys, venv
print(json.dumps([platform.python_version(), sys.implementation.name, getattr(sys, "abiflags", "")]))
"""


class InterpreterError(Exception):
    """An interpreter that was asked for by its path can't be used."""


@dataclass(frozen=True)
class Interpreter:
    """A CPython that can make virtual environments."""

    path: Path
    version: str
    """Such as 3.11.7."""

    @property
    def minor(self) -> str:
        """Such as 3.11."""
        return ".".join(self.version.split(".")[:2])


def find(named: Sequence[Path] = (), others: Iterable[Path] | None = None) -> dict[str, Interpreter]:
    """Interpreters by minor release, oldest first.

    named: paths that the user gave; they go before others of their minor release, and one that can't be used
    raises InterpreterError.
    others: None takes those of `candidates()`.
    """
    found: dict[str, Interpreter] = {}
    for path in named:
        interpreter = _ask(path)
        if interpreter is None:
            raise InterpreterError(
                f"--python {path}: not a CPython with the modules venv and ensurepip; "
                "give the path of an interpreter that is (on Debian, install python3-venv)"
            )
        found[interpreter.minor] = interpreter
    for path in candidates() if others is None else others:
        interpreter = _ask(path)
        if interpreter is not None:
            found.setdefault(interpreter.minor, interpreter)
    return dict(sorted(found.items(), key=lambda item: _numbers(item[0])))


def candidates(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where interpreters may be: the one that runs this, python3.N on PATH, and pyenv's."""
    paths = [Path(getattr(sys, "_base_executable", sys.executable))]
    for minor in range(_NEWEST_MINOR):
        name = shutil.which(f"python3.{minor}", path=environment.get("PATH", ""))
        if name is not None:
            paths.append(Path(name))
    pyenv = Path(environment.get("PYENV_ROOT") or Path(environment.get("HOME", "~")).expanduser() / ".pyenv")
    return [*paths, *sorted(pyenv.glob("versions/*/bin/python3"), reverse=True)]


def this_python() -> str:
    """The minor release that runs this, such as 3.11."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _ask(path: Path) -> Interpreter | None:
    # pyenv's shims are on PATH for interpreters that it will not start: only running one tells.
    try:
        done = subprocess.run(
            [path, "-I", "-c", _QUESTION],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    try:
        version, implementation, flags = json.loads(done.stdout)
    except ValueError:
        return None
    return Interpreter(path, version) if implementation == "cpython" and not flags else None


def _numbers(minor: str) -> tuple[int, ...]:
    return tuple(int(part) for part in minor.split("."))
