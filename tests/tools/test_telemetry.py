"""ONNX Runtime's telemetry is off in every way in: an empty home directory stays empty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.chat import MAIN

LOAD = "import sys; from blt_edge.runtime import BltModel; BltModel.load(sys.argv[1], threads=1)"
CHILD = (
    "from blt_edge.tools.doctor.software import ask; reply = ask('provider', 'CPUExecutionProvider')\n"
    "assert reply.facts['right'], reply"
)


@pytest.mark.parametrize(
    "arguments",
    [
        (MAIN, "generate", "-m", "BUNDLE", "-p", "a", "-n", "2"),
        (MAIN, "export", "CHECKPOINT", "-o", "OUTPUT"),
        (LOAD, "BUNDLE"),
        (CHILD,),
    ],
    ids=["generate", "export", "library", "child"],
)
def test_an_empty_home_stays_empty(tiny_model, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    places = {
        "BUNDLE": str(tiny_model.bundle),
        "CHECKPOINT": str(tiny_model.checkpoint),
        "OUTPUT": str(tmp_path / "bundle"),
    }
    hidden = ("ORT_DISABLE_TELEMETRY", "HF_HOME", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    code, *rest = (places.get(one, one) for one in arguments)
    done = subprocess.run(
        [sys.executable, "-c", code, *rest], env={**kept, "HOME": str(home)}, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert not list(home.rglob("*"))


@pytest.mark.parametrize(("value", "told"), [(None, "off"), ("0", "on"), ("true", "off")])
def test_the_user_has_the_last_word(value: str | None, told: str) -> None:
    code = (
        "import os, blt_edge.runtime; from blt_edge.tools.doctor.software import telemetry\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], telemetry())"
    )
    env = {name: text for name, text in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env.update({} if value is None else {"ORT_DISABLE_TELEMETRY": value})
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True)
    shown = value or "1"
    assert done.stdout.decode() == f"{shown} {told} (ORT_DISABLE_TELEMETRY={shown})\n"
