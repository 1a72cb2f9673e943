"""A function in a process of its own: results, events, errors and deaths come through."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blt_edge.runtime import child_main as module
from blt_edge.runtime.child import _SERVE, ChildProcess, Outcome, run_child
from blt_edge.runtime.errors import BltError, BltWarning, OptionError


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """child(body, **request): how a process ends whose `work` has this body."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def run(body: str, listen: Any = None, patience: float | None = None, **request: Any) -> Outcome:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "some_work.py").write_text(
            "import os, sys, time\n"
            "from blt_edge.runtime.errors import BltError, OptionError\n"
            f"def work(request, tell):\n{lines}"
        )
        return run_child("some_work", request, listen, patience=patience, folder=tmp_path)

    return run


def test_result_and_events(child: Any, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[dict[str, Any]] = []
    outcome = child(
        "print('noise')\ntell({'at': 1})\ntell({'at': 2})\nreturn request", told.append, a=[1, "x"]
    )
    assert outcome.result == {"a": [1, "x"]}
    assert (outcome.error, outcome.death, told) == (None, None, [{"at": 1}, {"at": 2}])
    assert outcome.log == "noise\n"
    assert capfd.readouterr() == ("", "")


def test_our_warnings_are_given_again(child: Any) -> None:
    body = (
        "import warnings\nfrom blt_edge.runtime import BltWarning\n"
        "warnings.warn('an engine', BltWarning)\nwarnings.warn('a library', UserWarning)\nreturn {}"
    )
    with pytest.warns(BltWarning, match="^an engine$") as caught:
        outcome = child(body)
    assert (len(caught), outcome.result) == (1, {})
    assert "UserWarning: a library" in outcome.log
    assert "an engine\n" not in outcome.log


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        ("BltError('broken')", BltError, "broken"),
        ("OptionError('threads')", OptionError, "threads"),
        ("MemoryError()", MemoryError, ""),
        ("FileNotFoundError(2, 'No such file', 'none/x')", FileNotFoundError, "none/x"),
    ],
)
def test_foreseen_errors(child: Any, raised: str, kind: type[Exception], text: str) -> None:
    outcome = child(f"raise {raised}")
    assert type(outcome.error) is kind
    assert text in str(outcome.error)


@pytest.mark.parametrize(
    ("body", "death"),
    [
        ("os.kill(os.getpid(), 9)", "was killed, most likely because memory ran out"),
        ("os.write(2, b'bad driver\\n'); os.kill(os.getpid(), 11)", "crashed (SIGSEGV)"),
        ("raise ImportError('no such library')", "ended early with code 1: ImportError: no such library"),
        ("os._exit(7)", "ended early with code 7"),
        ("os.write(2, b'memory allocation of 99 bytes failed'); os.abort()", "ran out of memory"),
    ],
)
def test_deaths(child: Any, body: str, death: str) -> None:
    assert child(body).death == death


def test_a_hang_ends(child: Any) -> None:
    started = time.monotonic()
    assert child("time.sleep(60)", patience=2.0).death == "gave no answer within 2 s"
    assert time.monotonic() - started < 30


def test_what_the_listener_raises_ends_the_child(child: Any) -> None:
    def stop(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child("tell({})\ntime.sleep(60)", stop)


def test_the_folder_is_not_imported_from(child: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(hostile)
    assert run_child("some_work", {}, folder=hostile).death != "ended early with code 3"


def test_nor_where_python_has_no_variable_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-c", _SERVE, "serve_many", "blt_edge.runtime.errors:first_line", "1000000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=tmp_path, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b'{"result": null}\n'


def test_what_is_gone_takes_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")  # as Windows says it

    with ChildProcess(["serve_once", "some_work"]) as process:
        with monkeypatch.context() as patched:
            patched.setattr(process, "_requests", SimpleNamespace(write=broken))
            process.send({})
        process._process.kill()
        process.send({})
        assert process.receive() is None


class Ended(BaseException):
    """In the place of the end of the process."""


@pytest.mark.parametrize(
    ("body", "last"),
    [
        ("return {'found': 1}", {"result": {"found": 1}}),
        ("raise BltError('broken')", {"error": {"kind": "run", "message": "broken"}}),
        ("raise OptionError('threads')", {"error": {"kind": "usage", "message": "threads"}}),
        ("raise MemoryError", {"error": {"kind": "memory", "message": ""}}),
        ("raise OSError(2, 'gone', 'x')", {"error": {"kind": "system", "arguments": [2, "gone", "x"]}}),
    ],
)
def test_the_childs_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, last: Any) -> None:
    """The same in this process, with what would end it or take its descriptors replaced."""

    def end(code: int) -> None:
        raise Ended(code)

    (tmp_path / "own_work.py").write_text(
        "from blt_edge.runtime.errors import BltError, OptionError\n"
        f"def work(request, tell):\n    tell(request)\n    {body}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_work", raising=False)
    messages = tmp_path / "messages"
    coming = iter([b'{"a"', b": 1}\n", b""])
    monkeypatch.setattr(module.os, "dup", lambda _: os.open(messages, os.O_WRONLY | os.O_CREAT))
    monkeypatch.setattr(module.os, "dup2", lambda *_: None)
    monkeypatch.setattr(module.os, "read", lambda *_: next(coming))
    monkeypatch.setattr(module.os, "_exit", end)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module.threading, "Thread", AtOnce)
    monkeypatch.setattr(module.warnings, "showwarning", module.warnings.showwarning)  # back afterwards
    with pytest.raises(Ended, match="0"):
        module.serve_once("own_work")
    assert [json.loads(line) for line in messages.read_text().splitlines()] == [{"event": {"a": 1}}, last]


class AtOnce:
    """A thread that has run when it was started; it ends the process with the code for orphans."""

    def __init__(self, target: Callable[[], None], **_: Any) -> None:
        self._target = target

    def start(self) -> None:
        with pytest.raises(Ended, match="3"):
            self._target()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory that is a file")
def test_a_place_to_write_is_not_needed(child: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert child("print('noise', file=sys.stderr)\nreturn request", a=1) == Outcome({"a": 1}, log="noise\n")
