"""The tests of the runtime that need no torch, run by the processor that is tried."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from ..steps import Done, Step, run_step

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
    with tempfile.TemporaryDirectory(prefix="blt-edge-suite-") as folder:
        report = Path(folder, "report.xml")
        options = (
            "-q",
            "-n",
            "2",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            f"--basetemp={folder}/tmp",
            str(tests),
        )
        done = run_step(
            Step("tests of the runtime", options),
            (program, "-m", "pytest"),
            {**variables, "OMP_NUM_THREADS": "1"},
            Path.cwd(),
            seconds=_SECONDS,
        )
        if not report.is_file():
            line = f"no report: {done.line or 'it said nothing'}"
            return Suite(replace(done, line=line, ok=False), (), {})
        failed, skipped, count = read_report(report)
    left_out = sum(skipped.values())
    line = f"{count - len(failed) - left_out} passed, {len(failed)} failed, {left_out} skipped"
    # A test that fails is shown with its traceback, which is none of ours.
    return Suite(replace(done, line=line, traceback=False, ok=done.exit_code == 0), failed, skipped)


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
