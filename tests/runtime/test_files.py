"""The ground that files stand on, where `tests/export/test_bundle.py` does not reach."""

from __future__ import annotations

import errno
import os
import shutil
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


@pytest.mark.parametrize(
    ("free", "limit", "told"),
    [
        (2**40, 10**6, "larger than the file system or `ulimit -f` allows"),
        (2**40, -1, "your quota"),
        (2**21, -1, "the disk is full"),
    ],
)
def test_a_write_cut_short_is_explained_when_its_file_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, limit: int, told: str
) -> None:
    """What numpy says, of a file that onnx_ir removed before it passed the error on."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    usage = shutil.disk_usage(tmp_path)

    def write() -> None:
        with new_directory(tmp_path / "out", "output out", "bundle", needed=2**22):
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
            raise OSError("344064 requested and 288768 written")

    with pytest.raises(WriteError, match=told):
        write()


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
    output = tmp_path / "out"
    with files.scratch(output, "partial") as used, new_directory(output, "output out", "bundle") as made:
        files.clear_abandoned(output)
        files.clear_abandoned(tmp_path / "gone" / "out")
        assert used.exists()
        assert made.exists()
    left = tmp_path / ".out.partial-1-00000000"
    left.mkdir()
    for refuse in (lambda _: (_ for _ in ()).throw(OSError), lambda _: None):
        monkeypatch.setattr(files, "claim", refuse)
        files.clear_abandoned(output)
        assert left.exists()


def test_a_directory_cleared_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between being made and being locked it looks abandoned."""
    claim, cleared = files.claim, []

    def clear_first(directory: Path) -> int | None:
        if len(cleared) < 2:
            cleared.append(directory)
            lock = claim(directory)
            assert lock is not None
            directory.rmdir()
            if len(cleared) == 1:
                return lock
            os.close(lock)
        return claim(directory)

    monkeypatch.setattr(files, "claim", clear_first)
    with files.scratch(tmp_path / "out", "partial") as made:
        assert made.is_dir()
        assert made not in cleared
    assert len(cleared) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_old_one_on_its_way_out_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    rename = Path.rename

    def between(path: Path, target: Path) -> Path:
        if path.name.startswith(".out.partial"):
            files.clear_abandoned(output)  # another process
            assert not output.exists()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", between)
    with new_directory(output, "output out", "bundle") as made:
        (made / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_what_cannot_be_exchanged_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a b"
    files.check_replaceable(output, "output")
    output.mkdir()
    files.check_replaceable(output, "output")
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(
        b"1 1 8:1 /x / rw - ext4 /dev/x rw\n2 1 8:1 /y %s/a\\040b rw - ext4\n" % bytes(tmp_path)
    )
    monkeypatch.setattr(files, "_MOUNTS", mounts)
    with pytest.raises(OutputError, match=r"is a mount point.*inside it"):
        files.check_replaceable(output, "output")
    monkeypatch.setattr(files, "_MOUNTS", tmp_path / "none")
    tmp_path.chmod(0o1777)
    files.check_replaceable(output, "output")
    monkeypatch.setattr(os, "geteuid", lambda: 12345, raising=False)
    with pytest.raises(OutputError, match="another user"):
        files.check_replaceable(output, "output")


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
