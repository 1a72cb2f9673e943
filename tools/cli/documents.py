"""Inputs read whole and JSON documents written whole: the files that a verb is given by the user."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import STDIN
from .session import Session, is_terminal

__all__ = ["read_input", "shown_name", "write_json"]


def read_input(path: Path, session: Session, what: str) -> bytes:
    """Everything in a file, or on stdin for `-`. Raises OSError."""
    if path != STDIN:
        return path.read_bytes()
    if sys.stdin is None:
        return b""
    if is_terminal(sys.stdin):
        session.say(f"reading {what} from the terminal; end it with Ctrl-D on a line of its own")
    return sys.stdin.buffer.read()


def shown_name(path: Path) -> str:
    """What to call an input."""
    return "stdin" if path == STDIN else str(path)


def write_json(target: Path, document: Mapping[str, Any]) -> None:
    """Write one document on stdout for `-`, else to a file, whole or not at all. Raises OSError."""
    text = json.dumps(_finite(document), indent=2, ensure_ascii=True) + "\n"
    if target == STDIN:
        if sys.stdout is not None:
            sys.stdout.write(text)
        return
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="ascii")  # a pipe or a device
        return
    temporary = target.with_name(f".{target.name[:100]}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="ascii")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    # JSON has no word for nan and infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
