"""The service for systemd: its file is right by systemd's own check, and its command is one of ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from blt_edge.tools.cli.serve import command as serve

UNIT = Path(__file__).parents[2] / "tools" / "raspberry_pi" / "blt-edge.service"
SECTIONS = ("Unit", "Service", "Install")
EXPOSURE = 20
"""Tenths of systemd's score of 0 (safe) to 10; what is left is mostly that it speaks to a network."""


def settings(text: str) -> list[tuple[str, str, str]]:
    """(section, name, value) of every line that is no comment."""
    found, section = [], ""
    for line in text.splitlines():
        if re.fullmatch(r"\[\w+\]", line):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            assert equals, line
            assert re.fullmatch(r"[A-Z]\w+", name), line
            found.append((section, name, value))
    return found


def values(name: str) -> list[str]:
    return [value for _, key, value in settings(UNIT.read_text()) if key == name]


def test_it_reads_as_a_unit() -> None:
    found = settings(UNIT.read_text())
    assert {section for section, _, _ in found} == {*SECTIONS}
    names = [name for _, name, _ in found]
    assert {name for name in names if names.count(name) > 1} == {"SystemCallFilter"}
    assert max(map(len, UNIT.read_text().splitlines())) < 160


def test_its_command_is_one_of_ours_with_the_defaults_of_its_environment() -> None:
    """Each variable of the command has a default, and the values are ones that `serve` takes."""
    environment = dict(pair.split("=", 1) for line in values("Environment") for pair in line.split())
    (start,) = values("ExecStart")
    program, verb, *words = (re.sub(r"\$\{(\w+)\}", lambda name: environment[name[1]], start)).split()
    assert (program, verb) == ("/opt/blt-edge/venv/bin/blt-edge", "serve")
    assert all(f"${{{name}}}" in start for name in environment)
    bundle = words.index("-m")
    del words[bundle : bundle + 2]
    context = serve.make_context("serve", ["-m", "demo", *words], resilient_parsing=False)
    assert isinstance(context, click.Context)
    assert context.params["host"] == environment["BLT_EDGE_HOST"] == "127.0.0.1"
    assert context.params["port"] == int(environment["BLT_EDGE_PORT"])


def test_who_it_runs_as() -> None:
    """Nobody, with nothing to write to; and it comes back, but not for ever."""
    assert values("DynamicUser") == values("NoNewPrivileges") == values("ProtectHome") == ["yes"]
    assert (values("CapabilityBoundingSet"), values("ProtectSystem")) == ([""], ["strict"])
    assert (values("Restart"), values("RestartPreventExitStatus")) == (["on-failure"], ["2"])
    assert values("StartLimitBurst") == ["5"]
    # The processor, its load and its memory are read there.
    assert values("ProcSubset") == []


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The file with programs and folders of this machine in the place of a board's."""
    unit = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/opt/blt-edge/venv/bin/blt-edge", sys.executable)
    unit.write_text(text.replace("/srv/blt-edge", str(tmp_path)))
    return unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_it(here: Path) -> None:
    verify = ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(here)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False, timeout=60)
    if "Failed to" in done.stderr and UNIT.name not in done.stderr:
        pytest.skip(f"systemd can't be asked here: {done.stderr.strip()}")
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, said) == (0, [])
    judge = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(here)]
    judged = subprocess.run(judge, capture_output=True, text=True, check=False, timeout=60)
    if "unrecognized option" not in judged.stderr:
        assert judged.returncode == 0, judged.stdout.splitlines()[-1]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_notices_what_is_wrong(here: Path) -> None:
    """So that the test above is one."""
    here.write_text(here.read_text().replace("RestartSec=", "RestartSecs="))
    verify = ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(here)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False, timeout=60)
    assert "RestartSecs" in done.stderr or "Failed to" in done.stderr
