"""What a cell runs in: an interpreter, and an environment with the wheel and chosen versions.

uv makes each environment anew, in seconds, from packages that it keeps. It resolves as for a user who asks
for those versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from .plan import Cell, Kind, MatrixError

_PATIENCE = 1800
"""Seconds that installing or building may take."""

_VERSION = "import platform; print(platform.python_version())"


class InstallError(MatrixError):
    """A combination that can't be installed."""


# 1. Interpreters.


@dataclass(frozen=True)
class Interpreter:
    """A CPython of this machine."""

    path: Path
    version: str
    """Such as 3.11.7."""


def find(named: Sequence[Path] = ()) -> dict[str, Interpreter]:
    """Interpreters by minor release, oldest first: those on PATH, of pyenv and of uv.

    named: paths that the user gave; they go before others of their minor release, and one that can't be used
    raises MatrixError.
    """
    found: dict[str, Interpreter] = {}
    for path in named:
        try:
            version = _run([str(path.absolute()), "-I", "-c", _VERSION], os.environ, timeout=60)
        except InstallError as error:
            raise MatrixError(f"--python {path}: {error}; give the path of a Python") from None
        found.setdefault(minor_of(version), Interpreter(path.absolute(), version.strip()))
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders = os.pathsep.join([os.environ.get("PATH", ""), *map(str, pyenv.glob("versions/*/bin"))])
    listed = _uv("python", "list", "--only-installed", "--output-format", "json", PATH=folders)
    for entry in json.loads(listed):
        # Packages are compiled for CPython with a global lock.
        if entry["implementation"] == "cpython" and entry["variant"] == "default":
            interpreter = Interpreter(Path(entry["path"]), entry["version"])
            found.setdefault(minor_of(interpreter.version), interpreter)
    return dict(sorted(found.items(), key=lambda item: Version(item[0])))


def minor_of(version: str) -> str:
    """Such as 3.11 for 3.11.7."""
    return ".".join(version.split(".")[:2])


# 2. The wheel.


@dataclass(frozen=True)
class Wheel:
    """The project as it is installed."""

    path: Path
    version: str
    metadata: str
    """METADATA, with what the project claims."""
    digest: str
    """Of the code and data in it, 12 hexadecimal digits; metadata and times don't count."""


def build_wheel(checkout: Path, folder: Path) -> Wheel:
    """Build the project's wheel into `folder`. Raises InstallError."""
    # From a copy: setuptools leaves a build folder, and takes what an earlier one left into the next wheel.
    git = ["git", "-C", str(checkout), "ls-files", "-co", "--exclude-standard", "-z"]
    with tempfile.TemporaryDirectory() as copy:
        for name in filter(None, _run(git, os.environ).split("\0")):
            source, target = checkout / name, Path(copy, name)
            if source.is_file() and not source.is_symlink():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        shutil.rmtree(folder, ignore_errors=True)
        _uv("build", "--wheel", "--out-dir", str(folder), copy)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (described,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(described).decode()
        code = sorted((item.filename, item.CRC) for item in archive.infolist())
    digest = hashlib.sha256(repr([item for item in code if ".dist-info/" not in item[0]]).encode())
    return Wheel(path, path.name.split("-")[1], metadata, digest.hexdigest()[:12])


# 3. Environments.


@dataclass(frozen=True)
class Prepared:
    """An environment made ready for a cell."""

    programs: Path
    """The folder with blt-edge in it."""
    variables: Mapping[str, str]
    """The whole process environment."""
    golden: Path
    """The installed wheel's own golden file."""
    versions: Mapping[str, str]
    """Every package in it, sorted by name."""


def prepare(cell: Cell, interpreter: Interpreter, wheel: Wheel, folder: Path) -> Prepared:
    """Make the cell's environment in a new `folder`. Raises InstallError with what uv had to say."""

    def install(*packages: str) -> None:
        _uv("pip", "install", "--python", str(folder), "--only-binary", ":all:", *packages)

    _uv("venv", "--python", str(interpreter.path), str(folder))
    pins = [f"{name}=={version}" for name, version in cell.pins]
    wanted = f"{wheel.path}[{','.join(cell.extras)}]"
    if cell.kind is Kind.BELOW:
        # No installer would rightly take it: it is put there by force, as one is that came with a device.
        install(wanted)
        install("--no-deps", *pins)
    else:
        install(wanted, *pins)
    listed = json.loads(_uv("pip", "list", "--python", str(folder), "--format", "json"))
    versions = {item["name"]: item["version"] for item in sorted(listed, key=lambda item: item["name"])}
    (golden,) = folder.glob("lib/python*/site-packages/blt_edge/export/demo/golden.safetensors")
    return Prepared(folder / "bin", clean_variables(), golden, versions)


def clean_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """This process's variables less those that would let other packages or settings in.

    uv is told of the indexes and folders of wheels that pip is told of.
    """
    ours = ("PYTHON", "VIRTUAL_ENV", "BLT_", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    kept = {name: value for name, value in environment.items() if not name.startswith(ours)}
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS"):
        if f"PIP_{name}" in kept:
            kept.setdefault(f"UV_{name}", kept[f"PIP_{name}"])
    return {**kept, "PYTHONNOUSERSITE": "1"}


def _uv(*arguments: str, **variables: str) -> str:
    return _run([sys.executable, "-m", "uv", *arguments], {**clean_variables(), **variables})


def _run(command: Sequence[str], variables: Mapping[str, str], timeout: float = _PATIENCE) -> str:
    """Its stdout. Raises InstallError with the line that says most."""
    try:
        done = subprocess.run(
            command,
            env=dict(variables),
            cwd=tempfile.gettempdir(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{Path(command[0]).name}: {error}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # The first cause says most; of a traceback the last line does.
        causes = [line for line in lines if "Because " in line or line.lower().startswith("error: ")]
        raise InstallError((causes[:1] or lines[-1:] or [f"exit code {done.returncode}"])[0])
    return done.stdout
