"""Python interpreters of this machine: one for each minor release, that can make a virtual environment.

What a cell runs in: a virtual environment with the wheel, and folders of other versions laid over it.

One environment a Python is kept in the cache. pip resolves each cell anew, as it would for a user who asks
for those versions; every package for which it chooses another version than the environment has comes from a
folder of its own on PYTHONPATH, which takes seconds where a new environment would take half a minute. What is
then really imported is looked at, not believed.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from .plan import Cell, Kind

__all__ = [
    "Environment",
    "InstallError",
    "Interpreter",
    "InterpreterError",
    "Prepared",
    "Wheel",
    "build_wheel",
    "candidates",
    "clean_variables",
    "extras",
    "find",
    "this_python",
]

_NEWEST_MINOR = 30
"""Of the names python3.N that are looked for on PATH."""

# Debian's Python has no ensurepip without python3-venv; packages are compiled for CPython with a GIL.
_QUESTION = """
import ensurepip, json, platform, sys, venv
print(json.dumps([platform.python_version(), sys.implementation.name, getattr(sys, "abiflags", "")]))
"""


class InterpreterError(Exception):
    """An interpreter that was asked for by its path can't be used."""


@dataclass(frozen=True)
class Interpreter:
    """A CPython that can make virtual environments."""

    path: Path
    version: str
    """Such as 3.11.7."""

    @property
    def minor(self) -> str:
        """Such as 3.11."""
        return ".".join(self.version.split(".")[:2])


def find(named: Sequence[Path] = (), others: Iterable[Path] | None = None) -> dict[str, Interpreter]:
    """Interpreters by minor release, oldest first.

    named: paths that the user gave; they go before others of their minor release, and one that can't be used
    raises InterpreterError.
    others: None takes those of `candidates()`.
    """
    found: dict[str, Interpreter] = {}
    for path in named:
        interpreter = _ask(path)
        if interpreter is None:
            raise InterpreterError(
                f"--python {path}: not a CPython with the modules venv and ensurepip; "
                "give the path of an interpreter that is (on Debian, install python3-venv)"
            )
        found[interpreter.minor] = interpreter
    for path in candidates() if others is None else others:
        interpreter = _ask(path)
        if interpreter is not None:
            found.setdefault(interpreter.minor, interpreter)
    return dict(sorted(found.items(), key=lambda item: _numbers(item[0])))


