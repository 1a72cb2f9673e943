"""The proof on other processors: its steps, planted defects, and what it says. Nothing is emulated."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import blt_edge
import pytest
from blt_edge.export import demo
from blt_edge.export.golden import GOLDEN_NAME, read_golden
from blt_edge.runtime.host import describe_processor
from blt_edge.runtime.kernels import kernel_family
from blt_edge.tools.arm import check
from blt_edge.tools.arm import steps as arm_steps
from blt_edge.tools.arm.plants import PLANTS, plant
from blt_edge.tools.arm.steps import serve_one, steps_for
from blt_edge.tools.arm.suite import read_report, run_suite
from blt_edge.tools.matrix.environments import clean_variables
from blt_edge.tools.steps import Check, Step
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.chat import posix
from support.processors import become

SCRIPT = Path(check.__file__).with_name("check.sh")
linux = pytest.mark.skipif(sys.platform != "linux", reason="check.sh is for Linux")


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_arm_alone_and_is_taken_out(name: str, tmp_path: Path) -> None:
    file, text, other = PLANTS[name]
    source = Path(check.__file__).parents[2] / file
    copy = tmp_path / "blt_edge" / file
    copy.parent.mkdir(parents=True)
    copy.write_bytes(source.read_bytes())
    undo = plant(name, tmp_path)
    planted = copy.read_text()
    compile(planted, file, "exec")
    assert planted.count(other) == 1
    assert "aarch64" in other
    undo()
    assert copy.read_bytes() == source.read_bytes()
    copy.write_text(source.read_text().replace(text, ""))
    with pytest.raises(ValueError, match="0 times"):
        plant(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "machine", "family"),
    [
        ("cortex-a72", "aarch64", "aarch64 without dot product"),
        ("cortex-a76", "aarch64", "aarch64 with dot product"),
        ("armv9", "aarch64", "aarch64 with i8mm"),
        ("haswell", "x86_64", "x86-64 with AVX2"),
        ("nehalem", "x86_64", "x86-64 without AVX2"),
    ],
)
def test_processors_say_what_they_can_do(
    file: str, machine: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(monkeypatch, tmp_path, machine, None)
    monkeypatch.setattr("blt_edge.runtime.host._CPUINFO", SCRIPT.with_name("processors") / file)
    assert kernel_family() == family
    # Engines are found again by it.
    assert re.match(r"0x41 0x\w+ 0xd\w+$|GenuineIntel 6 \d+$", describe_processor()["processor"])


def test_every_processor_has_a_file_and_a_model() -> None:
    files = {path.name for path in SCRIPT.with_name("processors").iterdir()}
    (listed,) = re.findall(r"allowed are ([\w, -]+)\"", SCRIPT.read_text())
    assert {*listed.split(", ")} == {*files, "native"}
    assert {*check.X86} == {
        name for name in files if "flags" in SCRIPT.with_name("processors").joinpath(name).read_text()
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="wheels are pinned for Python 3.11 and newer")
def test_wheels_of_all_that_is_needed_are_pinned() -> None:
    """They are unpacked without asking what they need: as their metadata have it here."""
    lines = SCRIPT.with_name("requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line[0] != "#")
    waiting = [
        Requirement("blt-edge[cpu,export,serve]"),
        *map(Requirement, ("pytest", "pytest-xdist", "hypothesis")),
    ]
    seen: set[str] = set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name != "blt-edge":
            assert one.specifier.contains(pins.get(name, "")), f"{one}, pinned is {pins.get(name)}"
        # What another version needs says nothing.
        if str(one) in seen or importlib.metadata.version(name) != pins.get(name, blt_edge.__version__):
            continue
        seen.add(str(one))
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            asked = ({"extra": extra} for extra in one.extras or {""})
            if needed.marker is None or any(map(needed.marker.evaluate, asked)):
                waiting.append(needed)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the script, with an environment whose Python says what it is asked, and refuses it."""
    root = tmp_path / "it's a checkout"
    script = root / "tools" / "arm" / SCRIPT.name
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit\nshift 4\necho "$*"\nexit 2\n')
    python.chmod(0o755)
    return root


