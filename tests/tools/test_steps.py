"""A command as a step: what is said of it, and that nothing of it outlives whoever waits for it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from blt_edge.tools.steps import Step, run_step
from support.chat import posix

_HANGS = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"


def ended(folder: Path) -> bool:
    """Whether the process that wrote its number has ended, within some seconds."""
    number = int((folder / "pid").read_text())
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@posix
def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    done = run_step(Step("hang", ("-c", _HANGS)), (sys.executable,), os.environ, tmp_path, seconds=3)
    assert (done.exit_code, done.ok, done.line) == (None, False, "ended after 3 s")
    assert ended(tmp_path)


@posix
def test_a_step_ends_with_whoever_waits_for_it(tmp_path: Path) -> None:
    def interrupt(number: int, frame: object) -> None:
        if not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_step(Step("hang", ("-c", _HANGS)), (sys.executable,), os.environ, tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended(tmp_path)
