"""Runs a target's inputs in a process of its own and says what went wrong with each.

The process has a directory of its own, a limit on its address space, and a hook on what Python opens, starts
and connects to. It writes each input's place into shared memory before it begins, so that the parent knows
which one ended or stopped it; the next process goes on behind that.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from .mutate import SECRET
from .targets import Files, Target

_FORK = multiprocessing.get_context("fork")
_PACKAGE = str(Path(__file__).resolve().parents[2])
# What Python itself may read later than at its start, and where the system tells of itself.
_READ = tuple(f"{path}/" for path in (sys.prefix, sys.base_prefix, _PACKAGE, "/proc", "/sys"))
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
)
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
_SOCKETS = ("socket.connect", "socket.bind", "socket.getaddrinfo")
_IN_OPEN = 0x20

_LONGEST_MESSAGE = 1000
_PATIENCE = 30
"""So much longer than its processor time an input may take by the clock."""
_MOST_ENDS = 20
"""A target whose process was ended this often is given up."""


@dataclass
class Fault:
    """One thing that went wrong, and the inputs that led to it."""

    what: str
    """The error in one line."""
    trace: str
    """Where, of the first."""
    numbers: list[int] = field(default_factory=list)


@dataclass
class Outcome:
    """How a target's inputs ended."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    """By the clock."""
    peak: int = 0
    """Largest resident memory, in bytes."""
    skipped: str = ""
    """What is not installed."""
    faults: dict[str, Fault] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused + sum(len(fault.numbers) for fault in self.faults.values())

    def add(self, number: int, what: str, trace: str) -> None:
        """Errors of the same kind from the same place are one fault."""
        frames = [line for line in trace.splitlines() if line.startswith("  File ")] or [""]
        place = frames[0 if "most recent call first" in trace else -1]
        self.faults.setdefault(what.partition(":")[0] + place, Fault(what, trace)).numbers.append(number)


@dataclass
class _Job:
    target: Target
    seed: int
    numbers: Sequence[int]
    given: Files | None = None
    """The input to attack with, in the place of one that is made."""
    make_only: bool = False


