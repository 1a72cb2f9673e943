"""What is claimed and what there is: minimums in a wheel's metadata, and releases in the package index.

Which combinations are tried: cells, planned before anything is installed.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from enum import Enum
from typing import Protocol

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

__all__ = [
    "CORNERS",
    "Cell",
    "Claims",
    "Kind",
    "PipReleases",
    "Plan",
    "Releases",
    "ReleasesError",
    "make_plan",
    "newest_patches",
    "select",
]

_LISTED = re.compile(r"^Available versions: (.*)$", re.M)


class ReleasesError(Exception):
    """A claim that can't be read, or a package index that does not answer."""


class Releases(Protocol):
    """Where releases are looked up."""

    def versions(self, package: str, python: str) -> list[Version]:
        """Releases for this machine and Python `python` ("3.11"), newest first; [] if none."""

    def has_wheel(self, package: str, version: Version, python: str) -> bool:
        """Whether that release need not be compiled there."""


@dataclass(frozen=True)
class Claims:
    """What the metadata of blt-edge's wheel says it works with."""

    python: str
    """The oldest Python, such as 3.10."""
    packages: dict[str, Version]
    """The oldest release of each package of the extras that were asked for."""

    @classmethod
    def of_metadata(cls, text: str, extras: Iterable[str]) -> Claims:
        """Read METADATA. Raises ReleasesError where a requirement has no minimum to try."""
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
        raise ReleasesError(f"{line}: no minimum to try; say name>=version in pyproject.toml")
    return least[0]


class PipReleases:
    """Releases as pip finds them, in the indexes that it is set up for."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], list[Version]] = {}

    def versions(self, package: str, python: str) -> list[Version]:
        """See `Releases`."""
        key = package, python
        if key not in self._known:
            self._known[key] = self._ask(package, python)
        return self._known[key]

    def has_wheel(self, package: str, version: Version, python: str) -> bool:
        """See `Releases`."""
        # `pip index` lists sources, too, and `pip install` looks at the Python that runs it.
        with tempfile.TemporaryDirectory() as folder:
            fetch = ["download", "--no-deps", "--dest", folder, f"{package}=={version}"]
            return self._pip(fetch, python).returncode == 0

    def _ask(self, package: str, python: str) -> list[Version]:
        done = self._pip(["index", "versions", package], python)
        listed = _LISTED.search(done.stdout)
        if listed:
            return sorted((Version(text) for text in listed[1].split(", ")), reverse=True)
        if "No matching distribution found" in done.stderr:
            return []
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ReleasesError(f"pip index versions {package}: {last}; pip 21.2 and a package index are needed")

    def _pip(self, arguments: Sequence[str], python: str) -> subprocess.CompletedProcess[str]:
        target = ["--python-version", python, "--only-binary=:all:", "--disable-pip-version-check"]
        return subprocess.run(
            [sys.executable, "-m", "pip", *arguments, *target],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


def newest_patches(versions: Sequence[Version]) -> list[Version]:
    """The newest patch release of each minor one, newest first."""
    newest: dict[tuple[int, int], Version] = {}
    for version in versions:
        minor = version.major, version.minor
        newest[minor] = max(version, newest.get(minor, version))
    return sorted(newest.values(), reverse=True)


CORNERS = "corners"
"""The word for `select` that means the cells of continuous integration."""

_BELOW = 2
"""Minor releases of ONNX Runtime under the claimed minimum that are tried, too."""

_RUNTIME = "onnxruntime"
_WITH_TORCH = "transformers"
_NOT_VARIED = (_RUNTIME, "torch")


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
    """Packages and versions that are asked for; pip chooses all others."""
    corner: bool = False
    """Whether continuous integration runs it."""

    @property
    def package(self) -> str:
        """The package that this cell is about."""
        return self.pins[0][0]

    @property
    def version(self) -> str:
        """Its version."""
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
    Raises ReleasesError when the index knows no release to try, or no interpreter is there.
    """
    pythons = _pythons(claims, releases)
    here = [python for python in pythons if python in found]
    if not here:
        raise ReleasesError(
            f"no interpreter of Python {', '.join(pythons)} found; give one with --python PATH"
        )
    cells = _grid(claims, releases, pythons, here)
    cells += _below(claims, releases, here[0])
    cells.append(_all_minimums(claims, releases, pythons[0]))
    for package in claims.packages:
        if package not in _NOT_VARIED:
            where = [torch_python] if package == _WITH_TORCH else here
            beside = (("torch", torch),) if package == _WITH_TORCH else ()
            cells += _package(claims, releases, package, where, beside)
    return Plan(tuple(pythons), tuple(python for python in pythons if python not in here), tuple(cells))


