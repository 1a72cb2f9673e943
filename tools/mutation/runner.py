"""Runs tests in forked processes, each with one module compiled from a tree of its own.

The parent imports whatever is heavy and not under test once (`preload`), so that a process has its tests
running in about half a second; it never imports the project's own modules. hypothesis draws the same examples
in every process, stores none and does not shrink. A test that takes much more processor time than it needed
on the unchanged module ends its process by a signal, which counts as noticing the mutant.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from .operators import Mutant

__all__ = ["Baseline", "Outcome", "measure", "preload", "run"]

_HEAVY = (
    *("numpy", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "safetensors.numpy", "ml_dtypes", "click"),
    *("hypothesis", "_hypothesis_pytestplugin", "pytest", "_pytest.tmpdir", "_pytest.python", "rich.console"),
    *("torch", "transformers", "transformers.models.blt.modeling_blt"),
    *("transformers.generation.logits_process", "hypothesis.internal.conjecture.engine"),
)
_ALLOWED = 5
"""How many times the processor time of the unchanged module a test may take."""
_SLACK = 1.5
"""Seconds of processor time that any test may take."""
_MEMORY = 12 << 30
"""Address space of a process, in bytes: what grows without end must not take the machine with it."""
_TIMED_OUT = -signal.SIGPROF


@dataclass
class Baseline:
    """What a target's tests do on the unchanged module."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Processor time by test, its fixtures included."""
    lines: dict[str, list[int]] = field(default_factory=dict)
    """The module's lines by test."""
    imported: list[int] = field(default_factory=list)
    """The module's lines that run when it is imported."""

    def tests_for(self, mutant: Mutant) -> list[str]:
        """The tests that run the mutant's statement, the fast ones first; one file's tests stay together."""
        wanted = set(mutant.lines)
        # What runs when the module is imported is before any test, and for all of them.
        early = mutant.at_import or not wanted.isdisjoint(self.imported)
        tests = [test for test, lines in self.lines.items() if early or not wanted.isdisjoint(lines)]

        def order(test: str) -> tuple[int, str, float]:
            seconds = self.seconds[test]
            return sum(seconds > edge for edge in (0.1, 0.5, 2.0)), test.split("::")[0], seconds

        return sorted(tests, key=order)


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    status: str
    """killed, timeout, survived, or uncovered where no test runs the statement."""
    test: str
    """The test that noticed."""
    seconds: float


def preload() -> None:
    """Import what every process needs, as far as it is installed."""
    for name in _HEAVY:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    gc.collect()
    gc.freeze()


