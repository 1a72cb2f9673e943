"""Every error the runtime raises on purpose.

The command line turns each into one line and an exit code; a library user can catch `BltError`.
Messages say what was got, what is allowed, and what to do.
"""

from __future__ import annotations

__all__ = ["BackendError", "BltError", "BundleError", "OptionError", "PromptTooLongError", "first_line"]


class BltError(Exception):
    """Base of all deliberate errors of blt_edge."""


class BundleError(BltError):
    """The bundle is missing, damaged, unsafe or made by a newer version."""


class OptionError(BltError, ValueError):
    """An option has a value outside its range."""


class PromptTooLongError(BltError, ValueError):
    """A text needs more positions than the model has."""


class BackendError(BltError):
    """The inference engine is missing or refused a graph."""


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line: its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
