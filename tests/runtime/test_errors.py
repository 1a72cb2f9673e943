"""What an error tells to install is what can be installed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from blt_edge.runtime import errors


def test_an_extra_is_installed_from_the_clone_or_into_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (errors._CLONE / "pyproject.toml").exists():  # not where a wheel is installed
        flag, path = shlex.split(errors.requirement("serve"))
        assert (flag, Path(path.removesuffix("[serve]"))) == ("-e", Path(__file__).resolve().parents[2])
    clone = tmp_path / "a clone"
    clone.mkdir()
    monkeypatch.setattr(errors, "_CLONE", clone)
    assert errors.requirement("serve") == "'blt-edge[serve]'"
    (clone / "pyproject.toml").touch()
    assert shlex.split(errors.requirement("serve")) == ["-e", f"{clone}[serve]"]
