"""The container image: what the Dockerfile says is true of the package; its check gives up in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import blt_edge
import pytest
from blt_edge.tools.server.settings import ServerSettings
from support.chat import posix
from support.chat import start as start_program

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tools" / "image" / "check.sh"
PAGE = (ROOT / "docs" / "serve.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()

ENGINES_PATIENCE = 10
"""Seconds that Docker and Podman give a container before they kill it."""


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, with lines joined that belong together."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(name, rest.strip()) for name, rest in re.findall(r"^([A-Z]+) +(.*)$", text, re.M)]


def last(name: str) -> str:
    """What the instruction says in the last stage."""
    stage = instructions()[max(n for n, (first, _) in enumerate(instructions()) if first == "FROM") :]
    return [rest for first, rest in stage if first == name][-1]


def health_check() -> tuple[dict[str, float], list[str]]:
    """Its options in seconds, and its command."""
    options, _, command = last("HEALTHCHECK").partition(" CMD ")
    return (
        {name: float(value) for name, value in re.findall(r"--([\w-]+)=(\d+)", options)},
        json.loads(command),
    )


def test_it_installs_extras_that_there_are() -> None:
    asked = re.search(r"\.whl\)\[([\w,-]+)\]", (ROOT / "Dockerfile").read_text())[1].split(",")
    assert asked == ["cpu", "serve"]
    assert {*asked} <= {*re.findall(r"^([\w-]+) = \[", PROJECT, re.M)}
    assert f"[{','.join(asked)}]" in CHECK.read_text()


def test_an_index_that_is_not_given_is_left_to_pip() -> None:
    """A default would go before the settings of pip's that a build mounts."""
    assert ("ARG", "PIP_INDEX_URL") in instructions()
    assert "--build-arg PIP_INDEX_URL=" in PAGE


def test_its_version_is_the_packages() -> None:
    assert f'org.opencontainers.image.version="{blt_edge.__version__}"' in last("LABEL")
    assert f'licenses="{re.search(r"^license = .(.*).$", PROJECT, re.M)[1]}"' in last("LABEL")


def test_it_runs_as_nobody_in_particular() -> None:
    user, group = map(int, last("USER").split(":"))  # by number: Kubernetes can't tell who a name is
    assert user == group >= 1000
    assert f"os.getuid() == os.getgid() == {user}" in CHECK.read_text()
    assert f"{user}" in PAGE


def test_build_and_run_stand_on_the_same_base() -> None:
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert bases == ["${BASE}", "${BASE}"]


def test_the_port_is_the_servers() -> None:
    port = ServerSettings("").port
    assert int(last("EXPOSE")) == port
    assert re.search(r"'127\.0\.0\.1', (\d+)", last("HEALTHCHECK"))[1] == str(port)
    assert "--port" not in last("CMD")


def test_the_context_is_what_the_wheel_is_made_of() -> None:
    first, *rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    assert first == "*", "what is not named stays out: .git, environments, bundles"
    folders = re.findall(r'^"[\w.]+" = "(\w+)[\w/]*"$', PROJECT, re.M)
    files = re.findall(r'^readme = "(.*)"|^license-files = \["(.*)"\]', PROJECT, re.M)
    needed = {*folders, *map("".join, files), "pyproject.toml", "constraints.txt"}
    assert {rule[1:] for rule in rules if rule[0] == "!"} == needed
    assert {rule for rule in rules if rule[0] != "!"} == {"**/__pycache__", "**/*.egg-info"}
    assert all((ROOT / name).exists() for name in needed)


@pytest.fixture
def server(tiny_model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Popen[str]]:
    """What a container starts, over a tiny bundle on a free port; it is killed when the test ends."""
    pytest.importorskip("starlette", reason="needs starlette: pip install 'blt-edge[serve]'")
    monkeypatch.delenv("BLT_EDGE_API_KEY", raising=False)
    assert json.loads(last("ENTRYPOINT")) == ["blt-edge"]
    assert re.search(r"^blt-edge = ", PROJECT.partition("[project.scripts]\n")[2], re.M)
    asked = [str(tiny_model.bundle) if word == "/bundle" else word for word in json.loads(last("CMD"))]
    assert str(tiny_model.bundle) in asked
    process = start_program(*asked, "--port", "0", text=True)
    yield process
    process.kill()
    process.communicate()


@posix
def test_what_it_starts_is_healthy_until_it_is_told_to_end(server: Popen[str]) -> None:
    address, port = server.stdout.readline().strip().rsplit(":", 1)
    assert address == "http://0.0.0.0"
    assert healthy(port)
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=60)
    assert server.returncode == 0
    assert not healthy(port), "nobody listens"


@posix
def test_a_server_that_stops_or_hangs_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        for answer in (
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
            b"",
            b"nonsense\r\n",
        ):
            with start_check(port) as process:
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(65536).startswith(b"GET /healthz ")
                    connection.sendall(answer)
                assert process.wait(timeout=30) != 0, answer
        assert not healthy(port), "nobody answers"


def start_check(port: str) -> Popen[bytes]:
    command = [word.replace(last("EXPOSE"), port) for word in health_check()[1]]
    assert command[0] == "python3"
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    return Popen([sys.executable, *command[1:]], env={**os.environ, **proxies}, stderr=subprocess.DEVNULL)


def healthy(port: str) -> bool:
    with start_check(port) as process:
        return process.wait(timeout=30) == 0


def test_limits_in_time_go_together() -> None:
    patience, command = health_check()
    waits = float(re.search(r"HTTPConnection\('127\.0\.0\.1', \d+, (\d+)\)", command[-1])[1])
    assert waits < patience["timeout"] < patience["interval"]
    words = json.loads(last("CMD"))
    # And three seconds for the last bytes.
    assert float(words[words.index("--grace") + 1]) + 3 < ENGINES_PATIENCE


def test_documented_commands_are_of_this_image() -> None:
    section = PAGE.partition("## In a container\n")[2].partition("\n## ")[0]
    ports = re.findall(r"(?:127\.0\.0\.1:)?\d+:(\d+)\b", section)
    mounts = re.findall(r"demo-bundle:(/\S+?):ro", section)
    assert ports
    assert {*ports} == {last("EXPOSE")}
    assert mounts
    assert {*mounts} == {"/bundle"}


# The check.


def check(tmp_path: Path, *arguments: object, stubs: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run it with nothing on the path but what it always needs, and stubs."""
    for name in ("bash", "dirname", "realpath", "sed", "uname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name, script in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return subprocess.run(
        [tmp_path / "bash", CHECK, *map(str, arguments)],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@posix
@pytest.mark.parametrize(
    ("stubs", "reason"),
    [
        ({"id": "echo 1000"}, "needs root"),
        ({"id": "echo 0", "runc": ""}, "needs podman mmdebstrap, and this is no Debian to install them on"),
        (
            {"id": "echo 0", "runc": "", "mmdebstrap": "", "apt-get": "exit 100"},
            "podman can't be installed here",
        ),
    ],
)
def test_check_gives_up_in_one_line(tiny_model, tmp_path: Path, stubs: dict[str, str], reason: str) -> None:
    done = check(tmp_path, tiny_model.bundle, stubs=stubs)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"image: not built: {reason}\n", "")


@posix
def test_check_wants_a_bundle(tmp_path: Path) -> None:
    done = check(tmp_path, tmp_path / "none", stubs={"id": "echo 0"})
    assert done.returncode == 2
    assert done.stderr == f"check.sh: {tmp_path / 'none'} is no bundle; run make demo, or give one\n"
