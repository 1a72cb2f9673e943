"""`lm_eval` with the model blt-edge; every option is the harness' own."""

from __future__ import annotations

import importlib
import sys

from ...runtime.errors import BltError, OptionError, first_line, requirement
from ..output import error_line


def main() -> None:
    """Run the harness' command line. Exits 2 for a wrong option of the model, 1 for what else it raises."""
    try:
        harness = importlib.import_module("lm_eval.__main__")
    except ImportError as error:
        error_line(
            f"lm-evaluation-harness is missing ({first_line(error)}): pip install {requirement('eval')}"
        )
        sys.exit(1)
    importlib.import_module(f"{__package__}.model")  # which the harness then knows
    try:
        harness.cli_evaluate()
    except BltError as error:
        error_line(str(error))
        sys.exit(2 if isinstance(error, OptionError) else 1)


if __name__ == "__main__":
    main()
