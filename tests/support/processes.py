"""Children that heed signals, whatever the suite runs under: in the background, or with nohup, a shell has
signals ignored, and what is ignored stays so in children."""

from __future__ import annotations

import os
import signal
from typing import Any

__all__ = ["HEEDING", "heed_signals"]


def heed_signals() -> None:
    """In a child, before it runs a program: what ends a process ends this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


HEEDING: dict[str, Any] = {"preexec_fn": heed_signals} if os.name == "posix" else {}
"""Options of `subprocess.Popen` for a child that is sent signals."""
