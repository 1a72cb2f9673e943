"""Asking `probe` in a process of its own, so that nothing that crashes or hangs there does so here."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PATIENCE", "Answer", "Ask", "ask"]

PATIENCE = 60.0
"""Seconds that a probe may take: an engine's first start on a small board takes some ten."""

_PROBE = (sys.executable, "-m", f"{__package__}.engine_worker")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOG_HEAD = re.compile(r"^.*?\[[EW]:onnxruntime:[^]]*\]\s*")
_FAILURE = re.compile(r"error|fail|cannot|require", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What a probe said."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What it found out; empty when it did not come that far."""
    error: str | None = None
    """Why it did not work, in one line; None when it did."""
    said: str = ""
    """The most telling line of the engine's log; empty when there is none."""


Ask = Callable[..., Answer]
"""`ask`, or what takes its place in tests: called with a subject and names."""


def ask(subject: str, *names: str, patience: float = PATIENCE, command: Sequence[str] = _PROBE) -> Answer:
    """Let the probe answer; however it ends, the answer says so."""
    with tempfile.TemporaryDirectory(prefix="blt-edge-doctor-") as folder:
        try:
            # Not in the user's folder, whose files could be taken for modules.
            done = subprocess.run(
                [*command, subject, *names],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=patience,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Answer(error=f"no answer within {patience:g} s")
        except OSError as failed:
            return Answer(error=failed.strerror or type(failed).__name__)
    said = _telling(done.stderr.decode("utf-8", "replace"))
    facts = _facts(done.stdout.decode("utf-8", "replace"))
    if done.returncode < 0:
        return Answer(error=f"crashed ({_signal(-done.returncode)})", said=said)
    if done.returncode or facts is None:
        return Answer(error=said or f"ended with exit code {done.returncode} and no answer", said=said)
    error = facts.pop("error", None)
    return Answer(facts, None if error is None else str(error), said)


def _facts(output: str) -> dict[str, Any] | None:
    lines = output.strip().splitlines()
    try:
        facts = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None


def _telling(log: str) -> str:
    lines = [_LOG_HEAD.sub("", _COLOUR.sub("", line)).strip() for line in log.splitlines()]
    telling = [line for line in lines if _FAILURE.search(line)] or [line for line in lines if line]
    return telling[-1][:300] if telling else ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
