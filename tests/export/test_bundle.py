import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export.bundle import finish, new_bundle
from blt_edge.runtime import full_disk
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.files import OutputError, WriteError
from blt_edge.runtime.integrity import check_files
from blt_edge.runtime.manifest import load_manifest

from ..support.bundles import describe, fill
from ..support.processes import HEEDING

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and locks")


def make(output: Path, *, then: Callable[[], object] = lambda: None, **options: Any) -> None:
    with new_bundle(output, **options) as directory:
        fill(directory)
        finish(directory, describe())
        then()


def fail(output: Path, failure: BaseException, **options: Any) -> None:
    """An export that fails on the way, with 50 bytes written."""
    with new_bundle(output, **options) as directory:
        (directory / "data").write_bytes(bytes(50))
        (directory / "folder").mkdir()
        raise failure


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class TestSuccess:
    def test_appears_whole_and_alone(self, tmp_path: Path) -> None:
        (tmp_path / "usual").mkdir()
        with new_bundle(tmp_path / "out") as directory:
            assert directory.parent == tmp_path
            fill(directory)
            finish(directory, describe())
            assert not (tmp_path / "out").exists()
        assert names(tmp_path) == ["out", "usual"]
        assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
        manifest = load_manifest(tmp_path / "out")
        check_files(tmp_path / "out", manifest, full=True)
        assert sorted([*manifest.files, "manifest.json"]) == names(tmp_path / "out")

    def test_text_and_relative_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with new_bundle("out/") as directory:
            fill(directory)
            finish(directory, describe())
        assert names(tmp_path) == ["out"]

    def test_finish_returns_what_it_wrote_and_reports(self, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        fill(tmp_path)
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        manifest = finish(tmp_path, describe(), lambda done, total: calls.append((done, total)))
        assert manifest == load_manifest(tmp_path)
        assert calls == sorted(calls)
        assert calls[-1] == (size, size)

    def test_finish_refuses_what_the_runtime_would(self, tmp_path: Path) -> None:
        fill(tmp_path)
        (tmp_path / "link").symlink_to("tables.bin")
        with pytest.raises(BundleError, match="is a link"):
            finish(tmp_path, describe())
        (tmp_path / "link").unlink()
        (tmp_path / "tables.bin").write_bytes(b"short")
        with pytest.raises(BundleError, match="for tables of this shape"):
            finish(tmp_path, describe())
        assert not (tmp_path / "manifest.json").exists()


class TestOutputPath:
    def refused(self, output: Path, match: str, force: bool = True) -> None:
        before = names(output.parent) if output.parent.is_dir() else []
        with pytest.raises(OutputError, match=match), new_bundle(output, force=force):
            pytest.fail("must be refused before anything is written")
        assert (names(output.parent) if output.parent.is_dir() else []) == before

    def test_existing_needs_force(self, tmp_path: Path) -> None:
        make(tmp_path / "out")
        self.refused(tmp_path / "out", "exists; give a new name, or --force", force=False)

    def test_empty_directory_needs_force_only(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        self.refused(tmp_path / "out", "exists", force=False)
        make(tmp_path / "out", force=True)
        load_manifest(tmp_path / "out")

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda path: path.write_text("x"), "is a file"),
            (lambda path: path.symlink_to("."), "is a link"),
            (lambda path: path.symlink_to("nothing"), "is a link"),
            *(
                (
                    lambda path, name=name, text=text: (path.mkdir(), (path / name).write_text(text)),
                    "not a bundle",
                )
                for name, text in [
                    ("thesis.tex", "years of work"),
                    ("manifest.json", '{"manifest_version": 3, "name": "extension"}'),
                    ("manifest.json", "{"),
                    ("manifest.json", "[]"),
                    ("manifest.json", ""),
                ]
            ),
        ],
    )
    def test_what_is_no_bundle_is_never_replaced(
        self, tmp_path: Path, make: Callable[[Path], object], match: str
    ) -> None:
        make(tmp_path / "out")
        before = sorted((path, path.lstat().st_ino) for path in tmp_path.rglob("*"))
        self.refused(tmp_path / "out", match)
        assert sorted((path, path.lstat().st_ino) for path in tmp_path.rglob("*")) == before

    def test_parent(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "no" / "out", "no does not exist; create it first")
        (tmp_path / "file").write_text("")
        self.refused(tmp_path / "file" / "out", "file is not a directory")

    def test_root_and_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for output in ("/", ".", ""):
            with pytest.raises(OutputError), new_bundle(output):
                pytest.fail("must be refused")

    def test_name_too_long(self, tmp_path: Path) -> None:
        self.refused(tmp_path / ("x" * 250), "nothing can be made in .*name too long")

    def test_appearing_meanwhile_is_not_replaced(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="exists"):
            make(tmp_path / "out", then=(tmp_path / "out").mkdir)
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out") == []


