"""Commands typed as a user would, one after another, each with what its output must say.

Whoever proves blt-edge somewhere (other versions, other processors) makes a list of them.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.golden import Golden
from ..export.quality import lead_length

STEP_SECONDS = 900
"""A step that takes longer has failed; on one core the slowest takes 15."""

Check = Callable[[str], "str | None"]
"""stdout of a step that exited with 0 -> what is wrong all the same, or None."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    arguments: tuple[str, ...]
    """After `blt-edge`."""
    check: Check | None = None


@dataclass(frozen=True)
class Done:
    """What a step did."""

    name: str
    exit_code: int | None
    """None when it was ended because it took too long."""
    seconds: float
    line: str
    """What is wrong in one line; else the last line of stderr."""
    lines: int
    """Lines on stdout and stderr together."""
    traceback: bool
    ok: bool


def run_step(
    step: Step,
    program: Sequence[str | Path],
    variables: Mapping[str, str],
    folder: Path,
    *,
    seconds: float = STEP_SECONDS,
) -> Done:
    """Run it in `folder`; program: what is typed before the step's arguments. Ends it after `seconds`."""
    started = time.monotonic()
    # A session of its own, so that what `compare` started ends with it.
    with subprocess.Popen(
        [*program, *step.arguments],
        cwd=folder,
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, messages = process.communicate(timeout=seconds)
            exit_code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, messages = process.communicate()
            messages += f"\nended after {seconds:g} s"
            exit_code = None
        except BaseException:
            # Whoever ends us ends it: in a session of its own it is sent no signal of the terminal's.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    took = round(time.monotonic() - started, 1)
    lines = [line.strip() for line in f"{output}\n{messages}".splitlines() if line.strip()]
    last = next((line.strip() for line in reversed(messages.splitlines()) if line.strip()), "")
    traceback = any("Traceback (most recent call last)" in line for line in lines)
    fault = None
    if exit_code == 0 and step.check is not None:
        try:
            fault = step.check(output)
        except (LookupError, TypeError, ValueError) as error:
            fault = f"unexpected output: {error!r}"
    elif exit_code is not None and exit_code < 0:
        fault = f"ended by signal {-exit_code}: {last}"
    ok = exit_code == 0 and fault is None and not traceback
    return Done(step.name, exit_code, took, fault or last, len(lines), traceback, ok)


def greedy_check(golden: Golden, count: int, built: bool) -> Check:
    """Of `generate --json -`: the golden file's first greedy bytes, on an engine that `build` made or not."""
    expected = golden.greedy[:count]

    def check(output: str) -> str | None:
        document: dict[str, Any] = json.loads(output)
        text, engine = base64.b64decode(document["data_base64"]), document["engine"]
        if text != expected:
            same = lead_length(text, expected)
            return f"the greedy text differs from {golden.name} at byte {same} of {len(expected)}"
        if engine["name"].startswith("engines/") != built:
            return f"ran on {engine['name']}" + (f": {engine['reason']}" if engine["reason"] else "")
        return None

    return check
