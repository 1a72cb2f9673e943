"""`blt-edge serve` as a process of its own: its address, its lines, its end."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import pytest
from support.chat import MAIN, SLOW, posix
from support.chat import start as start_program

httpx = pytest.importorskip("httpx", reason="needs httpx: pip install 'blt-edge[dev]'")
pytest.importorskip("starlette", reason="needs starlette: pip install 'blt-edge[serve]'")
pytestmark = posix

Start = Callable[..., Popen[str]]


@pytest.fixture
def start(tiny_model, monkeypatch) -> Iterator[Start]:
    """`start("--queue", 3, code=SLOW, env={...})` -> the process; it is killed when the test ends."""
    processes: list[Popen[str]] = []
    monkeypatch.delenv("BLT_EDGE_API_KEY", raising=False)

    def run(*arguments: object, code: str = MAIN, **env: str) -> Popen[str]:
        asked = ["serve", "-m", tiny_model.bundle, "--port", 0, "--threads", 1, *arguments]
        processes.append(start_program(*asked, code=code, env=env, text=True))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def address(process: Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: Popen[str], number: int = signal.SIGTERM) -> tuple[int, str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_the_address_is_all_of_stdout_and_the_example_works(start: Start, tiny_model, tmp_path: Path) -> None:
    process = start()
    url = address(process)
    assert url.startswith("http://127.0.0.1:")
    assert process.stderr is not None
    first = [process.stderr.readline() for _ in range(4)]
    assert first[0].startswith(f"{tiny_model.bundle.name}: 500 positions; engine: portable graphs")
    example = "".join(first[1:3]).removeprefix("try: ").strip()
    done = subprocess.run(["sh", "-c", f"{example} -s"], capture_output=True, text=True, check=True)
    assert '"completion_tokens":' in done.stdout
    assert "a page is at the same address" in first[3]
    assert "<!doctype html>" in httpx.get(url).text.lower() or "not installed" in httpx.get(url).text
    code, out, err = ended(process)
    assert (code, out) == (0, "")
    assert err.splitlines()[0].startswith("POST /v1/completions 200 ")
    assert err.splitlines()[-1] == "stopped"


def test_quiet_says_the_address_only_and_a_name_may_be_no_text(start: Start) -> None:
    process = start("-q", "--name", b"caf\xe9")
    url = address(process)
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == r"caf\udce9"
    assert ended(process, signal.SIGINT) == (0, "", "")


def test_what_runs_is_finished_before_it_ends(start: Start) -> None:
    process = start("--grace", 30, code=SLOW)
    asked = {"prompt": "Once", "max_tokens": 60, "temperature": 0, "stream": True, "draft": "none"}
    with httpx.stream("POST", f"{address(process)}/v1/completions", json=asked, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopping: what was accepted has 30 s" in err


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    process = start("--grace", 60, code=SLOW.replace("0.02", "0.2"))
    asked = {"prompt": "Once", "max_tokens": 480, "stream": True, "draft": "none"}
    with httpx.stream("POST", f"{address(process)}/v1/completions", json=asked, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while not process.stderr.readline().startswith("stopping:"):
            pass
        process.send_signal(signal.SIGINT)
        assert '"code":"stopping"' in [line for line in lines if line][-1]
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_the_key_from_the_environment(start: Start) -> None:
    process = start(BLT_EDGE_API_KEY="s3cret")
    url = address(process)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    _, _, err = ended(process)
    assert "s3cret" not in err
    assert '-H "Authorization: Bearer $BLT_EDGE_API_KEY"' in err
    empty = start(BLT_EDGE_API_KEY="")
    out, err = empty.communicate(timeout=60)
    assert (empty.returncode, out) == (2, "")
    assert err.startswith("blt-edge: error: BLT_EDGE_API_KEY is empty; give it a key, or unset it")


@pytest.mark.parametrize("key", [{}, {"BLT_EDGE_API_KEY": "k"}])
def test_an_open_door_is_warned_of(start: Start, key: dict[str, str]) -> None:
    process = start("--host", "0.0.0.0", "-q", **key)
    assert address(process).startswith("http://0.0.0.0:")
    code, _, err = ended(process)
    assert code == 0
    assert ("anybody who reaches 0.0.0.0 may use this server" in err) == (not key)


def test_it_goes_on_when_nobody_reads_its_log(start: Start) -> None:
    process = start()
    url = address(process)
    assert process.stderr is not None
    process.stderr.close()
    for _ in range(3):
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_port_that_is_taken(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("--port", port)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err == (
        f"blt-edge: error: can't listen on http://127.0.0.1:{port}: Address already in use; "
        "choose another --host or --port\n"
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--port", "70000"), "--port: 70000 is not in the range"),
        (("--timeout", "0"), "--timeout: 0.0 is not in the range"),
        (("--max-body", "plenty"), "--max-body: got 'plenty'; give an amount such as"),
        (("--api-key", "a b"), "--api-key is empty or has characters"),
        (("--api-key", ""), "--api-key is empty or has characters"),
        (("--cors-origin", "example.org"), "--cors-origin: got example.org; give a scheme and a host"),
        (("--draft-length", "99"), "--draft-length is 99; allowed is"),
        (("--host", "no such host."), "can't listen on http://no such host.:0"),
        (("--host", "a" * 300), "can't listen on http://aaa"),
        (("--host", "a..b"), "can't listen on http://a..b:0"),
        (("--allow-host", "example.org:80"), "--allow-host: got example.org:80; give a name alone"),
        (("--allow-host", "http://example.org"), "--allow-host: got http://example.org; give a name"),
    ],
)
def test_wrong_values(refused, tiny_model, flags: tuple[str, ...], line: str) -> None:
    code = 1 if "--host" in flags else 2
    assert refused("serve", "-m", tiny_model.bundle, "--port", 0, *flags, code=code).startswith(line)
