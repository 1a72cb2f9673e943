"""A function in a process of its own, so that its memory, crash or hang is not ours: the one protocol for it.

The child gets one JSON request on stdin and writes JSON lines: {"event": ...} as often as it likes,
{"warning": ...} for each BltWarning, which the parent gives again, at the end {"result": ...}, or
{"error": ...} for an error that was foreseen. It ends when its parent does.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BltError, BltWarning, OptionError
from .files import uninterrupted

__all__ = ["Outcome", "Tell", "run_child", "serve"]

Tell = Callable[[Mapping[str, Any]], None]
"""Sends an event to the parent; may be called from any thread."""

_START = "import sys; from blt_edge.runtime.child import serve; serve(sys.argv[1])"
_ORPHANED = 3


@dataclass(frozen=True)
class Outcome:
    """How a child ended: one of the first three is not None."""

    result: dict[str, Any] | None = None
    """What its function returned."""
    error: Exception | None = None
    """An error that was foreseen: BltError, OptionError, OSError or MemoryError, with the child's words."""
    death: str | None = None
    """How it died, in words that follow "its process": "crashed (SIGSEGV)", "ended with code 1: ..."."""
    log: str = ""
    """What it and its libraries wrote on stderr."""


def run_child(
    module: str,
    request: Mapping[str, Any],
    listen: Callable[[dict[str, Any]], None] | None = None,
    *,
    patience: float | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Call `work(request, tell)` of a module by its full name, in a process that is gone when this returns.

    listen: gets what the function tells. patience: seconds after which the child is killed; None waits.
    folder: the directory it runs in, and may write to; None is ours.
    Raises what `listen` raises; Ctrl-C and termination pass through.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            # The current directory is no place for Python to look for modules.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        timer = threading.Timer(patience or 0, process.kill)
        timer.daemon = True
        if patience is not None:
            timer.start()
        try:
            last = _follow(process, request, listen)
            status = process.wait() if last is None else 0
            expired = patience is not None and not timer.is_alive()
        finally:
            timer.cancel()
            with uninterrupted():
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    assert pipe is not None
                    with suppress(OSError):
                        pipe.close()
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
    if last is None:
        death = f"gave no answer within {patience:g} s" if expired else _death(status, text)
        return Outcome(death=death, log=text)
    return Outcome(last.get("result"), _error(last.get("error")), log=text)


def _follow(
    process: subprocess.Popen[bytes],
    request: Mapping[str, Any],
    listen: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any] | None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    for line in process.stdout:
        message: dict[str, Any] = json.loads(line)
        if "warning" in message:
            warnings.warn(message["warning"], BltWarning, stacklevel=3)
        elif "event" not in message:
            return message
        elif listen is not None:
            listen(message["event"])
    return None


def _death(status: int, log: str) -> str:
    if status == -getattr(signal, "SIGKILL", 9):
        return "was killed, most likely because memory ran out"
    if status < 0:
        known = -status in set(signal.Signals)
        return f"crashed ({signal.Signals(-status).name if known else f'signal {-status}'})"
    lines = log.strip().splitlines()
    return f"ended early with code {status}" + (f": {lines[-1]}" if lines else "")


def _error(told: Mapping[str, Any] | None) -> Exception | None:
    if told is None:
        return None
    if told["kind"] == "system":
        return OSError(*told["arguments"])
    kinds: dict[str, type[Exception]] = {"usage": OptionError, "memory": MemoryError}
    return kinds.get(told["kind"], BltError)(told["message"])


# The child's side.


def serve(module: str) -> None:
    """Read a request from stdin, call the module's `work`, report, and end the process."""
    # Ctrl-C reaches the whole terminal; the parent decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries may print: the messages have a descriptor that nobody else knows.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(kind: str, content: Any) -> None:
        with lock:
            messages.write(json.dumps({kind: content}) + "\n")
            messages.flush()

    def end(kind: str, content: Any) -> None:
        for stream in (sys.stdout, sys.stderr):  # once it has this, the parent ends us and reads the log
            stream.flush()
        send(kind, content)

    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, BltWarning):
            send("warning", str(message))
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show
    try:
        result = importlib.import_module(module).work(request, lambda event: send("event", event))
    except BltError as error:
        end("error", {"kind": "usage" if isinstance(error, OptionError) else "run", "message": str(error)})
    except MemoryError as error:
        end("error", {"kind": "memory", "message": str(error)})
    except OSError as error:
        end("error", {"kind": "system", "arguments": [error.errno, error.strerror, error.filename]})
    else:
        end("result", result)
    # What engines would do on the way out is of no use to anybody.
    os._exit(0)


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock would keep the interpreter from ending.
    while os.read(0, 4096):
        pass
    os._exit(_ORPHANED)
