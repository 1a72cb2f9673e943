"""The proof on another processor: bundles made here are built, read and served there, and held to their bars.

    tools/arm/check.sh --processor cortex-a76 --json arm.json

`check.sh` makes the program that is that processor's Python and calls this. Bundles of the demo, of every
precision, are made on this machine; there they are loaded, built, compared with transformers' values (the
golden file) and with each other, read in chunks, served, and quantized anew. The JSON holds every step, and
the figures of quality of both machines side by side; it is written after each step. Speed under emulation
means nothing and is not measured. Exit code 0 = every step did what it must; 1 = otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...export import demo
from ...export.golden import GOLDEN_NAME, Golden, read_golden
from ...runtime.files import write_whole
from ..matrix.environments import clean_variables
from ..steps import Done, Step, run_step
from .plants import PLANTS, plant
from .steps import PRECISIONS, compare_all, serve_one, steps_for
from .suite import run_suite

_FORMAT = "blt-edge processors 1"
_TEXTS = Path("tests", "data")
X86 = ("haswell", "nehalem")
_STEP_SECONDS = 3600
"""An emulated step may take fifty times as long; one that takes longer hangs."""
_FACTS = """
import json
from blt_edge.runtime.host import describe_machine, describe_processor
from blt_edge.runtime.kernels import kernel_family
print(json.dumps({**describe_machine(), **describe_processor(), "kernels": kernel_family()}))
"""


@dataclass
class Report:
    """What one run found, as the JSON has it."""

    processor: str
    emulator: str
    """Its version and processor model; "" = none."""
    plant: str | None
    """The defect that was planted."""
    day: str
    passed: bool = False
    machine: Mapping[str, Any] = field(default_factory=dict)
    """The processor's own description of itself."""
    host: Mapping[str, Any] = field(default_factory=dict)
    """Of the machine that made the bundles."""
    steps: list[Done] = field(default_factory=list)
    quality: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """here, there -> bundle -> figure; of built engines beside float32 of the same machine."""
    failed_tests: Sequence[str] = ()
    skipped_tests: Mapping[str, int] = field(default_factory=dict)
    """Of the runtime's tests: how many were not run there, by reason."""
    equal_files: dict[str, bool] = field(default_factory=dict)
    """Whether what was quantized there has the same weights, to the bit, as what was quantized here."""

    def write(self, path: Path | None) -> None:
        if path is not None:
            text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"
            write_whole(path, lambda partial: partial.write_text(text))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.program is None:
        return 0
    report = Report(options.processor, options.emulator, options.plant, time.strftime("%Y-%m-%d"))
    # x86 without VNNI has int8 products of its own, Arm has 4-bit ones.
    quick = ("int8" if options.processor in X86 else "int4") if options.quick else None
    with tempfile.TemporaryDirectory(prefix="blt-edge-arm-") as name:
        here, there = Path(name, "here"), Path(name, "there")
        golden = _prepare(here, there, (quick,) if quick else tuple(PRECISIONS))
        target = Target(options.program, there, report, options.json)
        report.machine, report.host = target.facts(), _facts(Path(sys.executable), here)
        undo = plant(options.plant, options.package) if options.plant else None
        try:
            for step in steps_for(golden, here, quick):
                target.run(step)
            target.keep(serve_one((target.program, "-m", "blt_edge"), clean_variables(), there))
            if options.tests:
                suite = run_suite(target.program, clean_variables(), Path("tests", "runtime").absolute())
                report.failed_tests, report.skipped_tests = suite.failed, suite.skipped
                target.keep(suite.done)
        finally:
            if undo is not None:
                undo()
        if quick is None:
            report.quality["here"] = _quality(_compare_here(here))
            report.equal_files = _equal_files(here, there)
    report.passed = all(done.ok for done in report.steps)
    report.write(options.json)
    _tell(report)
    return 0 if report.passed else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and checked; of wrong ones argparse tells, and ends the process. No program = nothing is tried."""
    parser = argparse.ArgumentParser(
        prog="tools/arm/check.sh",
        description=(__doc__ or "").split("\n")[0],
        epilog="--cache FOLDER: where check.sh keeps what it fetches.",
        allow_abbrev=False,
    )
    # From check.sh, which makes them.
    parser.add_argument("--program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--package", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--emulator", default="", help=argparse.SUPPRESS)
    parser.add_argument("--processor", default="native", help="which is tried; check.sh has a list")
    parser.add_argument("--quick", action="store_true", help="a slice of some minutes")
    parser.add_argument("--tests", action="store_true", help="also the runtime's tests that need no torch")
    parser.add_argument("--json", type=Path, help="write the report here, after each step")
    parser.add_argument(
        "--plant", choices=PLANTS, help="put in a defect of Arm first, which a step must find: exit code 1"
    )
    options = parser.parse_args(arguments)
    on_arm = (
        platform.machine() == "aarch64" if options.processor == "native" else options.processor not in X86
    )
    if options.plant and not on_arm:
        parser.error(f"--plant {options.plant}: a defect of Arm; {options.processor} has none of it")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.absolute().parent}; make it, or give another")
    return options


class Target:
    """The processor that is tried: a program, and the folder in which commands are typed."""

    def __init__(self, program: Path, folder: Path, report: Report, path: Path | None) -> None:
        self.program, self._folder, self._report, self._path = program.absolute(), folder, report, path

    def facts(self) -> dict[str, Any]:
        """How it describes itself. Raises SystemExit when it does not even start."""
        return _facts(self.program, self._folder)

    def run(self, step: Step) -> None:
        """Type the step's command there, and keep what came of it."""

        def check(text: str) -> str | None:
            if step.arguments[0] == "compare":
                self._report.quality["there"] = _quality(json.loads(text))
            return step.check(text) if step.check else None

        command = (self.program, "-m", "blt_edge")
        kept = Step(step.name, step.arguments, check)
        done = run_step(kept, command, clean_variables(), self._folder, seconds=_STEP_SECONDS)
        self.keep(done)

    def keep(self, done: Done) -> None:
        """Add it to the report, and say it."""
        self._report.steps.append(done)
        self._report.write(self._path)
        told = "ok" if done.ok else f"FAILED: {done.line}"
        print(f"{done.seconds:7.1f} s  {done.name}: {told}", flush=True)


