"""The tests of the runtime that need no torch, run by the processor that is tried."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from ..steps import Done

_SECONDS = 4 * 3600


@dataclass(frozen=True)
class Suite:
    """What came of each test."""

    done: Done
    """As a step; its line has the counts."""
    failed: tuple[str, ...]
    """Tests that failed, and how: "module.test: first line"."""
    skipped: Mapping[str, int]
    """How many tests or modules were not run, by reason."""


def run_suite(program: Path, variables: Mapping[str, str], tests: Path) -> Suite:
    """Run the tests below a folder of this source tree with another Python; two processes at a time."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="blt-edge-suite-") as folder:
        report = Path(folder, "report.xml")
        options = [
            "-q",
            "-n",
            "2",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            f"--basetemp={folder}/tmp",
        ]
        ended = subprocess.run(
            [program, "-m", "pytest", *options, tests],
            env={**variables, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
        if not report.is_file():
            last = (f"{ended.stdout}\n{ended.stderr}".strip().splitlines() or ["it said nothing"])[-1]
            return Suite(_done(started, ended.returncode, f"no report: {last}", 0), (), {})
        failed, skipped, count = read_report(report)
    left_out = sum(skipped.values())
    line = f"{count - len(failed) - left_out} passed, {len(failed)} failed, {left_out} skipped"
    return Suite(_done(started, ended.returncode, line, count), failed, skipped)


def read_report(path: Path) -> tuple[tuple[str, ...], dict[str, int], int]:
    """Of pytest's JUnit file: tests that failed, how many were skipped for which reason, tests in all."""
    failed: list[str] = []
    skipped: Counter[str] = Counter()
    cases = list(ElementTree.parse(path).iter("testcase"))
    for case in cases:
        for child in case:
            message = (child.get("message") or "").strip()
            first = message.splitlines()[0] if message else ""
            if child.tag in ("failure", "error"):
                failed.append(f"{case.get('classname')}.{case.get('name')}: {first[:200]}")
            elif child.tag == "skipped":
                skipped[first] += 1
    return tuple(failed), dict(skipped), len(cases)


def _done(started: float, code: int, line: str, lines: int) -> Done:
    took = round(time.monotonic() - started, 1)
    return Done("tests of the runtime", code, took, line, lines, traceback=False, ok=code == 0)
