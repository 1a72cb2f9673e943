"""Building one stage's plan in a process of its own.

TensorRT may crash, be killed when memory runs out, and cannot be interrupted while it compiles: none of that
should take this process along, and what it took is given back when it ends. The child reads one JSON line,
the job, from its stdin, and writes one JSON line per event on its stdout. It ends when its stdin does, so it
never outlives its parent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ..calibration.process_memory import peak_resident
from ..runtime.backends.tensorrt_flavour import load_flavour
from ..runtime.errors import BackendError, BltError
from ._signals import uninterrupted
from .tensorrt_stage import PlanFacts, PlanOptions, build_plan

__all__ = ["Moment", "Watch", "build_in_child", "main"]

_START = "from blt_edge.export.tensorrt_worker import main; main()"
_INTERVAL = 0.25
_ORPHANED = 3


@dataclass(frozen=True)
class Moment:
    """What a build is doing now."""

    phase: str
    """In TensorRT's words."""
    done: int
    """Steps of the phase that are done."""
    steps: int
    """Steps of the phase."""
    seconds: float
    """Since the build of this stage began."""
    memory: int | None
    """Most resident memory so far, in bytes; None where unknown."""


Watch = Callable[[Moment], None]
"""Called some times a second while a stage is built."""


def build_in_child(
    target: str,
    graph: Path,
    profiles: tuple[dict[str, tuple[int, int, int]], ...],
    plan: Path,
    options: PlanOptions,
    watch: Watch | None = None,
) -> PlanFacts:
    """`build_plan` with the module of `target` in a child process, which is gone when this returns or raises.

    Raises as `build_plan` and `load_flavour`, and BackendError when the process crashes or is killed.
    """
    job = {
        "target": target,
        "graph": str(graph.absolute()),
        "profiles": profiles,
        "plan": str(plan.absolute()),
        "capabilities": options.capabilities,
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "timing_cache": None if options.timing_cache is None else str(options.timing_cache.absolute()),
        "half_attention": options.half_attention,
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # The current directory is no place for Python to look for modules.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        try:
            result = _follow(process, job, watch)
            if result is None:
                raise _death(process.wait(), graph.name, errors)
            return result
        finally:
            with uninterrupted():
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    assert pipe is not None
                    with suppress(OSError):
                        pipe.close()


def _follow(process: subprocess.Popen[bytes], job: dict[str, Any], watch: Watch | None) -> PlanFacts | None:
    """Events until the result; None when the process ended without one. Raises what the child raised."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    for line in process.stdout:
        event = json.loads(line)
        if "facts" in event:
            return PlanFacts(**event["facts"])
        if "refused" in event:
            raise BackendError(event["refused"])
        if "system" in event:
            raise OSError(*event["system"])
        if watch is not None:
            watch(Moment(**event))
    return None


def _death(status: int, graph: str, errors: IO[bytes]) -> BackendError:
    if status == -getattr(signal, "SIGKILL", 9):
        return BackendError(
            f"{graph}: the system killed TensorRT while it built this, most likely because memory ran out; "
            "close other programs, add swap space, or take a smaller precision, --max-bytes or --max-patches"
        )
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        return BackendError(f"{graph}: TensorRT crashed while it built this ({name})")
    errors.seek(0)
    last = (errors.read().decode(errors="replace").strip().splitlines() or [f"exit code {status}"])[-1]
    return BackendError(f"{graph}: the process that builds this failed: {last}")


# The child.


def main() -> None:
    """Read a job, do it, report."""
    # Ctrl-C reaches the whole terminal; the parent decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries may print: the events have a descriptor that nobody else knows.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reporter = _Reporter(events)
    threading.Thread(target=reporter.tick, daemon=True).start()
    try:
        facts = build_plan(
            load_flavour(job["target"]),
            Path(job["graph"]),
            tuple({name: tuple(sizes) for name, sizes in axes.items()} for axes in job["profiles"]),
            Path(job["plan"]),
            PlanOptions(
                tuple(job["capabilities"]),
                job["workspace"],
                job["optimization_level"],
                None if job["timing_cache"] is None else Path(job["timing_cache"]),
                job["half_attention"],
            ),
            reporter.report,
        )
    except BltError as error:
        reporter.send({"refused": str(error)})
    except OSError as error:
        reporter.send({"system": [error.errno, error.strerror, error.filename]})
    else:
        reporter.send({"facts": asdict(facts)})
    # What TensorRT would do on the way out is of no use to anybody.
    os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(_ORPHANED)


class _Reporter:
    """Writes events: what was reported last, some times a second."""

    def __init__(self, events: IO[str]) -> None:
        self._events, self._lock = events, threading.Lock()
        self._started = time.perf_counter()
        self._last = ("starting", 0, 1)

    def report(self, phase: str, done: int, steps: int) -> None:
        """Keep what is being done."""
        self._last = (phase, done, steps)

    def tick(self) -> None:
        """Send it, again and again."""
        while True:
            phase, done, steps = self._last
            seconds = time.perf_counter() - self._started
            self.send(asdict(Moment(phase, done, steps, seconds, peak_resident())))
            time.sleep(_INTERVAL)

    def send(self, event: dict[str, Any]) -> None:
        """Write one event."""
        with self._lock:
            self._events.write(json.dumps(event) + "\n")
            self._events.flush()