# What is made here.


def _prepare(here: Path, there: Path, precisions: Sequence[str]) -> Golden:
    """Bundles and texts, in both folders alike; the golden file."""
    here.mkdir()
    checkpoint = Path(demo.__path__[0])
    golden = read_golden(checkpoint / GOLDEN_NAME)
    scripts = (_TEXTS / "udhr_sample.txt").read_bytes()
    texts = {
        "prompt.bin": golden.prompt,
        "alice.bin": (_TEXTS / "alice.txt").read_bytes()[:3000],
        # From where the sample goes over to other scripts than Latin.
        "scripts.bin": scripts[len(scripts) // 2 :][:2000].decode(errors="ignore").encode(),
        GOLDEN_NAME: (checkpoint / GOLDEN_NAME).read_bytes(),
    }
    for name, data in texts.items():
        here.joinpath(name).write_bytes(data)
    _type_here(here, "export", "demo", "-o", "b", "--no-validate")
    for precision in precisions:
        mix = PRECISIONS[precision]
        _type_here(here, "quantize", "b", "-o", f"b-{precision}", "--precision", mix, "--no-validate")
    subprocess.run(["cp", "-r", here, there], check=True)
    return golden


def _compare_here(here: Path) -> dict[str, Any]:
    for name in ("b", *(f"b-{precision}" for precision in PRECISIONS)):
        _type_here(here, "build", name)
    output = _type_here(here, *compare_all())
    document: dict[str, Any] = json.loads(output)
    return document


def _type_here(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "blt_edge", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"blt-edge {' '.join(arguments)} failed on this machine: {done.stderr.strip()}")
    return done.stdout


def _facts(program: Path, folder: Path) -> dict[str, Any]:
    command = (program, "-c", _FACTS)
    done = subprocess.run(
        command, env=clean_variables(), cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SystemExit(f"{program}: exit code {done.returncode}: {last}")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


# Figures.


def _quality(document: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of `compare`'s JSON: for each bundle, bits per byte of each text, and what else counts."""
    return {
        bundle["path"]: {
            **{
                f"bits per byte, {Path(name).stem}": one["bits_per_byte"]
                for name, one in bundle["texts"].items()
            },
            "mean KL, bits per byte": bundle["total"]["mean_kl_bits"],
            "false boundaries": bundle["total"]["false_boundaries"],
            "missed boundaries": bundle["total"]["missed_boundaries"],
            "same most likely byte": bundle["total"]["argmax_agreement"],
        }
        for bundle in document["bundles"]
    }


def _equal_files(here: Path, there: Path) -> dict[str, bool]:
    return {
        file.name: file.read_bytes() == (there / "own-int4" / file.name).read_bytes()
        for file in sorted((here / "b-int4").iterdir())
        if file.is_file() and file.name != "manifest.json" and (there / "own-int4" / file.name).is_file()
    }


def _tell(report: Report) -> None:
    for name in report.failed_tests:
        print(f"failed: {name}")
    for reason, count in report.skipped_tests.items():
        print(f"{count} tests or modules of tests were not run: {reason}")
    for bundle, figures in report.quality.get("there", {}).items():
        own = report.quality.get("here", {}).get(bundle, {})
        for name, value in figures.items():
            beside = f"   here {own[name]:.4f}" if name in own else ""
            print(f"{bundle:8}  {name:32} {value:.4f}{beside}")
    failed = [done.name for done in report.steps if not done.ok]
    verdict = (
        f"{len(failed)} of {len(report.steps)} steps FAILED: {', '.join(failed)}" if failed else "passed"
    )
    print(f"{report.processor} ({report.emulator or 'this machine'}): {verdict}")


if __name__ == "__main__":
    sys.exit(main())
