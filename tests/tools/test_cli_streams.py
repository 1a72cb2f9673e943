"""Signals, pipes and terminals: the program as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and terminals")

MAIN = "from blt_edge.tools.cli import main; main()"


def start(*arguments: object, code: str = MAIN, **options: object) -> subprocess.Popen[bytes]:
    """Start the program with its streams in pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def endless(bundle: Path) -> Sequence[object]:
    return ("generate", "-m", bundle, "-p", "Once upon a time", "-n", 480, "--threads", 1)


# The tiny model is fast: slowed down, it can be interrupted in the middle.
SLOW = (
    "import blt_edge.runtime.generation as g, time; before = g._reason_to_end\n"
    "g._reason_to_end = lambda *a: (time.sleep(0.02), before(*a))[1]\n" + MAIN
)


def test_interrupted_generation_keeps_its_text_and_tells_figures(tiny_model) -> None:
    process = start(*endless(tiny_model.bundle), code=SLOW)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 0 < len(first + out) < 480 * 3
    lines = err.decode().splitlines()
    assert lines[0] == ""
    assert lines[-1] == "blt-edge: interrupted"
    assert "; interrupted" in lines[1]
    assert b"Traceback" not in err


def test_interrupted_twice_is_over_at_once(tiny_model) -> None:
    stuck = SLOW.replace("0.02", "5 if a[2] == 4 else 0")
    process = start(*endless(tiny_model.bundle), "-q", code=stuck)
    process.stdout.read(1)
    time.sleep(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 4.5
    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == "blt-edge: interrupted"


def test_interrupted_export_leaves_nothing(tiny_model, tmp_path: Path) -> None:
    slow = (
        "import blt_edge.export.export as e, time\n"
        "def write(*a): print('writing tables', flush=True); time.sleep(60)\n"
        "e.write_tables = write\n" + MAIN
    )
    process = start("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", code=slow)
    assert process.stdout.readline() == b"writing tables\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == "blt-edge: interrupted"
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_interrupted_validation_keeps_the_bundle(tiny_model, tmp_path: Path) -> None:
    slow = (
        "import blt_edge.export.reference as r, time\n"
        "r.reference_available = lambda: True\n"
        "r.Reference.load = lambda folder: (print('loading', flush=True), time.sleep(60))\n" + MAIN
    )
    process = start("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", code=slow)
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    *_, note, last = err.decode().splitlines()
    assert "was written, but its validation did not end" in note
    assert last == "blt-edge: interrupted"
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_a_reader_that_leaves_ends_it_quietly(tiny_model) -> None:
    process = start(*endless(tiny_model.bundle), "-q", code=SLOW)
    process.stdout.read(4)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize("verb", [["inspect"], ["inspect", "--json", "-"], ["validate", "-q"]])
def test_a_reader_that_left_before(tiny_model, verb: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", MAIN, verb[0], str(tiny_model.bundle), *verb[1:]],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("closed", ["1", "2", "0", "1 2"])
@pytest.mark.parametrize("verb", ["generate", "score", "inspect", "--help", "nonsense"])
def test_closed_streams_are_no_crash(tiny_model, tmp_path: Path, verb: str, closed: str) -> None:
    (tmp_path / "text").write_text("some text")
    rest = {
        "generate": f"-m '{tiny_model.bundle}' -p x -n 3",
        "score": f"-m '{tiny_model.bundle}' '{tmp_path}/text'",
        "inspect": f"'{tiny_model.bundle}'",
    }.get(verb, "")
    closing = " ".join(f"{number}>&-" for number in closed.split())
    command = f"'{sys.executable}' -c '{MAIN}' {verb} {rest} {closing}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert done.returncode == (2 if verb == "nonsense" else 0)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


def terminal(
    arguments: Sequence[object], columns: int = 80, code: str = MAIN, interrupt_at: bytes | None = None
) -> tuple[int, str]:
    """Run in a pseudo-terminal; returns the exit code and all it got. Ctrl-C is typed at `interrupt_at`."""
    import fcntl
    import pty
    import struct
    import termios

    pid, descriptor = pty.fork()
    if pid == 0:
        os.environ.update(OMP_NUM_THREADS="1", TERM="xterm")
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-c", code, *map(str, arguments)])
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = b""
    try:
        while data := os.read(descriptor, 4096):
            shown += data
            if interrupt_at is not None and interrupt_at in shown:
                os.write(descriptor, b"\x03")
                interrupt_at = None
    except OSError:
        pass
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def plain(shown: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()


def test_tables_fit_a_terminal_of_80_columns(tiny_model, tmp_path: Path) -> None:
    (tmp_path / ("long-name" * 10)).write_text("some text")
    code, shown = terminal(["inspect", tiny_model.bundle])
    assert code == 0
    assert max(map(len, plain(shown))) <= 80
    code, shown = terminal(["score", "-q", "-m", tiny_model.bundle, tmp_path / ("long-name" * 10)])
    assert code == 0
    assert max(map(len, plain(shown))) <= 80
    golden = tiny_model.checkpoint / "golden.safetensors"
    code, shown = terminal(["validate", tiny_model.bundle, "--golden", golden, "-q"])
    assert code == 0
    assert max(map(len, plain(shown))) <= 80
    assert "greedy: equal bytes of 12" in shown


def test_progress_on_a_terminal_leaves_nothing_behind(tiny_model, tmp_path: Path) -> None:
    code, shown = terminal(["export", tiny_model.checkpoint, "-o", tmp_path / "bundle", "--no-validate"])
    assert code == 0
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0  # the cursor is back
    assert "\x1b[2K" in shown.rsplit("100%", 1)[-1]  # the bar's line is erased


def test_generated_text_on_a_terminal_ends_its_line(tiny_model) -> None:
    code, shown = terminal(["generate", "-m", tiny_model.bundle, "-p", "x", "-n", 5, "--echo", "-q"])
    assert code == 0
    assert shown.startswith("x")
    assert shown.endswith("\n")


def test_ctrl_c_on_a_terminal_leaves_it_clean(tiny_model, tmp_path: Path) -> None:
    slow = "import blt_edge.export.export as e, time; e.write_tables = lambda *a: time.sleep(60)\n" + MAIN
    arguments = ["export", tiny_model.checkpoint, "-o", tmp_path / "bundle"]
    code, shown = terminal(arguments, code=slow, interrupt_at=b"decoder graph \x1b")
    assert code == 1
    assert plain(shown)[-1] == "blt-edge: interrupted"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "missing", "code", "line"),
    [
        (
            "export",
            "onnx_ir",
            1,
            "error: this needs the package onnx_ir, which is not installed: pip install",
        ),
        ("generate", "onnxruntime", 1, "error: device 'cpu' needs ONNX Runtime, which is not installed"),
        ("validate", "onnx_ir", 0, "9 files have the right sha256"),
        ("inspect", "onnxruntime", 0, "patcher.onnx"),
    ],
)
def test_what_is_not_installed(
    tiny_model, tmp_path: Path, verb: str, missing: str, code: int, line: str
) -> None:
    arguments = {
        "export": [tiny_model.checkpoint, "-q", "-o", tmp_path / "bundle"],
        "generate": ["-m", tiny_model.bundle, "-p", "x", "-q"],
    }.get(verb, [tiny_model.bundle, "-q"])
    process = start(verb, *arguments, code=f"import sys; sys.modules[{missing!r}] = None\n{MAIN}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert line in (out if code == 0 else err).decode()
    assert err.count(b"\n") == (code != 0)