def run_script(checkout: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """From another folder than its own."""
    elsewhere = checkout.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return subprocess.run(
        ["/bin/bash", checkout / "tools" / "arm" / SCRIPT.name, *map(str, arguments)],
        cwd=elsewhere,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@linux
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processor", "z80"], "allowed are cortex-a76"),
        (["--processor"], "--processor needs a value"),
        (["--cache", "a:b"], "has a colon"),
    ],
)
def test_script_refuses_in_one_line(checkout: Path, arguments: list[str], says: str) -> None:
    done = run_script(checkout, "--processor", "native", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@linux
def test_options_are_checked_before_anything_is_fetched(checkout: Path) -> None:
    done = run_script(
        checkout, "--processor=native", "--cache", "my cache", "--qick", "--json", "my report", "--json=/r"
    )
    here = checkout.parent / "elsewhere"
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == f"--qick --json {here}/my report --json /r\n"
    assert sorted(path.name for path in (here / "my cache").iterdir()) == ["fetching.lock", "native.lock"]
    assert not (checkout / "my cache").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--qick"], "unrecognized arguments: --qick"),
        (["--json", "none/report.json"], "none; make it, or give another"),
        (["--plant", "softmax", "--processor", "haswell"], "a defect of Arm; haswell has none of it"),
    ],
)
def test_options_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert check.main(["--processor", "haswell", "--json", "report.json", "--quick"]) == 0


def test_a_plant_is_for_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert check.main(["--processor", "native", "--plant", "softmax"]) == 0
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert check.main(["--processor", "cortex-a76", "--plant", "softmax"]) == 0
    with pytest.raises(SystemExit):
        check.main(["--processor", "native", "--plant", "softmax"])


@linux
def test_one_run_at_a_time_for_each_processor(checkout: Path) -> None:
    import fcntl  # not on Windows

    cache = checkout / ".arm-cache"
    cache.mkdir()
    with (cache / "native.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_script(checkout, "--processor", "native", "--quick")
    assert done.returncode == 1
    assert done.stderr == (
        f"check.sh: native is being tried with {cache} by another run: wait for it, or give another --cache\n"
    )


@linux
def test_script_says_where_nothing_can_be_emulated(checkout: Path) -> None:
    tools = checkout / "bin"
    tools.mkdir()
    for name in ("dirname", "bash"):
        tools.joinpath(name).symlink_to(shutil.which(name) or name)
    tools.joinpath("uname").write_text("#!/bin/sh\n[ $1 = -m ] && echo riscv64 || echo Linux\n")
    tools.joinpath("uname").chmod(0o755)
    done = run_script(checkout, PATH=str(tools))
    assert done.returncode == 77
    assert done.stderr == (
        "check.sh: cortex-a76 can't be tried here: that takes x86-64; --processor native tries this machine\n"
    )


def test_bars_are_those_of_the_precision(tmp_path: Path) -> None:
    golden = read_golden(Path(demo.__path__[0], GOLDEN_NAME))
    subprocess.run(
        [sys.executable, "-m", "blt_edge", "export", "demo", "-o", tmp_path / "b", "--no-validate", "-q"],
        check=True,
    )
    quick, bars = (
        next(step for step in steps if step.arguments[0] == "compare").check
        for steps in (steps_for(golden, tmp_path, "int4"), steps_for(golden, tmp_path))
    )
    assert bars is not None
    assert quick is not None

    def document(bits: float, built: bool = True, kl: float = 0.0) -> str:
        total = {"mean_kl_bits": kl, "false_boundaries": 0.0, "missed_boundaries": 0.0}
        bundle = {"path": "b", "built": built, "engine": "portable", "total": total}
        return json.dumps({"bundles": [{**bundle, "against_first": {"more_bits_per_byte": bits}}]})

    assert bars(document(0.0)) is None
    assert "more bits per byte" in str(bars(document(0.5)))
    assert "nan" in str(bars(document(float("nan"))))
    for of_any_length in (bars, quick):
        assert "ran on portable" in str(of_any_length(document(0.0, built=False)))
        assert "mean KL" in str(of_any_length(document(0.0, kl=0.1)))
    assert quick(document(0.5)) is None  # of so few bytes


def test_full_steps_cover_what_quick_ones_do(tmp_path: Path) -> None:
    golden = read_golden(Path(demo.__path__[0], GOLDEN_NAME))
    quick, full = steps_for(golden, tmp_path, "int4"), steps_for(golden, tmp_path)
    assert {step.name for step in quick} - {"int4 beside fp32"} <= {step.name for step in full}
    verbs = {step.arguments[0] for step in full}
    assert verbs == {"validate", "generate", "build", "score", "compare", "quantize"}


def test_server_is_asked_and_ended(tmp_path: Path) -> None:
    program = (sys.executable, "-m", "blt_edge")
    subprocess.run([*program, "export", "demo", "-o", tmp_path / "b", "--no-validate", "-q"], check=True)
    done = serve_one(program, clean_variables(), tmp_path)
    assert done.ok, done.line
    (tmp_path / "b" / "manifest.json").write_text("{}")
    broken = serve_one(program, clean_variables(), tmp_path)
    assert not broken.ok
    assert "manifest.json" in broken.line


@posix
def test_a_server_that_says_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm_steps, "_SERVER_SECONDS", 0.2)
    done = serve_one((sys.executable, "-c", "import time; time.sleep(60)"), clean_variables(), tmp_path)
    assert not done.ok
    assert done.seconds < 30
    assert done.line == "no address on stdout but '': it said nothing"


