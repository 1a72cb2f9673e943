"""The scripts for Jetsons, against one that is pretended: what they would do, do, and refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.machines import ORIN, ORIN_7, PC, THOR, build

SOURCE = Path(__file__).parents[2]
SCRIPTS = SOURCE / "tools" / "jetson"

pytestmark = pytest.mark.skipif(
    os.name != "posix" or shutil.which("bash") is None, reason="the scripts are for bash"
)

_STUB = """\
#!/bin/sh
echo "$0 $*" >> {log}
case "$*" in
    "-m venv --system-site-packages "*)
        mkdir -p "$4/bin"
        echo "include-system-site-packages = true" > "$4/pyvenv.cfg"
        cp "$0" "$4/bin/python"
        cp "$0" "$4/bin/blt-edge" ;;
    "-c import tensorrt") echo "ImportError: {said}" >&2; exit {tensorrt} ;;
esac
"""


@pytest.fixture
def script(tmp_path: Path):
    """`script("install.sh", files, ...)`: run one on a machine of these files."""

    def run(name: str, files: dict[str, str], *arguments: object, machine="aarch64", path=None):
        root = build(tmp_path / "root", files)
        root.mkdir(exist_ok=True)
        environment = {
            "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"],
            "HOME": str(tmp_path / "home"),
            "BLT_EDGE_ROOT": str(root),
            "BLT_EDGE_MACHINE": machine,
        }
        command = ["bash", str(SCRIPTS / name), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def stubs(tmp_path: Path):
    """A folder with a python3.10 that writes down what it is asked; and the file it writes to."""

    def make(tensorrt: int = 0, said: str = "no module") -> tuple[Path, Path]:
        log = tmp_path / "log"
        stub = _STUB.format(log=log, tensorrt=tensorrt, said=said)
        folder = build(tmp_path / "bin", {"python3.10": stub})
        (folder / "python3.10").chmod(0o755)
        return folder, log

    return make


@pytest.mark.parametrize("name", ["install.sh", "power.sh"])
def test_syntax_and_help(script, name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    assert os.access(SCRIPTS / name, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPTS / name)], check=True)
    assert script(name, {}, "--help").stdout.startswith(f"Usage: {name}")


@pytest.mark.parametrize(
    ("files", "python", "cuda", "system"),
    [
        (ORIN, "python3.10", ">=12.6,<13", "R36.4.3"),
        (ORIN_7, "python3.12", ">=13.0,<14", "R39.2.0"),
        (THOR, "python3.12", ">=13.0,<14", "R38.4.0"),
    ],
    ids=["Orin, JetPack 6", "Orin, JetPack 7", "Thor"],
)
def test_a_dry_run_does_nothing(script, tmp_path: Path, files, python: str, cuda: str, system: str) -> None:
    done = script("install.sh", files, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    venv = tmp_path / "home" / "blt-edge-venv"
    assert done.stdout.splitlines()[0].startswith("board     NVIDIA Jetson")
    assert done.stdout.splitlines()[1:] == [
        f"system    Jetson Linux {system}, {python}",
        f"+ {python} -m venv --system-site-packages {venv}",
        f"+ {venv}/bin/python -m pip install --upgrade {SOURCE}[cpu,export] cuda-bindings{cuda}",
        f"+ {venv}/bin/blt-edge doctor",
        f"next: source {venv}/bin/activate",
    ]
    assert not venv.exists()


def test_it_may_run_twice(script, stubs, tmp_path: Path) -> None:
    folder, log = stubs()
    first = script("install.sh", ORIN, path=folder)
    assert (first.returncode, first.stderr) == (0, "")
    asked = log.read_text().splitlines()
    assert [line.split(maxsplit=1)[1].split()[0] for line in asked] == ["-m", "-m", "-c", "doctor"]
    second = script("install.sh", ORIN, path=folder)
    assert second.returncode == 0
    assert "blt-edge-venv, which is there already" in second.stdout
    assert log.read_text().count("-m venv") == 1


def test_without_tensorrt_it_says_what_to_install(script, stubs) -> None:
    folder, _ = stubs(tensorrt=1)
    done = script("install.sh", ORIN, path=folder)
    assert done.returncode == 0
    assert "sudo apt-get install python3-libnvinfer" in done.stdout


def test_without_the_compiler_for_dlas_it_says_what_to_install(script, stubs) -> None:
    folder, _ = stubs(1, "libnvdla_compiler.so: cannot open shared object file")
    done = script("install.sh", ORIN, path=folder)
    assert "sudo apt-get install nvidia-l4t-dla-compiler" in done.stdout
    assert "python3-libnvinfer" not in done.stdout


def test_wheels(script, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    done = script("install.sh", ORIN, "--dry-run", "--wheels", wheels, "--offline")
    assert f"--find-links {wheels} --no-index {SOURCE}[cpu,export]" in done.stdout
    (wheels / "blt_edge-0.1.0-py3-none-any.whl").touch()
    done = script("install.sh", ORIN, "--dry-run", "--wheels", wheels)
    assert f"--find-links {wheels} blt-edge[cpu,export]" in done.stdout


def test_a_venv_that_does_not_see_tensorrt(script, tmp_path: Path) -> None:
    files = {"pyvenv.cfg": "include-system-site-packages = false\n", "bin/python": ""}
    venv = build(tmp_path / "venv", files)
    (venv / "bin" / "python").chmod(0o755)
    done = script("install.sh", ORIN, "--dry-run", "--venv", venv)
    assert done.returncode == 1
    assert "was made without --system-site-packages" in done.stderr


@pytest.mark.parametrize(
    ("files", "arguments", "code", "line"),
    [
        (PC, (), 1, "this is no Jetson: there is no /etc/nv_tegra_release"),
        ({"etc/nv_tegra_release": "nonsense"}, (), 1, "is not understood; it begins with: nonsense"),
        ({"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID"}, (), 1, "R35.4.1 is not known"),
        (ORIN, ("--fast",), 2, "there is no option --fast; see --help"),
        (ORIN, ("--venv",), 2, "--venv needs a directory"),
        (ORIN, ("--wheels", "/gone"), 2, "/gone is not a directory"),
        (ORIN, ("--source", "/"), 2, "/ is no checkout of blt-edge"),
        (ORIN, ("--offline",), 2, "--offline needs --wheels"),
    ],
)
def test_refusals(script, files, arguments: tuple[str, ...], code: int, line: str) -> None:
    done = script("install.sh", files, "--dry-run", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("install.sh: error: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_processors(script) -> None:
    done = script("install.sh", ORIN, machine="x86_64")
    assert done.returncode == 1
    assert "this is x86_64; Jetsons are aarch64" in done.stderr


def test_power_shows_and_changes_nothing(script) -> None:
    done = script("power.sh", ORIN)
    assert (done.returncode, done.stderr) == (0, "")
    *modes, gpu, cpu = done.stdout.splitlines()
    assert [line.split() for line in modes[1:]] == [["0", "15W"], ["1", "25W"], ["2", "MAXN_SUPER"]]
    assert (gpu, cpu) == ("GPU  306 to 918 MHz", "CPU  729 to 1344 MHz")


def test_full_power(script) -> None:
    done = script("power.sh", ORIN, "--full", "--dry-run")
    assert done.stdout.splitlines()[-2:] == ["+ sudo nvpmodel -m 2", "+ sudo jetson_clocks"]
    done = script("power.sh", {"etc/nv_tegra_release": "x", "etc/nvpmodel.conf": ""}, "--full", "--dry-run")
    assert "+ sudo nvpmodel -m 0" in done.stdout


def test_power_elsewhere(script) -> None:
    assert script("power.sh", PC).returncode == 1
    assert script("power.sh", ORIN, "--faster").returncode == 2