class TestForce:
    def test_replaces_at_the_end(self, tmp_path: Path) -> None:
        make(tmp_path / "out")
        (tmp_path / "out" / "old").write_text("")
        with new_bundle(tmp_path / "out", force=True) as directory:
            fill(directory)
            finish(directory, describe())
            assert (tmp_path / "out" / "old").exists()
        assert names(tmp_path) == ["out"]
        assert not (tmp_path / "out" / "old").exists()

    def test_a_damaged_or_newer_bundle_can_be_replaced(self, tmp_path: Path) -> None:
        make(tmp_path / "out")
        path = tmp_path / "out" / "manifest.json"
        path.write_text(path.read_text().replace('"schema": 1', '"schema": 7'))
        make(tmp_path / "out", force=True)
        load_manifest(tmp_path / "out")

    def test_failing_rename_puts_the_old_one_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make(tmp_path / "out")
        before = load_manifest(tmp_path / "out")
        rename = Path.rename

        def failing(self: Path, target: Path) -> Path:
            if ".partial-" in self.name:
                raise OSError(errno.EBUSY, "Device or resource busy")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(WriteError, match=r"busy.*what was there is unchanged"):
            make(tmp_path / "out", force=True)
        assert names(tmp_path) == ["out"]
        assert load_manifest(tmp_path / "out") == before


class TestFailures:
    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_leave_nothing_new(self, tmp_path: Path, failure: type[BaseException]) -> None:
        with pytest.raises(failure):
            fail(tmp_path / "out", failure())
        assert names(tmp_path) == []
        make(tmp_path / "out")
        before = load_manifest(tmp_path / "out")
        with pytest.raises(failure):
            fail(tmp_path / "out", failure(), force=True)
        assert names(tmp_path) == ["out"]
        assert load_manifest(tmp_path / "out") == before

    def test_other_os_errors_pass(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), new_bundle(tmp_path / "out"):
            (tmp_path / "missing").read_bytes()
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        ("number", "which"),
        [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "your quota on this disk is used up")],
    )
    def test_full_disk_is_one_line(self, tmp_path: Path, number: int, which: str) -> None:
        with pytest.raises(WriteError) as caught:
            fail(tmp_path / "out", OSError(number, "No space left on device"), needed=1234)
        message = str(caught.value)
        assert f"{which}; the bundle needs 1234 bytes, 50 bytes were written" in message
        assert ("were left" in message) == (number == errno.ENOSPC)
        assert "; free some space, or give an --output on another disk" in message
        assert "\n" not in message
        assert names(tmp_path) == []

    def test_full_while_hashing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="the disk is full"):
            make(tmp_path / "out")
        assert names(tmp_path) == []

    def test_too_little_space_is_seen_first(self, tmp_path: Path) -> None:
        needed = shutil.disk_usage(tmp_path).free * 2
        told = rf"the bundle needs {needed} bytes \(.*\), \d+ bytes \(.*\) are free"
        with pytest.raises(WriteError, match=told), new_bundle(tmp_path / "out", needed=needed):
            pytest.fail("must be refused")
        assert names(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a disk of 1 MiB")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


class TestRealDisks:
    def test_a_mount_point_is_refused_before_any_work(self, tiny_disk: Path) -> None:
        with pytest.raises(OutputError, match="is a mount point"), new_bundle(tiny_disk, force=True):
            pytest.fail("must be refused")

    @pytest.mark.parametrize(
        "write",
        [
            lambda path: path.write_bytes(bytes(2 << 20)),
            lambda path: np.zeros(2 << 20, np.uint8).tofile(path),  # which gives no error number
        ],
    )
    def test_full(self, tiny_disk: Path, write: Callable[[Path], object]) -> None:
        with (
            pytest.raises(WriteError, match=r"the disk is full; .* were written, \d+ bytes .*were left"),
            new_bundle(tiny_disk / "out") as directory,
        ):
            write(directory / "data")
        assert names(tiny_disk) == []
        assert shutil.disk_usage(tiny_disk).free == 1 << 20

    def test_hardly_enough_for_the_manifest(self, tiny_disk: Path) -> None:
        (tiny_disk / "other").write_bytes(bytes((1 << 20) - 60_000))
        with pytest.raises(WriteError, match="the disk is full"):
            make(tiny_disk / "out")
        assert names(tiny_disk) == ["other"]

    @posix
    @pytest.mark.parametrize(
        "write",
        [
            "(directory / 'data').write_bytes(bytes(1 << 20))",
            "numpy.zeros(1 << 20, numpy.uint8).tofile(directory / 'data')",  # which gives no error number
            "(directory / 'data').write_bytes(bytes(100_000)); raise ValueError('an engine failed')",
        ],
    )
    def test_file_size_limit(self, tmp_path: Path, write: str) -> None:
        code = f"""
            import numpy, resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            with new_bundle(sys.argv[1]) as directory:
                {write}
        """
        process = run_python(code, tmp_path / "out")
        _, errors = process.communicate(timeout=60)
        assert "WriteError: output" in errors
        assert "`ulimit -f` allows; raise the limit, or give an --output on another disk" in errors
        assert names(tmp_path) == []


def run_python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    lines = ["import signal, sys, time", "from blt_edge.export.bundle import new_bundle"]
    lines += [line.removeprefix(" " * 12) for line in code.splitlines()]
    command = [sys.executable, "-c", "\n".join(lines), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, **HEEDING)


WAITING = """
            with new_bundle(sys.argv[1]) as directory:
                (directory / "data").write_bytes(bytes(1000))
                print("ready", flush=True)
                time.sleep(60)
"""


def waiting(output: Path) -> "subprocess.Popen[str]":
    process = run_python(WAITING, output)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@posix
class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    @pytest.mark.parametrize("times", [1, 20])
    def test_leave_nothing(self, tmp_path: Path, number: signal.Signals, times: int) -> None:
        process = waiting(tmp_path / "out")
        assert len(names(tmp_path)) == 1
        for _ in range(times):
            process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == (-number if number is signal.SIGINT else 128 + number) or times > 1
        assert names(tmp_path) == []

    def test_killed_one_is_cleared_by_the_next(self, tmp_path: Path) -> None:
        process = waiting(tmp_path / "out")
        process.kill()
        process.communicate(timeout=60)
        assert len(names(tmp_path)) == 1
        make(tmp_path / "out")
        assert names(tmp_path) == ["out"]

    def test_running_one_is_left_alone(self, tmp_path: Path) -> None:
        process = waiting(tmp_path / "out")
        running = names(tmp_path)
        make(tmp_path / "out")
        assert names(tmp_path) == sorted([*running, "out"])
        process.terminate()
        process.communicate(timeout=60)
        assert names(tmp_path) == ["out"]

    def test_handlers_are_as_before(self, tmp_path: Path) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.getsignal(number) for number in numbers]
        make(tmp_path / "out")
        assert [signal.getsignal(number) for number in numbers] == before

    def test_interrupt_while_publishing_waits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make(tmp_path / "out")
        rename = Path.rename

        def interrupted(self: Path, target: Path) -> Path:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", interrupted)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / "out", force=True)
        finally:
            signal.signal(signal.SIGINT, before)
        assert names(tmp_path) == ["out"]
        check_files(tmp_path / "out", load_manifest(tmp_path / "out"), full=True)


