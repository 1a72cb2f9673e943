"""The server's load test, in small: every answer right, every client that left forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("httpx", reason="needs httpx: pip install 'blt-edge[dev]'")
pytest.importorskip("starlette", reason="needs starlette: pip install 'blt-edge[serve]'")


def test_sixty_at_once_and_a_hundred_after(tiny_model) -> None:
    flags = [
        "--concurrent",
        "60",
        "--requests",
        "100",
        "--every",
        "25",
        "--new-bytes",
        "12",
        "--threads",
        "1",
    ]
    module = [sys.executable, "-m", "blt_edge.tools.bench.serve_load", "--bundle", str(tiny_model.bundle)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*module, *flags], env=environment, timeout=120, check=False, **streams)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    first, then = document["at_once"], document["one_after_another"]
    assert (first["right"], first["wrong"], first["idle_after"]) == (60, 0, True)
    assert [first[kind]["requests"] for kind in ("usual", "leaves", "malformed")] == [20, 20, 20]
    assert (then["right"], then["wrong"]) == (100, 0)
    assert len(then["resident_mb"]) == 4
