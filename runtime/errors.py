"""Every error the runtime raises on purpose.

The command line turns each into one line and an exit code; a library user can catch `BltError`.
Messages say what was got, what is allowed, and what to do.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

__all__ = [
    "BackendError",
    "BltError",
    "BltWarning",
    "BundleError",
    "FailedValidationWarning",
    "NotValidatedHereWarning",
    "OptionError",
    "OutOfMemoryError",
    "PromptTooLongError",
    "StateError",
    "engine_error",
    "first_line",
    "ran_out_of_memory",
    "requirement",
]

_LONGEST = 240
_NO_MEMORY = re.compile(
    r"bad.?alloc|out ?of ?memory|failed to allocate|unable to allocate|memory allocation of \d+ bytes failed",
    re.IGNORECASE,
)
_CLONE = Path(__file__).resolve().parents[1]


class BltError(Exception):
    """Base of all deliberate errors of blt_edge."""


class BundleError(BltError):
    """The bundle is missing, damaged, unsafe or made by a newer version."""


class OptionError(BltError, ValueError):
    """An option has a value outside its range."""


class StateError(BltError):
    """A saved state is missing, damaged, unsafe, or of another model."""


class PromptTooLongError(BltError, ValueError):
    """A text needs more positions than the model has."""


class BackendError(BltError):
    """The inference engine is missing, refused a graph, or failed in one."""

    def __init__(self, told: str, advice: str = "") -> None:
        super().__init__(f"{told}; {advice}" if advice else told)
        self.told = told
        """What happened, without what to do."""


class OutOfMemoryError(BackendError):
    """The engine, or what it needs beside it, got no memory."""


class BltWarning(UserWarning):
    """What a run goes on in spite of, one line; given once."""


class FailedValidationWarning(BltWarning):
    """The bundle did not agree with its reference when it was last compared."""


class NotValidatedHereWarning(BltWarning):
    """The bundle was compared with its reference, but only on processors that may compute otherwise."""


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line that is safe to print; its kind if it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    # Engines begin with where they were, and end with what happened.
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an engine's error, or numpy's, is that there was no memory."""
    return isinstance(error, (MemoryError, OutOfMemoryError)) or bool(_NO_MEMORY.search(str(error)))


def engine_error(what: str, error: BaseException, advice: str = "") -> BackendError:
    """An engine's error as ours: what went wrong, the engine's words, what to do (about memory if that was
    it, else `advice`)."""
    kind = BackendError
    if ran_out_of_memory(error):
        kind = OutOfMemoryError
        advice = (
            "close other programs, read less at a time (prefill chunk), take a shorter text or a bundle of "
            "smaller precision (blt-edge quantize)"
        )
    return kind(f"{what}: {first_line(error)}", advice)


def requirement(extra: str) -> str:
    """What pip is to install for an extra, ready to be pasted after `pip install`.

    The package is on no index: in a clone it is the clone itself, wherever one stands. Where a wheel was
    installed, pip gets what the extra adds.
    """
    if (_CLONE / "pyproject.toml").is_file():
        return f"-e {shlex.quote(f'{_CLONE}[{extra}]')}"
    return f"'blt-edge[{extra}]'"
