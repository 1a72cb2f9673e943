"""`blt-edge serve` as a process of its own: its address, its lines, its end."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
        port = () if "--port" in arguments else ("--port", 0)
        asked = ["serve", "-m", tiny_model.bundle, "--threads", 1, *port, *arguments]
        processes.append(start_program(*asked, code=code, env=env, text=True))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def address(process: Popen[str]) -> str:
    return process.stdout.readline().strip()


def ended(process: Popen[str], number: int = signal.SIGTERM) -> tuple[int, str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@contextmanager
def streaming(process: Popen[str], **asked: object) -> Iterator[Iterator[str]]:
    """The lines of a text that has begun."""
    body = {"prompt": "Once", "stream": True, "draft": "none", **asked}
    with httpx.stream("POST", f"{address(process)}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_the_address_is_all_of_stdout_and_the_example_works(start: Start, tiny_model, tmp_path: Path) -> None:
    process = start()
    url = address(process)
    assert url.startswith("http://127.0.0.1:")
    first = [process.stderr.readline() for _ in range(6)]
    assert first[0].startswith(f"{tiny_model.bundle.name}: 500 positions; engine: portable graphs")
    assert first[1] == "4 texts at work at a time, which take turns (--parallel)\n"
    assert re.fullmatch(r"texts that were read are kept in up to .* [MG]B \(--cache-memory\)\n", first[2])
    example = "".join(first[3:5]).removeprefix("try: ").strip()
    done = subprocess.run(["sh", "-c", f"{example} -s"], capture_output=True, text=True, check=True)
    assert '"completion_tokens":' in done.stdout
    assert "a page is at the same address" in first[5]
    assert "<!doctype html>" in httpx.get(url).text.lower() or "not installed" in httpx.get(url).text
    code, out, err = ended(process)
    assert (code, out) == (0, "")
    assert err.startswith("POST /v1/completions 200 ")
    assert err.endswith("\nstopped\n")


def test_how_many_are_at_work_is_told_and_warned_of(start: Start, monkeypatch) -> None:
    process = start("--parallel", 1)
    assert address(process)
    assert "\n1 text at work at a time (--parallel)\n" in ended(process)[2]
    process = start("--cache-memory", "9999TB", "--parallel", 3, "-q")
    assert address(process)
    err = ended(process)[2]
    assert re.search(
        r"warning: 3 texts of all positions take .*B, and 0 bytes? are free beside --cache-memory", err
    )


def test_quiet_says_the_address_only_and_a_name_may_be_no_text(start: Start) -> None:
    process = start("-q", "--name", b"caf\xe9")
    url = address(process)
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == r"caf\udce9"
    assert ended(process, signal.SIGINT) == (0, "", "")


def test_what_runs_is_finished_before_it_ends(start: Start) -> None:
    process = start("--grace", 30, code=SLOW)
    with streaming(process, max_tokens=60, temperature=0) as lines:
        process.send_signal(signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search("stopping: .* 30 s", err)


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    process = start("--grace", 60, code=SLOW.replace("0.02", "0.2"))
    with streaming(process, max_tokens=480) as lines:
        process.send_signal(signal.SIGINT)
        while not process.stderr.readline().startswith("stopping:"):
            pass
        process.send_signal(signal.SIGINT)
        assert '"code":"stopping"' in [line for line in lines if line][-1]
    assert process.wait(60) == 0


def test_the_key_from_the_environment(start: Start) -> None:
    process = start(BLT_EDGE_API_KEY="s3cret")
    url = address(process)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    _, _, err = ended(process)
    assert "s3cret" not in err
    assert '-H "Authorization: Bearer $BLT_EDGE_API_KEY"' in err
    for nothing in ("", " "):
        empty = start(BLT_EDGE_API_KEY=nothing)
        out, err = empty.communicate(timeout=60)
        assert (empty.returncode, out) == (2, "")
        assert err.startswith("blt-edge: error: BLT_EDGE_API_KEY is empty")


def test_several_keys_and_the_memory_of_texts(start: Start) -> None:
    process = start("--cache-memory", "3MB", BLT_EDGE_API_KEY=" one two one ")
    url = address(process)
    for key, status in (("one", 200), ("two", 200), ("one two", 401), ("three", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
    _, _, err = ended(process)
    assert "kept in up to 3.0 MB, an equal part for each of 2 keys (--cache-memory)\n" in err
    process = start("--cache-memory", "0", "--api-key", "one", "--api-key", "two")
    assert httpx.get(f"{address(process)}/v1/models").status_code == 401
    assert "\nno text is kept (--cache-memory)\n" in ended(process)[2]
    for memory, told in (("3MB", False), ("30KB", True)):
        process = start("-q", "--cache-memory", memory, "--api-key", "one", "--api-key", "two")
        assert address(process)
        _, _, err = ended(process)
        assert ("leaves a key 15.0 KB and a long text's state takes " in err) == told
        assert err.count("\n") == told
    process = start("--cache-memory", "some")
    assert process.wait(60) == 2
    assert process.stderr.read().endswith("give an amount such as 800MB or 1.5GB; 0 keeps none\n")


def test_what_was_read_is_there_after_a_restart_and_still_each_key_s_own(
    start: Start, tmp_path: Path
) -> None:
    place, text = tmp_path / "cache", "When the lamp was lit, the boats came in. " * 3

    def cached(url: str, key: str) -> int:
        body = {"prompt": text, "max_tokens": 2, "temperature": 0}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    arguments = ("--cache-dir", place, "--api-key", "one", "--api-key", "two")
    first = start(*arguments)
    assert cached(address(first), "one") == 0
    second = start(*arguments)
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out, err.count("\n")) == (2, "", 1)
    assert "is in use by another process" in err
    assert "\n0 states restored from" in "\n" + ended(first)[2]
    assert place.stat().st_mode & 0o777 == 0o700
    files = sorted(place.rglob("*.state"))
    assert len(files) == 2
    assert not [path for path in place.rglob("*") if "one" in path.name]
    files[0].write_bytes(b"spoilt")
    again = start(*arguments)
    url = address(again)
    assert (cached(url, "two"), cached(url, "one") > 0) == (0, True)
    err = ended(again)[2]
    assert "1 state restored from" in err
    assert "1 file there could not be used, such as " in err
    for wrong in (("--cache-dir", place, "--cache-memory", "0"), ("--cache-dir", files[1])):
        process = start(*wrong)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err.count("\n")) == (2, "", 1)


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
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert re.match(f"blt-edge: error: .*127.0.0.1:{port}: Address already in use", err)


@pytest.mark.parametrize(
    ("flag", "values", "words"),
    [
        ("--port", ["70000"], "not in the range"),
        ("--parallel", ["many"], "'many' is not a whole number"),
        ("--timeout", ["0"], "not in the range"),
        ("--parallel", ["0", "257"], "not in the range"),
        ("--max-body", ["plenty"], "got 'plenty'"),
        ("--api-key", ["a b", ""], "is empty or has characters"),
        ("--cors-origin", ["example.org"], "give a scheme and a host"),
        ("--draft-length", ["99"], "is 99; allowed is"),
        ("--host", ["no such host.", "a" * 300, "a..b"], "can't listen on http://"),
        ("--allow-host", ["example.org:80", "http://example.org"], "give a name"),
    ],
)
def test_wrong_values(refused, tiny_model, flag: str, values: list[str], words: str) -> None:
    for value in values:
        code = 1 if flag == "--host" else 2
        port = () if flag == "--port" else ("--port", 0)
        told = refused("serve", "-m", tiny_model.bundle, *port, flag, value, code=code)
        assert words in told
        assert flag in told or value[:9] in told


def test_idle_connections_beyond_what_files_there_are_for(start: Start) -> None:
    resource = pytest.importorskip("resource", reason="not of this system")
    process = start(
        "-q", code=f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); {MAIN}"
    )
    url = httpx.URL(address(process))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 200
    with ExitStack() as stack:
        for _ in range(160):
            stack.enter_context(socket.create_connection((url.host, url.port), timeout=30))
        for _ in range(3):
            assert (
                httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
            )
    code, out, err = ended(process)
    assert (code, out, err) == (0, "", "")
