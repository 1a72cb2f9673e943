"""Which combinations of versions are tried: cells, planned before anything is installed.

What is claimed is read from a wheel's metadata; which releases there are is asked of pip.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from enum import Enum

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

CORNERS = "corners"
"""The word for `select` that means the cells of continuous integration."""

_BELOW = 2
"""Minor releases of ONNX Runtime under the claimed minimum that are tried, too."""
_RUNTIME = "onnxruntime"
_WITH_TORCH = "transformers"
_LISTED = re.compile(r"^Available versions: (.*)$", re.M)


class MatrixError(Exception):
    """Nothing can be tried, in one line: a claim, an index, an interpreter or a report is not as needed."""


@dataclass(frozen=True)
class Claims:
    """What the metadata of blt-edge's wheel says it works with."""

    python: str
    """The oldest Python, such as 3.10."""
    packages: dict[str, Version]
    """The oldest release of each package of the extras that were asked for."""

    @classmethod
    def of_metadata(cls, text: str, extras: Iterable[str]) -> Claims:
        """Read METADATA. Raises MatrixError where a requirement has no minimum to try."""
        headers = HeaderParser().parsestr(text)
        wanted = ("", *extras)
        packages: dict[str, Version] = {}
        for line in headers.get_all("Requires-Dist") or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted):
                packages[canonicalize_name(requirement.name)] = _minimum(requirement.specifier, line)
        python = headers.get("Requires-Python") or ""
        return cls(str(_minimum(SpecifierSet(python), f"Requires-Python: {python}")), packages)


def _minimum(specifier: SpecifierSet, line: str) -> Version:
    least = [Version(part.version) for part in specifier if part.operator == ">="]
    if len(least) != 1:
        raise MatrixError(f"{line}: no minimum to try; say name>=version in pyproject.toml")
    return least[0]