def select(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Cells whose names match one of the patterns of a shell, or that are corners; all without a pattern.

    Raises ReleasesError for a pattern that matches none.
    """
    for pattern in patterns:
        if not any(_matches(cell, pattern) for cell in cells):
            raise ReleasesError(
                f"--only {pattern}: no cell of this name; give {CORNERS} or a pattern such as '3.11/*' "
                "(--list shows all names)"
            )
    return [cell for cell in cells if not patterns or any(_matches(cell, pattern) for pattern in patterns)]


def _matches(cell: Cell, pattern: str) -> bool:
    return cell.corner if pattern == CORNERS else fnmatch.fnmatchcase(cell.name, pattern)


def _pythons(claims: Claims, releases: Releases) -> list[str]:
    major, minor = (int(part) for part in claims.python.split("."))
    pythons = []
    while releases.versions(_RUNTIME, f"{major}.{minor}"):
        pythons.append(f"{major}.{minor}")
        minor += 1
    if not pythons:
        raise ReleasesError(
            f"pip finds no {_RUNTIME} for Python {claims.python}; it needs a package index that it can reach"
        )
    return pythons


def _grid(claims: Claims, releases: Releases, pythons: Sequence[str], here: Sequence[str]) -> list[Cell]:
    cells = []
    for python in pythons:
        offered = [v for v in releases.versions(_RUNTIME, python) if v >= claims.packages[_RUNTIME]]
        for position, version in enumerate(newest_patches(offered)):
            # Where the newest Python is missing, its cell says so and the newest that is here stands in.
            corner = position == 0 and python in (pythons[0], here[0], pythons[-1], here[-1])
            cells.append(Cell(Kind.GRID, python, ((_RUNTIME, str(version)),), corner))
    return cells


def _below(claims: Claims, releases: Releases, python: str) -> list[Cell]:
    least = claims.packages[_RUNTIME]
    older = newest_patches([v for v in releases.versions(_RUNTIME, python) if v < least])
    return [Cell(Kind.BELOW, python, ((_RUNTIME, str(version)),)) for version in older[:_BELOW]]


def _all_minimums(claims: Claims, releases: Releases, python: str) -> Cell:
    without_torch = {
        name: least for name, least in claims.packages.items() if name not in ("torch", _WITH_TORCH)
    }
    pins = []
    for package, least in without_torch.items():
        offered = [v for v in releases.versions(package, python) if v >= least]
        if not offered:
            raise ReleasesError(f"{package}>={least}: pip finds no such release for Python {python}")
        pins.append((package, str(min(offered))))
    return Cell(Kind.ALL_MINIMUMS, python, tuple(pins), corner=True)


def _package(
    claims: Claims,
    releases: Releases,
    package: str,
    pythons: Sequence[str],
    beside: tuple[tuple[str, str], ...],
) -> list[Cell]:
    least = claims.packages[package]
    known = [
        version
        for python in {pythons[0], pythons[-1]}
        for version in releases.versions(package, python)
        if version >= least
    ]
    if not known:
        raise ReleasesError(f"{package}>={least}: pip finds no such release")
    cells = []
    for kind, version in ((Kind.MINIMUM, min(known)), (Kind.NEWEST, max(known))):
        # An old release often has no wheel for a new Python: the newest Python that has one is taken.
        having = (python for python in reversed(pythons) if releases.has_wheel(package, version, python))
        cells.append(Cell(kind, next(having, pythons[0]), ((package, str(version)), *beside)))
    return cells
