"""The `blt-edge` command.

Starting it costs next to nothing: click is imported when `main` runs; numpy, the engine and rich when a verb
needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["COMPLETION", "main"]

COMPLETION = "_BLT_EDGE_COMPLETE"
"""The environment variable that holds what a shell asks at Tab (`completion`)."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `arguments` (None = this process's) and leave with its exit code.

    0: done. 1: a check or a run failed, or was interrupted. 2: wrong usage.
    """
    try:
        from .program import program
    except KeyboardInterrupt:
        sys.stderr.write("blt-edge: interrupted\n")
        sys.exit(1)
    program.main(arguments)
