"""What every measurement needs: medians and spread, the machine's name, and the JSON line at the end."""

from __future__ import annotations

import json
from typing import Any

from ..profiling.readings import Spread, machine

__all__ = ["Spread", "machine", "print_json"]


def print_json(document: dict[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps({"machine": machine(), **document}))
