"""Asking `engine_worker` in another process, so that nothing that crashes or hangs there does so here."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.child import run_child

__all__ = ["PATIENCE", "Answer", "Ask", "ask"]

PATIENCE = 60.0
"""Seconds that a probe may take: an engine's first start on a small board takes some ten."""

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


def ask(subject: str, *names: str, patience: float = PATIENCE) -> Answer:
    """Let the child answer; however it ends, the answer says so."""
    # Engines write files where they run: not in the user's folder.
    with tempfile.TemporaryDirectory(prefix="blt-edge-doctor-") as folder:
        request = {"subject": subject, "names": names}
        outcome = run_child(f"{__package__}.engine_worker", request, patience=patience, folder=Path(folder))
    said = _telling(outcome.log)
    if outcome.result is None:
        return Answer(error=outcome.death or str(outcome.error), said=said)
    facts = dict(outcome.result)
    return Answer(facts, facts.pop("error", None), said)


def _telling(log: str) -> str:
    lines = [_LOG_HEAD.sub("", _COLOUR.sub("", line)).strip() for line in log.splitlines()]
    telling = [line for line in lines if _FAILURE.search(line)] or [line for line in lines if line]
    return telling[-1][:300] if telling else ""
