"""The server's load and soak tests, in small: every answer right, every client that left forgotten."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="needs httpx: pip install 'blt-edge[dev]'")
pytest.importorskip("starlette", reason="needs starlette: pip install 'blt-edge[serve]'")

import httpx
from blt_edge.tools.bench import serve_load, soak
from blt_edge.tools.bench.soak import judged


def bench(name: str, bundle: object, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        f"blt_edge.tools.bench.{name}",
        "--bundle",
        bundle,
        "--threads",
        1,
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run([str(one) for one in command], env=environment, timeout=120, check=False, **streams)


def test_sixty_at_once_and_a_hundred_after(tiny_model) -> None:
    flags = ("--concurrent", 60, "--requests", 100, "--every", 25, "--new-bytes", 12)
    done = bench("serve_load", tiny_model.bundle, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    first, then = document["at_once"], document["one_after_another"]
    assert (first["right"], first["wrong"], first["idle_after"]) == (60, 0, True)
    assert [first[kind]["requests"] for kind in ("usual", "leaves", "malformed")] == [20, 20, 20]
    assert (then["right"], then["wrong"]) == (100, 0)
    assert len(then["resident_mb"]) == 4


def test_many_clients_for_some_seconds(tiny_model) -> None:
    done = bench("serve_load", tiny_model.bundle, "--show", "long", "--minutes", 0.1, "--concurrent", 30)
    assert done.stderr == ""
    document = json.loads(done.stdout.splitlines()[-1])["long"]
    assert (document["wrong"], document["idle_after"]) == (0, True)
    assert done.returncode == (not document["flat"])
    assert document["right"] == document["requests"] > 30


def test_what_clients_gain_and_cost_each_other(tiny_model, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The lamp was lit, and the boats came in; 27 of them. " * 20)
    flags = ("--text", text, "--rounds", 1)
    few = ("--new-bytes", 8, "--clients", 3, "--prompt-bytes", 20, 40)
    together = bench("serve_load", tiny_model.bundle, "--show", "together", *flags, *few)
    assert (together.returncode, together.stderr) == (0, "")
    cases = json.loads(together.stdout.splitlines()[-1])["together"]
    assert [(one["prompt_bytes"], one["draft"]) for one in cases] == [
        (20, "auto"),
        (20, "none"),
        (40, "auto"),
        (40, "none"),
    ]
    assert all(set(one["rates"]) == {"1", "3"} and one["gain"] > 0 for one in cases)
    assert bench("serve_load", tiny_model.bundle, "--show", "reading").returncode == 2


def test_what_has_grown() -> None:
    flat = [(100.0 + number % 7, 16, 40 + number % 3) for number in range(90)]
    assert serve_load._judged(flat)[0]
    for place, step in enumerate((0.2, 0.05, 0.3)):
        grown = [
            tuple(value + step * number * (index == place) for index, value in enumerate(look))
            for number, look in enumerate(flat)
        ]
        assert not serve_load._judged(grown)[0]
    assert serve_load._judged(flat[:2]) == (True, "too short to tell whether it grows")


@pytest.mark.skipif(sys.platform != "linux", reason="the server tells its memory on Linux only")
def test_a_soak_of_some_seconds(tiny_model) -> None:
    done = bench("soak", tiny_model.bundle, "--minutes", 0.08, "--every", 20, "--busy")
    *lines, last = done.stdout.splitlines()
    document = json.loads(last)
    assert (document["wrong"], done.stderr) == (0, ""), done.stdout
    assert done.returncode == (not document["levelled_off"])
    assert 0 < document["most_kept_bytes"] <= 50_000_000
    assert lines[-2].startswith("kept of texts: at most ")
    assert len(document["own_mb"]) == len(document["resident_mb"]) == document["requests"]
    assert [line.split()[0] for line in lines[1:-2]] == [
        str(20 * (number + 1)) for number in range(document["requests"] // 20)
    ]


@pytest.mark.parametrize("busy", [True, False])
def test_a_line_for_each_so_many_whatever_else_is_counted_meanwhile(monkeypatch, capsys, busy: bool) -> None:
    asking: list[object] = []

    async def look(client: object) -> dict[str, float]:
        assert busy or not asking
        await asyncio.sleep(0.01)  # in which the other clients' requests end
        assert busy or not asking
        kept = ("memory_bytes", "memory_limit_bytes", "reused_bytes_total")
        idle = {"blt_edge_texts_at_work": 0.0, "blt_edge_queue_length": 0.0}
        kept_now = {f"blt_edge_prefix_{name}": 1.0 for name in kept}
        return {"process_resident_memory_bytes": 1e6, **idle, **kept_now}

    async def ask(client: object) -> bool:
        asking.append(client)
        await asyncio.sleep(0.001)
        asking.pop()
        return True

    facts = httpx.Response(200, json={"data": [{"blt": {"max_positions": 9}}]})
    transport = httpx.MockTransport(lambda request: facts)
    monkeypatch.setattr(httpx, "AsyncClient", partial(httpx.AsyncClient, transport=transport))
    monkeypatch.setattr(soak, "_KINDS", (("any", ask),))
    monkeypatch.setattr(soak, "figures", look)
    monkeypatch.setattr(soak, "_RELEASE_SECONDS", 0)
    done = asyncio.run(soak._soak("http://server", soak.Plan(2 / 60, 5, 8, busy=busy), lambda: 1))
    told = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert told == [*range(5, done.requests + 1, 5)]
    assert len(told) > 2


def test_what_counts_as_levelled_off() -> None:
    source = random.Random(1)
    noise = [source.uniform(-1.5, 1.5) for _ in range(300)]
    warm = [130 + 40 * min(1, number / 90) + noise[number] for number in range(300)]
    assert judged(warm)[1]
    assert not judged([one + 0.03 * number for number, one in enumerate(warm)])[1]  # a leak
    assert not judged([one + 4 * (number // 80) for number, one in enumerate(warm)])[1]  # in steps
    assert not judged(warm[:29])[1]
