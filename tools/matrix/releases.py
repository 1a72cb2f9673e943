"""What is claimed and what there is: minimums in a wheel's metadata, and releases in the package index."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from typing import Protocol

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

__all__ = ["Claims", "PipReleases", "Releases", "ReleasesError", "newest_patches"]

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
