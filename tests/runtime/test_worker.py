"""One process for many calls: what hangs, crashes or takes too much costs the process, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import worker as module
from blt_edge.runtime.errors import BltError, BltWarning, OptionError
from blt_edge.runtime.worker import Worker, WorkerBusyError, WorkerDiedError, WorkerError, WorkerTimeoutError

FUNCTIONS = '''
import ctypes, os, re, resource, sys, time, warnings
from blt_edge.runtime.errors import BltError, BltWarning, OptionError

def run(body):
    """Each request is the body of a function."""
    names = dict(globals())
    exec("def work():\\n" + "".join(f"    {line}\\n" for line in body.splitlines()), names)
    return names["work"]()
'''
PARENT = """
import sys, threading
from blt_edge.runtime.worker import Worker
worker = Worker("hostile_functions:run", memory=1 << 28)
print(worker.ask("return os.getpid()", 30), flush=True)
threading.Thread(target=worker.ask, args=(sys.argv[1], 1.0), daemon=True).start()
print("asked", flush=True)
threading.Event().wait()
"""
# Holds the interpreter, so that no other thread of it runs.
HANG = "re.match('(a+)+$', 'a' * 60 + 'b')"


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_functions.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("hostile_functions:run", memory=64 << 20, largest=1 << 20)
    yield made
    made.close()


def gone(number: int) -> bool:
    try:
        os.kill(number, 0)
        state = Path(f"/proc/{number}/stat")
        return state.exists() and state.read_text().split()[2] == "Z"
    except ProcessLookupError:
        return True


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_one_process_answers_all_calls(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    number = worker.ask("print('noise'); os.write(2, b'more'); return os.getpid()", 30)
    assert number != os.getpid()
    assert worker.ask("return [os.getpid(), None, 'ü\\n', {'a': 0.5}]", 30) == [
        number,
        None,
        "ü\n",
        {"a": 0.5},
    ]
    with pytest.warns(BltWarning, match="^ours$"):
        assert worker.ask("warnings.warn('ours', BltWarning)", 30) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        ("BltError('broken')", BltError, "broken"),
        ("OptionError('threads')", OptionError, "threads"),
        ("FileNotFoundError(2, 'No such file', 'none/x')", FileNotFoundError, "none/x"),
    ],
)
def test_foreseen_errors_cost_no_process(
    worker: Worker, raised: str, kind: type[Exception], text: str
) -> None:
    number = worker.ask("return os.getpid()", 30)
    with pytest.raises(kind, match=text) as caught:
        worker.ask(f"raise {raised}", 30)
    assert type(caught.value) is kind
    assert worker.ask("return os.getpid()", 30) == number


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("os.kill(os.getpid(), 11)", r"^crashed \(SIGSEGV\)$"),
        ("ctypes.string_at(0)", "^crashed"),
        ("os._exit(7)", "^ended early with code 7$"),
        ("raise ValueError('of a library')", "^ended early with code 1: ValueError: of a library$"),
        (
            "class Panic(BaseException): pass\nraise Panic('of Rust')",
            "ended early with code 1: .*Panic: of Rust$",
        ),
        ("return {1, 2}", "^ended early with code 1: TypeError: "),
        ("raise MemoryError", "^takes more than the 64 MiB of memory that it may take$"),
        (
            "os.write(2, b'memory allocation of 99 bytes failed'); os.abort()",
            "^takes more than the 64 MiB of memory that it may take$",
        ),
        ("return 'x' * (2 << 20)", "^gives an answer of more than 1048576 bytes$"),
        (
            "while True: os.write(2, b'x' * 65536)",
            r"^ended early with code 1: OSError: \[Errno 27\]|File too large",
        ),
    ],
)
def test_what_dies_is_told_and_replaced(worker: Worker, body: str, told: str) -> None:
    number = worker.ask("return os.getpid()", 30)
    with pytest.raises((WorkerDiedError, OSError), match=told) as caught:
        worker.ask(body, 30)
    if isinstance(caught.value, WorkerDiedError):
        assert worker.ask("return os.getpid()", 30) != number
        wait_until(lambda: gone(number))


@pytest.mark.parametrize("body", ["time.sleep(60)", HANG])
def test_what_hangs_is_killed_and_replaced(worker: Worker, body: str) -> None:
    number = worker.ask("return os.getpid()", 30)
    with pytest.raises(WorkerTimeoutError, match=r"^takes more than 0.1 s$"):
        worker.ask(body, 0.1)
    assert gone(number)
    assert worker.ask("return os.getpid()", 30) != number


def test_memory_is_bounded_beyond_what_it_begins_with(worker: Worker) -> None:
    if worker.ask("return resource.getrlimit(resource.RLIMIT_AS)[0]", 30) == -1:
        pytest.skip("this system bounds no address space")
    assert worker.ask("return len(bytearray(32 << 20))", 30) == 32 << 20
    with pytest.raises(WorkerDiedError, match="takes more than the 64 MiB"):
        worker.ask("return len(bytearray(80 << 20))", 30)
    # Where a library does not ask whether it got any.
    with pytest.raises(WorkerError):
        worker.ask("kept = []\nwhile True: kept.append(bytes(1 << 20))", 30)
    assert worker.ask("return 1", 30) == 1


def test_one_that_died_between_calls_is_replaced(worker: Worker) -> None:
    number = worker.ask("return os.getpid()", 30)
    os.kill(number, signal.SIGKILL)
    assert worker._process is not None
    wait_until(lambda: not worker._process.running)  # gone is not enough: its other threads may be there yet
    assert worker.ask("return os.getpid()", 30) != number


def test_threads_take_turns_and_get_their_own_answers(worker: Worker) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: worker.ask(f"return [{number}, os.getpid()]", 30), range(200)))
    assert [number for number, _ in answers] == list(range(200))
    assert len({process for _, process in answers}) == 1


def test_who_waits_too_long_for_others_is_told(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE_PATIENCE", 0.1)
    worker.ask("return 1", 30)
    go_on, other = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0], "go_on"), []
    body = f"while not os.path.exists({str(go_on)!r}): time.sleep(0.01)\nreturn 'at last'"
    thread = threading.Thread(target=lambda: other.append(worker.ask(body, 60)))
    thread.start()
    wait_until(worker._lock.locked)
    with pytest.raises(WorkerBusyError, match="busy with others' calls that take long; try again later"):
        worker.ask("return 2", 0.1)
    go_on.touch()
    thread.join(60)
    assert other == ["at last"]


def test_an_interrupted_call_leaves_no_answer_to_the_next(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.ask("return 1", 30)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module.ChildProcess, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.ask("return 2", 30)
    assert worker.ask("return 3", 30) == 3


def test_what_can_not_start_says_why() -> None:
    with pytest.raises(
        WorkerDiedError, match="ended early with code 1: ModuleNotFoundError: No module named 'no"
    ):
        Worker("none_of_this:run", memory=1 << 20).ask(1, 30)
    with pytest.raises(WorkerDiedError, match=r"ended early with code 1: AttributeError: .*'runs'"):
        Worker("hostile_functions:runs", memory=1 << 26).ask(1, 30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_has_a_process_of_its_own(worker: Worker, tmp_path: Path) -> None:
    number = worker.ask("return os.getpid()", 30)
    child = os.fork()
    if child == 0:
        try:
            (tmp_path / "other").write_text(str(worker.ask("return os.getpid()", 30)))
            worker.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert int((tmp_path / "other").read_text()) not in (number, 0)
    assert worker.ask("return os.getpid()", 30) == number


@pytest.mark.parametrize("body", ["time.sleep(600)", HANG])
def test_it_ends_with_its_parent(body: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, body], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    assert parent.stdout.readline() == "asked\n"
    time.sleep(0.05)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: gone(number))


def test_it_ends_with_its_last_user_and_at_the_end_of_the_program() -> None:
    made = Worker("hostile_functions:run", memory=1 << 28)
    number = made.ask("return os.getpid()", 30)
    del made
    assert gone(number)
    program = PARENT.partition("threading.Thread")[0]
    ended = subprocess.run(
        [sys.executable, "-Werror", "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
    wait_until(lambda: gone(int(ended.stdout)))


def test_nothing_heavy_is_imported_and_nothing_from_the_current_folder(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(hostile)
    if sys.version_info >= (3, 11):
        assert {"numpy", "subprocess", "tempfile"}.isdisjoint(worker.ask("return list(sys.modules)", 30))