def checks(verb: str) -> list[Check]:
    """What is demanded of a verb's output, in the order of the steps."""
    golden = read_golden(Path(demo.__path__[0], GOLDEN_NAME))
    found = [step.check for step in steps_for(golden, Path()) if step.arguments[0] == verb]
    return [one for one in found if one is not None]


def test_an_engine_has_to_be_fused_and_proven() -> None:
    built = checks("build")[0]
    assert built('{"proven": true, "not_fused": []}') is None
    assert (
        built('{"proven": true, "not_fused": ["attention: x", "products: y"]}') == "attention: x; products: y"
    )
    assert built('{"proven": false, "not_fused": []}') == "not proven"


def test_chunks_have_to_agree_with_all_before_them() -> None:
    first, second, third = checks("score")
    assert first('{"total": {"bits_per_byte": 2.0}}') is None
    assert second('{"total": {"bits_per_byte": 2.000009}}') is None
    assert (
        third('{"total": {"bits_per_byte": 1.999995}}') == "1.999995 bits per byte, in other chunks 2.000000"
    )


def test_a_failed_validation_is_named() -> None:
    rows = [{"check": "logits", "ok": False}, {"check": "boundaries", "ok": True}]
    validated = checks("validate")[0]
    assert validated(json.dumps({"validation": {"passed": False, "rows": rows}})) == "failed: logits"
    assert validated(json.dumps({"validation": {"passed": True, "rows": rows[1:]}})) is None


def test_suite_without_a_report_has_failed(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho No module named pytest >&2\nexit 1\n")
    program.chmod(0o755)
    suite = run_suite(program, clean_variables(), tmp_path)
    assert not suite.done.ok
    assert suite.done.line == "no report: No module named pytest"


def test_report_of_tests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/>'
        '<testcase classname="a" name="y"><failure message="no&#10;more"/></testcase>'
        '<testcase classname="a" name="z"><skipped message="needs torch"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert read_report(path) == (("a.y: no",), {"needs torch": 1}, 3)


def test_report_is_kept_after_each_step(tmp_path: Path) -> None:
    report = check.Report("native", "", None, "2026-11-30")
    target = check.Target(Path(sys.executable), tmp_path, report, tmp_path / "r.json")
    assert target.facts()["machine"]
    target.run(Step("version", ("--version",)))
    target.run(Step("nothing", ("nothing",)))
    steps = json.loads((tmp_path / "r.json").read_text())["steps"]
    assert [step["ok"] for step in steps] == [True, False]
    assert "nothing" in steps[1]["line"]


def test_output_of_compare_that_is_none_fails_its_step(tmp_path: Path) -> None:
    report = check.Report("native", "", None, "2026-11-30")
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no document\n")
    program.chmod(0o755)
    check.Target(program, tmp_path, report, None).run(Step("compare", ("compare",)))
    assert "unexpected output" in report.steps[0].line
    assert report.quality == {}