def candidates(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where interpreters may be: the one that runs this, python3.N on PATH, and pyenv's."""
    paths = [Path(getattr(sys, "_base_executable", sys.executable))]
    for minor in range(_NEWEST_MINOR):
        name = shutil.which(f"python3.{minor}", path=environment.get("PATH", ""))
        if name is not None:
            paths.append(Path(name))
    pyenv = Path(environment.get("PYENV_ROOT") or Path(environment.get("HOME", "~")).expanduser() / ".pyenv")
    return [*paths, *sorted(pyenv.glob("versions/*/bin/python3"), reverse=True)]


def this_python() -> str:
    """The minor release that runs this, such as 3.11."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _ask(path: Path) -> Interpreter | None:
    # pyenv's shims are on PATH for interpreters that it will not start: only running one tells.
    try:
        done = subprocess.run(
            [path, "-I", "-c", _QUESTION],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    try:
        version, implementation, flags = json.loads(done.stdout)
    except ValueError:
        return None
    return Interpreter(path, version) if implementation == "cpython" and not flags else None


def _numbers(minor: str) -> tuple[int, ...]:
    return tuple(int(part) for part in minor.split("."))


_PIP_TIMEOUT = 1800
_STAMP = "installed.json"
_LOOK = """
import importlib, importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    module = importlib.import_module("blt_edge.runtime" if name == "blt-edge" else name.replace("-", "_"))
    found[name] = [importlib.metadata.version(name), module.__file__, str(getattr(module, "__version__", ""))]
print(json.dumps(found))
"""


class InstallError(Exception):
    """A combination that pip does not install, or that is not what is imported afterwards: one line."""


@dataclass(frozen=True)
class Wheel:
    """The project as it is installed."""

    path: Path
    version: str
    metadata: str
    """METADATA, with what the project claims."""
    digest: str
    """Of the code and data in it, 12 hexadecimal digits; metadata and times don't count."""


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
    """Every package that pip chose, sorted by name."""


def extras(cell: Cell) -> tuple[str, ...]:
    """Which of blt-edge's extras a cell installs."""
    return ("cpu", "export", "validate") if cell.with_torch else ("cpu", "export")


def clean_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """This process's variables less those that would let other packages or settings in."""
    ours = ("PYTHON", "VIRTUAL_ENV", "BLT_", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    kept = {name: value for name, value in environment.items() if not name.startswith(ours)}
    return {**kept, "PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def build_wheel(checkout: Path, folder: Path) -> Wheel:
    """Build the project's wheel into `folder`. Raises InstallError."""
    # From a copy: setuptools leaves a build folder, and takes what an earlier one left into the next wheel.
    listed = _run(
        ["git", "-C", str(checkout), "ls-files", "-co", "--exclude-standard", "-z"], clean_variables()
    )
    with tempfile.TemporaryDirectory() as copy:
        for name in filter(None, listed.split("\0")):
            source, target = checkout / name, Path(copy, name)
            if source.is_file() and not source.is_symlink():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), copy]
        _run(pip, clean_variables())
    (path,) = folder.glob("*.whl")
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        names = sorted(archive.namelist())
        for name in names:
            if ".dist-info/" not in name:
                digest.update(f"{name}\0".encode() + hashlib.sha256(archive.read(name)).digest())
        (described,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(described).decode()
    return Wheel(path, path.name.split("-")[1], metadata, digest.hexdigest()[:12])


class Environment:
    """A virtual environment of one Python with the wheel in it, and the folders that are laid over it."""

    def __init__(self, cache: Path, interpreter: Interpreter, wheel: Wheel, with_torch: str | None) -> None:
        """Make it or bring it up to date. with_torch: torch's version, or None to do without.

        Raises InstallError.
        """
        self._wheel = wheel
        self._root = cache / "environments" / f"{interpreter.version}{'-torch' if with_torch else ''}"
        self._overlays = cache / "packages" / interpreter.minor
        self._python = self._root / "bin" / "python"
        self._variables = clean_variables()
        stamp = self._root / _STAMP
        if not stamp.is_file():
            shutil.rmtree(self._root, ignore_errors=True)
            _run([str(interpreter.path), "-m", "venv", str(self._root)], self._variables)
            wanted = "cpu,export,validate" if with_torch else "cpu,export"
            self._pip("install", f"{wheel.path}[{wanted}]", *([f"torch=={with_torch}"] if with_torch else []))
        elif json.loads(stamp.read_text()) != wheel.digest:
            self._pip("install", "--no-deps", "--force-reinstall", str(wheel.path))
        stamp.write_text(json.dumps(wheel.digest))
        self._installed = self._list()

    def prepare(self, cell: Cell) -> Prepared:
        """Lay the cell's versions over. Raises InstallError with what pip or Python had to say."""
        chosen = self._resolve(cell)
        paths = [
            self._overlay(name, version)
            for name, version in chosen.items()
            if self._installed.get(name) != version and name != "blt-edge"
        ]
        variables = {**self._variables, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        self._look(cell, chosen, variables)
        (golden,) = self._root.glob("lib/python*/site-packages/blt_edge/export/demo/golden.safetensors")
        return Prepared(self._root / "bin", variables, golden, chosen)

    def _resolve(self, cell: Cell) -> dict[str, str]:
        # pip would rightly not install an ONNX Runtime under the minimum: it is put there by force, as one is
        # that came with a device.
        pins = {} if cell.kind is Kind.BELOW else dict(cell.pins)
        wanted = f"{self._wheel.path}[{','.join(extras(cell))}]"
        report = self._pip(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--report=-",
            wanted,
            *(f"{name}=={version}" for name, version in pins.items()),
        )
        packages = [item["metadata"] for item in json.loads(report)["install"]]
        chosen = {str(canonicalize_name(item["name"])): str(item["version"]) for item in packages}
        return dict(sorted({**chosen, **(dict(cell.pins) if cell.kind is Kind.BELOW else {})}.items()))

    def _overlay(self, name: str, version: str) -> Path:
        folder = self._overlays / f"{name}-{version}"
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            self._pip("install", "--no-deps", "--target", str(partial), f"{name}=={version}")
            partial.rename(folder)
        return folder

    def _look(self, cell: Cell, chosen: Mapping[str, str], variables: Mapping[str, str]) -> None:
        names = ["blt-edge", *(name for name, _ in cell.pins)]
        found = json.loads(_run([str(self._python), "-c", _LOOK, *names], variables))
        for name, (version, file, own) in found.items():
            places = (self._root, self._overlays / f"{name}-{chosen[name]}")
            here = any(Path(file).is_relative_to(place) for place in places)
            stated = own and Version(own).public != Version(chosen[name]).public
            if version != chosen[name] or not here or stated:
                raise InstallError(
                    f"{name}: {chosen[name]} was laid over, {own or version} of {file} imported"
                )

    def _list(self) -> dict[str, str]:
        listed = json.loads(self._pip("list", "--format=json"))
        return {str(canonicalize_name(item["name"])): str(item["version"]) for item in listed}

    def _pip(self, command: str, *arguments: str) -> str:
        wheels = ["--only-binary=:all:", "-q"] if command == "install" else []
        return _run([str(self._python), "-m", "pip", command, *wheels, *arguments], self._variables)


def _run(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Its stdout. Raises InstallError with the line that says most."""
    try:
        done = subprocess.run(
            command,
            env=dict(variables),
            cwd=tempfile.gettempdir(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PIP_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{Path(command[0]).name}: {error}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR: ")]
        # pip's first error is the cause; of a traceback the last line is.
        raise InstallError((errors[:1] or lines[-1:] or [f"exit code {done.returncode}"])[0])
    return done.stdout