class _Compiled(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from code instead of its file."""

    def __init__(self, name: str, path: Path, code: Any) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


class _Watch:
    """A pytest plugin: chosen tests in order, a limit for each, and what they took and ran."""

    def __init__(self, chosen: list[str] | None, limits: dict[str, float], traced: Path | None) -> None:
        self._places = None if chosen is None else {test: place for place, test in enumerate(chosen)}
        self._limits, self._traced = limits, str(traced) if traced else None
        self._lines: set[int] = set()
        self._fixtures: dict[str, tuple[float, set[int]]] = {}
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, list[int]] = {}
        self.imported: set[int] = set()
        self.failed = ""

    def begin(self) -> None:
        """Trace imports, of which some come before any of pytest's hooks."""
        if self._traced:
            sys.settrace(self._trace)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        sys.settrace(None)
        self.imported = self._lines
        places = self._places
        if places is not None:
            items[:] = sorted(
                (item for item in items if item.nodeid in places), key=lambda item: places[item.nodeid]
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        # What a shared fixture does counts for every test that uses it, not for the first alone.
        lines, self._lines = self._lines, set()
        began = time.process_time()
        try:
            return (yield)
        finally:
            seconds, found = self._fixtures.get(fixturedef.argname, (0.0, set()))
            spent = time.process_time() - began
            self._began += spent
            self._fixtures[fixturedef.argname] = (max(seconds, spent), found | self._lines)
            self._lines = lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self._began = time.process_time()
        self._lines = set()
        if item.nodeid in self._limits:
            signal.setitimer(signal.ITIMER_PROF, self._limits[item.nodeid])
        if self._traced:
            sys.settrace(self._trace)
        result = yield
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        shared = [self._fixtures[name] for name in item.fixturenames if name in self._fixtures]
        seconds = time.process_time() - self._began
        self.seconds[item.nodeid] = seconds + sum(spent for spent, _ in shared)
        self.lines[item.nodeid] = sorted(self._lines.union(*(lines for _, lines in shared)))
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = report.nodeid

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != self._traced:
            return None
        self._lines.add(frame.f_lineno)
        return self._trace


def _pytest(files: Iterable[str], watch: _Watch, folder: Path) -> int:
    from hypothesis import Phase, settings

    # The project's own profile, made later, takes over whatever it does not set itself.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutation", derandomize=True, database=None, deadline=None, phases=phases)
    settings.load_profile("mutation")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = [
        "-x",
        "-q",
        "--tb=no",
        f"--basetemp={folder}",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]
    options += ["-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin"]
    watch.begin()
    return int(pytest.main([*options, *files], plugins=[watch]))


@dataclass
class _Child:
    pid: int
    began: float
    deadline: float
    folder: Path


def _fork(work: Callable[[Path], dict[str, Any]], seconds: float) -> _Child:
    folder = Path(tempfile.mkdtemp(prefix="mutation-"))
    pid = os.fork()
    if pid:
        now = time.monotonic()
        return _Child(pid, now, now + seconds, folder)
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1) if os.environ.get("MUTATION_STDERR") else (0, 1, 2):
            os.dup2(quiet, number)
        answer = work(folder)
        status = answer.pop("status")
        (folder / "answer.json").write_text(json.dumps(answer))
    finally:
        os._exit(status)


def _collect(children: list[_Child]) -> Iterator[tuple[_Child, int, dict[str, Any]]]:
    """Those that have ended, with exit status (a signal's is negative) and answer."""
    for child in list(children):
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if not pid and time.monotonic() > child.deadline:
            os.killpg(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            pid, status = child.pid, signal.SIGPROF
        if pid:
            children.remove(child)
            path = child.folder / "answer.json"
            answer = json.loads(path.read_text()) if path.exists() else {}
            shutil.rmtree(child.folder, ignore_errors=True)
            yield child, os.waitstatus_to_exitcode(status), answer


def _alone(work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    children = [_fork(work, 1800)]
    while True:
        for _, status, answer in _collect(children):
            if status:
                raise SystemExit(f"tests fail on the unchanged module: {answer.get('failed') or status}")
            return answer
        time.sleep(0.02)


def measure(path: Path, files: list[str]) -> Baseline:
    """Time and lines of the module's tests, all of which have to pass."""

    def work(traced: Path | None) -> Callable[[Path], dict[str, Any]]:
        def tests(folder: Path) -> dict[str, Any]:
            watch = _Watch(None, {}, traced)
            status = _pytest(files, watch, folder / "t")
            answer = {"status": status, "failed": watch.failed, "seconds": watch.seconds}
            return {**answer, "lines": watch.lines, "imported": sorted(watch.imported)}

        return tests

    traced = _alone(work(path))
    return Baseline(_alone(work(None))["seconds"], traced["lines"], traced["imported"])


def run(
    module: str,
    path: Path,
    tree: ast.Module,
    mutants: list[Mutant],
    files: list[str],
    baseline: Baseline,
    jobs: int,
    done: Callable[[Mutant, Outcome], None],
) -> None:
    """Run every mutant's tests, `jobs` at a time; `done` is told of each as it ends."""
    waiting, running = list(reversed(mutants)), list[_Child]()
    by_pid: dict[int, Mutant] = {}
    limits = {test: _SLACK + _ALLOWED * seconds for test, seconds in baseline.seconds.items()}

    def work(mutant: Mutant, tests: list[str]) -> Callable[[Path], dict[str, Any]]:
        def changed(folder: Path) -> dict[str, Any]:
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            mutant.apply()
            code = compile(ast.fix_missing_locations(tree), str(path), "exec")
            sys.meta_path.insert(0, _Compiled(module, path, code))
            watch = _Watch(tests, limits, None)
            needed = {test.split("::")[0] for test in tests}
            status = _pytest([file for file in files if file in needed], watch, folder / "t")
            return {"status": status, "failed": watch.failed}

        return changed

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop()
                tests = baseline.tests_for(mutant)
                if not tests:
                    done(mutant, Outcome("uncovered", "", 0.0))
                    continue
                seconds = 30 + 4 * sum(limits[test] for test in tests)
                running.append(_fork(work(mutant, tests), seconds))
                by_pid[running[-1].pid] = mutant
            for child, status, answer in _collect(running):
                kind = "survived" if status == 0 else "timeout" if status == _TIMED_OUT else "killed"
                seconds = time.monotonic() - child.began
                done(by_pid.pop(child.pid), Outcome(kind, answer.get("failed", ""), round(seconds, 2)))
            time.sleep(0.005)
    finally:
        for child in running:
            os.killpg(child.pid, signal.SIGKILL)
            shutil.rmtree(child.folder, ignore_errors=True)
