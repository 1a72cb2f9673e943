"""What docs/python.md gives for other processes runs as a program of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.markdown_blocks import blocks

PAGE = Path(__file__).parents[3] / "docs/python.md"
# A cluster of its own: one that has crashed leaves an address behind, which Ray tries for minutes.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_LOG_TO_DRIVER": "0", "RAY_ADDRESS": "local"}


@pytest.mark.parametrize(("word", "printed"), [("get_context", r"\d+\.\d+"), ("ray.data", "630")])
def test_it_runs(word: str, printed: str, tiny_model, tmp_path: Path) -> None:
    if word == "ray.data":
        pytest.importorskip("ray.data")
    (code,) = (block.text for block in blocks(PAGE) if block.language == "python" and word in block.text)
    (tmp_path / "demo-bundle").symlink_to(tiny_model.bundle)
    (tmp_path / "program.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if "timed out during startup" in done.stderr:
        pytest.skip("this machine is too busy for a cluster")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(printed, done.stdout.strip().splitlines()[-1])
