"""What a wheel holds, and what `make` says of itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def section(name: str) -> str:
    """Of pyproject.toml; Python 3.10 has no reader for it."""
    return (
        (ROOT / "pyproject.toml").read_text().partition(f"[tool.setuptools{name}]\n")[2].partition("\n[")[0]
    )


def test_every_folder_with_files_is_a_package_of_its_own() -> None:
    """setuptools calls the others ambiguous, in two pages of warnings."""
    folders = dict(re.findall(r'^"([\w.]+)" = "([\w/]+)"$', section(".package-dir"), re.M))
    assert set(re.findall(r'^    "([\w.]+)",$', section(""), re.M)) == set(folders)
    data = re.findall(r'^"([\w.]+)" = \[(.*)\]$', section(".package-data"), re.M)
    assert data
    for package, patterns in data:
        for pattern in re.findall('"([^"]+)"', patterns):
            assert any((ROOT / folders[package]).glob(pattern)), (package, pattern)
            assert "/" not in pattern


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_names_every_target() -> None:
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    parts = {"lint", "types", "pytest", "clean"}  # of `make test`, or plain
    assert {f"make {target}" for target in targets if target not in parts} <= set(
        re.findall(r"^make \w+", said, re.M)
    )