class Releases:
    """Releases as pip finds them, in the indexes that it is set up for, for this machine."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], list[Version]] = {}

    def versions(self, package: str, python: str) -> list[Version]:
        """Those for Python `python` ("3.11"), newest first; [] if none. Raises MatrixError."""
        if (package, python) not in self._known:
            target = ["--python-version", python, "--only-binary=:all:", "--disable-pip-version-check"]
            done = _call(["pip", "index", "versions", package, *target])
            listed = _LISTED.search(done.stdout)
            if listed is None and "No matching distribution found" not in done.stderr:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                needed = "pip 21.2 and a package index are needed"
                raise MatrixError(f"pip index versions {package}: {last}; {needed}")
            texts = listed[1].split(", ") if listed else []
            self._known[package, python] = sorted(map(Version, texts), reverse=True)
        return self._known[package, python]

    def has_wheel(self, package: str, version: Version, python: str) -> bool:
        """Whether that release need not be compiled there: `pip index` lists sources, too."""
        fixed = ["--no-deps", "--only-binary", ":all:", "--python-version", python, "-"]
        return _call(["uv", "pip", "compile", *fixed], f"{package}=={version}").returncode == 0


def _call(module: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *module]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=600, check=False)


class Kind(str, Enum):
    """Why a cell is tried."""

    GRID = "grid"
    """A Python and an ONNX Runtime that are claimed."""
    BELOW = "below"
    """An ONNX Runtime under the claimed minimum: a refusal in one line is what is wanted."""
    MINIMUM = "minimum"
    """One package at its claimed minimum."""
    NEWEST = "newest"
    """One package at its newest."""
    ALL_MINIMUMS = "all-minimums"
    """Every package at its claimed minimum."""


@dataclass(frozen=True)
class Cell:
    """One combination of versions."""

    kind: Kind
    python: str
    """Minor release, such as 3.11."""
    pins: tuple[tuple[str, str], ...]
    """Packages and versions that are asked for, the one that it is about first; pip chooses all others."""
    corner: bool = False
    """Whether continuous integration runs it."""

    @property
    def package(self) -> str:
        return self.pins[0][0]

    @property
    def version(self) -> str:
        return self.pins[0][1]

    @property
    def name(self) -> str:
        """Such as 3.11/onnxruntime-1.32.0; no two cells of a plan share it."""
        if self.kind is Kind.ALL_MINIMUMS:
            return f"{self.python}/{self.kind.value}"
        plain = f"{self.python}/{self.package}-{self.version}"
        return f"{plain}-{self.kind.value}" if self.kind in (Kind.MINIMUM, Kind.NEWEST) else plain

    @property
    def with_torch(self) -> bool:
        """Whether transformers itself is the reference."""
        return self.package == _WITH_TORCH

    @property
    def extras(self) -> tuple[str, ...]:
        return ("cpu", "export", "validate") if self.with_torch else ("cpu", "export")


@dataclass(frozen=True)
class Plan:
    """All cells, and the Pythons that they are about."""

    pythons: tuple[str, ...]
    """Minor releases from the claimed minimum to the newest that ONNX Runtime has wheels for."""
    missing: tuple[str, ...]
    """Those of them that this machine has no interpreter of."""
    cells: tuple[Cell, ...]


def make_plan(
    claims: Claims, releases: Releases, found: Collection[str], torch_python: str, torch: str
) -> Plan:
    """Plan every cell.

    found: minor releases of Python that can be run here.
    torch_python, torch: the Python and the one version of torch that transformers is tried with.
    Raises MatrixError when the index knows no release to try, or no interpreter is there.
    """
    pythons = _pythons(claims, releases)
    here = [python for python in pythons if python in found]
    if not here:
        raise MatrixError(f"no interpreter of Python {', '.join(pythons)} found; give one with --python PATH")

    def offered(package: str, python: str) -> list[Version]:
        least = claims.packages[package]
        return [version for version in releases.versions(package, python) if version >= least]

    # 1. Every Python with every ONNX Runtime from the claimed minimums on.
    cells = []
    for python in pythons:
        # Where the newest Python is missing, its cell says so and the newest that is here stands in.
        edge = python in (pythons[0], here[0], pythons[-1], here[-1])
        for position, version in enumerate(newest_patches(offered(_RUNTIME, python))):
            cells.append(Cell(Kind.GRID, python, ((_RUNTIME, str(version)),), edge and position == 0))
    # 2. An ONNX Runtime that is to be refused.
    supported = offered(_RUNTIME, here[0])
    older = [version for version in releases.versions(_RUNTIME, here[0]) if version not in supported]
    for version in newest_patches(older)[:_BELOW]:
        cells.append(Cell(Kind.BELOW, here[0], ((_RUNTIME, str(version)),)))
    # 3. Every package at its minimum, all at once.
    pins = []
    for package in claims.packages:
        if package not in ("torch", _WITH_TORCH):
            known = offered(package, pythons[0])
            if not known:
                raise _no_release(claims, package, f" for Python {pythons[0]}")
            pins.append((package, str(min(known))))
    cells.append(Cell(Kind.ALL_MINIMUMS, pythons[0], tuple(pins), corner=True))
    # 4. Every other package at its minimum and at its newest.
    for package in claims.packages:
        if package in (_RUNTIME, "torch"):
            continue
        where, beside = ([torch_python], (("torch", torch),)) if package == _WITH_TORCH else (here, ())
        known = [version for python in {where[0], where[-1]} for version in offered(package, python)]
        if not known:
            raise _no_release(claims, package)
        for kind, version in ((Kind.MINIMUM, min(known)), (Kind.NEWEST, max(known))):
            # An old release often has no wheel for a new Python: the newest Python that has one is taken.
            having = (python for python in reversed(where) if releases.has_wheel(package, version, python))
            cells.append(Cell(kind, next(having, where[0]), ((package, str(version)), *beside)))
    return Plan(tuple(pythons), tuple(python for python in pythons if python not in here), tuple(cells))


def newest_patches(versions: Iterable[Version]) -> list[Version]:
    newest = {(version.major, version.minor): version for version in sorted(versions)}
    return sorted(newest.values(), reverse=True)


def _pythons(claims: Claims, releases: Releases) -> list[str]:
    major, minor = (int(part) for part in claims.python.split("."))
    pythons = []
    while releases.versions(_RUNTIME, f"{major}.{minor}"):
        pythons.append(f"{major}.{minor}")
        minor += 1
    if not pythons:
        raise MatrixError(
            f"pip finds no {_RUNTIME} for Python {claims.python}; it needs a package index that it can reach"
        )
    return pythons


def _no_release(claims: Claims, package: str, where: str = "") -> MatrixError:
    return MatrixError(f"{package}>={claims.packages[package]}: pip finds no such release{where}")


def select(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Cells whose names match one of the patterns of a shell, or that are corners; all without a pattern.

    Raises MatrixError for a pattern that matches none.
    """

    def matches(cell: Cell, pattern: str) -> bool:
        return cell.corner if pattern == CORNERS else fnmatch.fnmatchcase(cell.name, pattern)

    for pattern in patterns:
        if not any(matches(cell, pattern) for cell in cells):
            raise MatrixError(
                f"--only {pattern}: no cell of this name; give {CORNERS} or a pattern such as '3.11/*' "
                "(--list shows all names)"
            )
    return [cell for cell in cells if not patterns or any(matches(cell, pattern) for pattern in patterns)]