@posix
class TestLeftovers:
    def leftover(self, tmp_path: Path, kind: str, pid: int, name: str = "out") -> Path:
        path = tmp_path / f".{name}.{kind}-{pid}-0123abcd"
        path.mkdir()
        (path / "data").write_text("x")
        return path

    def test_of_dead_processes_are_removed(self, tmp_path: Path, dead_pid: int) -> None:
        self.leftover(tmp_path, "partial", dead_pid)
        with pytest.raises(ValueError, match="x"):
            fail(tmp_path / "out", ValueError("x"))
        assert names(tmp_path) == []
        self.leftover(tmp_path, "partial", dead_pid)
        make(tmp_path / "out")
        self.leftover(tmp_path, "replaced", dead_pid)
        make(tmp_path / "out", force=True)
        assert names(tmp_path) == ["out"]

    @pytest.mark.parametrize("pid", [os.getpid(), os.getppid(), 1], ids=["own", "parent", "init"])
    def test_of_dead_processes_whose_number_lives_again(self, tmp_path: Path, pid: int) -> None:
        """In a container the number is the same each time, often 1."""
        self.leftover(tmp_path, "partial", pid)
        make(tmp_path / "out")
        assert names(tmp_path) == ["out"]

    def test_locked_by_a_process_we_cannot_see_stay(self, tmp_path: Path, dead_pid: int) -> None:
        import fcntl

        path = self.leftover(tmp_path, "partial", dead_pid)
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        make(tmp_path / "out")
        os.close(descriptor)
        assert path.exists()

    def test_of_other_outputs_and_names_stay(self, tmp_path: Path, dead_pid: int) -> None:
        kept = [
            self.leftover(tmp_path, "partial", dead_pid, name="other"),
            self.leftover(tmp_path, "copy", dead_pid),
        ]
        (tmp_path / "precious").mkdir()
        link = tmp_path / f".out.partial-{dead_pid}-00000000"
        link.symlink_to("precious")
        file = tmp_path / f".out.partial-{dead_pid}-00000001"  # as a file that was being written is left
        file.write_text("")
        make(tmp_path / "out")
        for path in [*kept, link, tmp_path / "precious"]:
            assert os.path.lexists(path)
        assert not file.exists()

    def test_an_old_bundle_lost_between_renames_comes_back(self, tmp_path: Path, dead_pid: int) -> None:
        make(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f".out.replaced-{dead_pid}-0123abcd")
        self.leftover(tmp_path, "partial", dead_pid)
        with pytest.raises(OutputError, match="exists"):
            make(tmp_path / "out")
        assert names(tmp_path) == ["out"]
        load_manifest(tmp_path / "out")


def test_sizes_are_readable() -> None:
    assert full_disk._shown(999) == "999 bytes"
    assert full_disk._shown(1_500_000) == "1500000 bytes (1.5 MB)"
    assert full_disk._shown(9_300_000_000) == "9300000000 bytes (9.3 GB)"