def run(
    target: Target,
    seed: int,
    numbers: Sequence[int],
    given: Files | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Attack with the inputs of these numbers; `given`: with this one instead. progress(inputs begun)."""
    outcome, began, shared, ends = Outcome(), time.monotonic(), _FORK.RawArray("q", 4), 0
    shared[0] = -1

    def told(message: tuple[Any, ...]) -> None:
        if message[0] == "fault":
            outcome.add(numbers[message[1]], *message[2:])
        else:
            outcome.skipped = message[1]

    while shared[0] + 1 < len(numbers) and ends < _MOST_ENDS and not outcome.skipped:
        before = shared[0]
        end, log = _follow(_Job(target, seed, numbers, given), shared, told, progress)
        if end is None:
            break
        if shared[0] == before:  # what is valid does it too, or nothing was begun
            raise RuntimeError(f"{target.name}: {end} before any input\n{log}")
        outcome.add(numbers[shared[0]], end, log)
        ends += 1
    _, outcome.accepted, outcome.refused, outcome.peak = shared
    outcome.seconds = time.monotonic() - began
    return outcome


def make(target: Target, seed: int, numbers: Sequence[int]) -> dict[int, Files]:
    """The inputs of these numbers."""
    made: dict[int, Files] = {}
    _follow(
        _Job(target, seed, numbers, make_only=True), _FORK.RawArray("q", 4), lambda told: made.update([told])
    )
    return made


def _follow(
    job: _Job, shared: Any, told: Callable[[Any], None], progress: Callable[[int], None] = lambda done: None
) -> tuple[str | None, str]:
    """A process for the numbers behind `shared[0]`: how it was ended, None where it was not; its log."""
    ours, theirs = _FORK.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="blt-edge-fuzz-", ignore_cleanup_errors=True) as folder:
        process = _FORK.Process(target=_serve, args=(job, Path(folder), shared, theirs))
        process.start()
        theirs.close()
        at, since, end, finished = shared[0], time.monotonic(), None, False
        try:
            while True:
                if ours.poll(0.2):
                    try:
                        message = ours.recv()
                    except EOFError:
                        break
                    finished = message is None
                    if not finished:
                        told(message)
                if shared[0] != at:
                    at, since = shared[0], time.monotonic()
                    progress(at + 1)
                elif time.monotonic() - since > job.target.seconds * _PATIENCE + 60 * (at < 0):
                    os.kill(process.pid or 0, signal.SIGSTOP)
                    if shared[0] == at:  # still
                        end = f"takes more than {job.target.seconds * _PATIENCE:g} s"
                        os.kill(process.pid or 0, signal.SIGUSR1)  # its stack goes to the log
                    os.kill(process.pid or 0, signal.SIGCONT)
                    if end:
                        time.sleep(0.5)
                        break
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL if end or not finished else signal.SIGTERM)
            process.join()
        if end is not None:
            shared[0] = at  # not a later one, should it have gone on for a moment
        elif not finished:
            code = process.exitcode or 0
            end = f"ends the process with {signal.Signals(-code).name if code < 0 else f'code {code}'}"
        return end, (Path(folder) / "log").read_text("utf-8", "replace")[:8000]


# The process's side.


def _serve(job: _Job, folder: Path, shared: Any, pipe: Connection) -> None:
    os.setsid()
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    sys.stdout = sys.stderr = os.fdopen(os.dup(log), "w", buffering=1)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)
    (folder / SECRET).write_bytes(b"secret")
    inside = folder / "input"
    for path in (inside, folder / "tmp"):
        path.mkdir()
    tempfile.tempdir = str(folder / "tmp")
    os.chdir(folder / "tmp")  # what has no directory before its name is inside
    target = job.target
    try:
        target.prepare(inside)
        target.attack(target.valid)
    except ImportError as error:
        pipe.send(("skipped", error.name or str(error)))
        pipe.send(None)
        return
    if job.make_only:
        for number in job.numbers:
            pipe.send((number, target.make(random_of(target, job.seed, number))))
        pipe.send(None)
        return
    guard = _Guard(folder, log, target)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * target.memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for index in range(shared[0] + 1, len(job.numbers)):
        shared[0] = index
        files = job.given or target.make(random_of(target, job.seed, job.numbers[index]))
        accepted, fault = guard.attack(target, files)
        shared[3] = max(shared[3], _peak())
        if fault is None:
            shared[1 if accepted else 2] += 1
        else:
            pipe.send(("fault", index, *fault))
    pipe.send(None)


def random_of(target: Target, seed: int, number: int) -> Random:
    """The random state that makes one input."""
    return Random(f"{seed}/{target.name}/{number}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Guard:
    """Watches what an attack does beside what it answers."""

    def __init__(self, folder: Path, log: int, target: Target) -> None:
        self._inside, self._log = (f"{folder}/input", f"{folder}/tmp"), log
        starts = () if target.processes else _STARTS
        self._forbidden = starts if target.sockets else (*starts, *_SOCKETS)
        self._active, self._seen = False, list[tuple[str, str]]()
        sys.addaudithook(self._hook)
        # Engines open files without Python.
        libc = ctypes.CDLL(None)
        self._notify = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(self._notify, os.fsencode(folder / SECRET), _IN_OPEN)

    def attack(self, target: Target, files: Files) -> tuple[bool, tuple[str, str] | None]:
        """Whether it was accepted, and what is wrong: in a line, and where."""
        self._seen.clear()
        accepted, peak, began = True, _peak(), time.process_time()
        self._active = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                target.attack(files)
        except target.refusals as error:
            accepted, message = False, str(error)
            if not message.isprintable() or not 0 < len(message) <= _LONGEST_MESSAGE:
                self._note(f"message: {message[:300]!r}", error)
        except BaseException as error:
            self._note(f"{type(error).__name__}: {error}"[:300].splitlines()[0], error)
        self._active = False
        took, grown = time.process_time() - began, _peak() - peak
        if took > target.seconds:
            self._note(f"takes {took:.1f} s")
        if grown > target.memory:
            self._note(f"takes {grown >> 20} MiB")
        with suppress(BlockingIOError):
            os.read(self._notify, 4096)
            self._note("opens a file outside")
        if os.fstat(self._log).st_size:
            printed = os.pread(self._log, 1 << 16, 0).decode("utf-8", "replace")
            os.ftruncate(self._log, 0)
            if not printed.replace("\n", "").replace("\t", "").isprintable():
                self._note(f"prints: {printed[:300]!r}")
        return accepted, self._seen[0] if self._seen else None

    def _note(self, what: str, error: BaseException | None = None) -> None:
        self._seen.append((what, "".join(traceback.format_exception(error)) if error else ""))

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        paths, writes = arguments[:1], True
        if event in ("open", "os.listdir", "os.scandir"):
            mode, flags = (*arguments, "r", 0)[1:3] if event == "open" else ("r", 0)
            writes = bool(set(mode or "") & set("wax+") or (flags or 0) & _WRITING)
        elif event in _CHANGES:
            paths = arguments[:2]
        elif event in self._forbidden:
            paths = ("/",)
        else:
            return
        places = [os.fsdecode(path) for path in paths if isinstance(path, (str, bytes, os.PathLike))]
        for place in map(os.path.abspath, places):
            if not place.startswith(self._inside) and (writes or not place.startswith(_READ)):
                self._active = False  # while this is written down
                what = f"{event}: {arguments[:3]!r:.200}"
                self._seen.append((what, "".join(traceback.format_stack())))
                self._active = True
