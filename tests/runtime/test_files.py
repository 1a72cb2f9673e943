"""The ground that files stand on, where `tests/export/test_bundle.py` does not reach."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
from blt_edge import runtime
from blt_edge.runtime import files
from blt_edge.runtime.files import (
    OutputError,
    WriteError,
    new_directory,
    sync,
    termination_raises,
    uninterrupted,
    write_whole,
)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 120)
    write_whole(path, lambda to: to.write_text("one"))
    write_whole(path, lambda to: to.write_text("two"), lasting=True)
    assert path.read_text() == "two"

    def broken(to: Path) -> None:
        to.write_text("half")
        raise OSError(errno.ENOSPC, "full", str(to))

    with pytest.raises(OSError, match="full") as caught:
        write_whole(path, broken)
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="other") as caught:
        write_whole(path, lambda to: (_ for _ in ()).throw(OSError(5, "other", "elsewhere")))
    assert caught.value.filename == "elsewhere"
    assert (path.read_text(), list(tmp_path.iterdir())) == ("two", [path])


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, lambda to: to.write_bytes(b"x"))
    assert os.read(reader, 10) == b"x"
    os.close(reader)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_only_what_a_disk_says_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(number, "no")

    sync(tmp_path / "gone")
    monkeypatch.setattr(os, "fsync", refused)
    if number == errno.EIO:
        with pytest.raises(OSError, match="no"):
            sync(tmp_path)
    else:
        sync(tmp_path)


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, OutputError), (errno.ENOSPC, WriteError)])
def test_nothing_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(kind), new_directory(tmp_path / "out", "output out", "bundle"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_locks_leaves_what_a_crash_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".out.partial-999999-00000000"
    left.mkdir()
    monkeypatch.setattr(files, "fcntl", None)
    with new_directory(tmp_path / "out", "output out", "bundle") as directory:
        (directory / "x").write_text("x")
    assert sorted(tmp_path.iterdir()) == [left, tmp_path / "out"]


def test_what_is_in_use_or_unreadable_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".out.partial-1-00000000"  # process 1 lives
    left.mkdir()
    files.clear_abandoned(tmp_path / "out")
    files.clear_abandoned(tmp_path / "gone" / "out")
    assert left.exists()
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError))
    files.clear_abandoned(tmp_path / "out")
    assert left.exists()
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(ProcessLookupError))
    monkeypatch.setattr(files, "_claim", lambda _: (_ for _ in ()).throw(OSError))
    files.clear_abandoned(tmp_path / "out")
    monkeypatch.setattr(files, "_claim", lambda _: None)
    files.clear_abandoned(tmp_path / "out")
    assert left.exists()


def test_signals_around_work() -> None:
    """In a thread nothing is changed; somebody else's handler stays; a pending signal comes at the end."""
    ran: list[str] = []

    def elsewhere() -> None:
        with termination_raises(), uninterrupted():
            ran.append("thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGTERM, lambda *_: ran.append("theirs"))
    try:
        with termination_raises():
            signal.raise_signal(signal.SIGTERM)
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            ran.append("inside")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ran == ["thread", "theirs", "inside", "theirs"]
    ours = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)), termination_raises():
            terminate_twice()
    finally:
        signal.signal(signal.SIGTERM, ours)


def terminate_twice() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGTERM)  # ignored by now


def test_the_runtimes_names() -> None:
    assert set(runtime.__all__) <= set(dir(runtime))
    assert all(getattr(runtime, name) is not None for name in runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = runtime.nothing
