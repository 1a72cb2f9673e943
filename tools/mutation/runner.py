"""Runs tests in forked processes, each with one module compiled from a tree of its own.

The parent imports whatever is heavy and not under test once (`preload`), so that a process has its tests
running in about half a second; it never imports the project's own modules. hypothesis draws the same examples
in every process, stores none and does not shrink. A test that takes much more processor time than it needed
on the unchanged module ends its process by a signal, which counts as noticing the mutant.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import coverage
import pytest

from .operators import Mutant

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
_FORK = multiprocessing.get_context("fork")


def preload() -> None:
    """Import what every process needs, as far as it is installed."""
    for name in _HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


@dataclass
class Baseline:
    """What a module's tests do before it is changed."""

    seconds: dict[str, float]
    """Processor time by test."""
    lines: dict[str, set[int]]
    """The module's lines by test; by "" those that run when it is imported or a shared fixture is made."""

    def limits(self, mutant: Mutant) -> dict[str, float]:
        """The tests that run the mutant's statement and how long each may take: fast ones first.

        One file's tests stay together.
        """
        wanted = set(mutant.lines)
        early = not wanted.isdisjoint(self.lines.get("", ()))
        tests = [test for test in self.seconds if early or not wanted.isdisjoint(self.lines.get(test, ()))]

        def order(test: str) -> tuple[int, str, float]:
            seconds = self.seconds[test]
            return sum(seconds > edge for edge in (0.1, 0.5, 2.0)), test.split("::")[0], seconds

        return {test: _SLACK + _ALLOWED * self.seconds[test] for test in sorted(tests, key=order)}


def measure(path: Path, files: Sequence[str]) -> Baseline:
    """Time and lines of the tests in `files`, all of which have to pass, for the module at `path`."""

    def work(folder: Path) -> tuple[int, str, Baseline]:
        tracer = coverage.Coverage(data_file=None, config_file=False, include=[str(path)])
        tracer.set_option("run:core", "ctrace")  # newer ones forget which test a line was run by
        tracer.start()
        watch = _Watch(tracer=tracer)
        status = _pytest(files, watch, folder)
        tracer.stop()
        lines: dict[str, set[int]] = {}
        for line, tests in tracer.get_data().contexts_by_lineno(str(path)).items():
            for test in tests:
                lines.setdefault(test, set()).add(line)
        return status, watch.failed, Baseline(watch.seconds, lines)

    child = _Child(work, 1800)
    wait([child.answer], 1800)
    status, failed, baseline = child.end() or (1, "", Baseline({}, {}))
    if status:
        raise SystemExit(f"tests fail on the unchanged module: {failed or 'pytest ended by itself'}")
    return baseline


def run(
    module: str,
    path: Path,
    tree: ast.Module,
    mutants: Sequence[Mutant],
    baseline: Baseline,
    jobs: int,
    done: Callable[[Mutant, str, str], None],
) -> None:
    """Run every mutant's tests, `jobs` at a time.

    done: told of each as it ends: killed, survived, or uncovered where no test runs the statement; and of
    the test that noticed, "" where that was its process's end.
    """

    def work(mutant: Mutant, limits: dict[str, float]) -> Callable[[Path], tuple[int, str]]:
        def changed(folder: Path) -> tuple[int, str]:
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            mutant.apply()
            code = compile(ast.fix_missing_locations(tree), str(path), "exec")
            sys.meta_path.insert(0, _Compiled(module, path, code))
            watch = _Watch(limits)
            files = dict.fromkeys(test.split("::")[0] for test in limits)
            return _pytest(list(files), watch, folder), watch.failed

        return changed

    waiting, running = list(reversed(mutants)), dict[Connection, tuple[Mutant, _Child]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop()
                limits = baseline.limits(mutant)
                if limits:
                    child = _Child(work(mutant, limits), 30 + 4 * sum(limits.values()))
                    running[child.answer] = mutant, child
                else:
                    done(mutant, "uncovered", "")
            wait(list(running), 0.5)
            for answer, (mutant, child) in list(running.items()):
                if answer.poll() or time.monotonic() > child.deadline:
                    del running[answer]
                    status, failed = child.end() or (None, "")
                    done(mutant, "killed" if status != 0 else "survived", failed)
    finally:
        for _, child in running.values():
            child.end()


class _Child:
    """Work in a forked process, which is given an empty folder; what it returns comes through a pipe."""

    def __init__(self, work: Callable[[Path], Any], seconds: float) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutation-", ignore_cleanup_errors=True)
        self.answer, theirs = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_serve, args=(work, Path(self._folder.name, "t"), theirs))
        self._process.start()
        theirs.close()
        self.deadline = time.monotonic() + seconds

    def end(self) -> Any:
        """What the work returned, None if nothing yet. Ends the process and all that it started."""
        found = None
        with contextlib.suppress(EOFError):
            found = self.answer.recv() if self.answer.poll() else None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        self._folder.cleanup()
        return found


def _serve(work: Callable[[Path], Any], folder: Path, answer: Connection) -> None:
    os.setsid()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    answer.send(work(folder))


class _Compiled(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from code instead of its file."""

    def __init__(self, name: str, path: Path, code: Any) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        wanted = name == self._name
        return importlib.util.spec_from_file_location(name, self._path, loader=self) if wanted else None

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


class _Watch:
    """A pytest plugin: the tests of `limits` in their order, each with its limit; what tests took and ran."""

    def __init__(
        self, limits: dict[str, float] | None = None, tracer: coverage.Coverage | None = None
    ) -> None:
        self._limits, self._tracer = limits, tracer
        self.seconds: dict[str, float] = {}
        self.failed = ""

    def _trace(self, test: str) -> None:
        if self._tracer is not None:
            self._tracer.switch_context(test)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self._limits is not None:
            by_name = {item.nodeid: item for item in items}
            items[:] = [by_name[test] for test in self._limits]

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        # What tests share counts for all of them, not for the first that asks for it.
        began, (left, _) = time.process_time(), signal.setitimer(signal.ITIMER_PROF, 0)
        self._trace("")
        try:
            return (yield)
        finally:
            self._began += time.process_time() - began
            signal.setitimer(signal.ITIMER_PROF, left)
            self._trace(self._test)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self._test, self._began = item.nodeid, time.process_time()
        self._trace(self._test)
        signal.setitimer(signal.ITIMER_PROF, self._limits[self._test] if self._limits else 0)
        result = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._trace("")
        self.seconds[self._test] = time.process_time() - self._began
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = report.nodeid


def _pytest(files: Sequence[str], watch: _Watch, folder: Path) -> int:
    from hypothesis import Phase, settings

    # The project's own profile, made later, takes over whatever it does not set itself.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutation", derandomize=True, database=None, deadline=None, phases=phases)
    settings.load_profile("mutation")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-x", "-q", "--tb=no", f"--basetemp={folder}", "-p", "no:cacheprovider"]
    options += ["-p", "_hypothesis_pytestplugin", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, *files], plugins=[watch]))
