"""Signals, pipes and terminals: the program as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime.integrity import file_record
from support.bundles import seal
from support.chat import MAIN, SLOW, posix, start

pytestmark = posix


def endless(bundle: Path) -> Sequence[object]:
    return ("generate", "-m", bundle, "-p", "Once upon a time", "-n", 480, "--threads", 1)


def ended(process: Any) -> tuple[int, list[str]]:
    """The exit code, and the lines on stderr."""
    err = process.communicate(timeout=60)[1].decode()
    assert "Traceback" not in err
    return process.returncode, err.splitlines()


def test_interrupted_generation_keeps_its_text_and_tells_figures(tiny_model) -> None:
    process = start(*endless(tiny_model.bundle), code=SLOW)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 0 < len(first + out) < 480 * 3
    assert re.fullmatch(r"\n.*; interrupted(?s:.*)\nblt-edge: interrupted\n", err.decode())


def test_interrupted_twice_is_over_at_once(tiny_model) -> None:
    stuck = SLOW.replace("0.02", "5 if a[0]._new_bytes == 4 else 0")
    process = start(*endless(tiny_model.bundle), "-q", code=stuck)
    process.stdout.read(1)
    time.sleep(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    code, lines = ended(process)
    assert time.monotonic() - started < 4.5
    assert (code, lines[-1]) == (1, "blt-edge: interrupted")


def test_interrupted_validation_keeps_the_bundle(tiny_model, tmp_path: Path) -> None:
    slow = (
        "import blt_edge.export.reference as r, time\nr.reference_available = lambda: True\n"
        "r.Reference.load = lambda folder: (print('now', flush=True), time.sleep(60))\n"
    )
    process = start("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", code=slow + MAIN)
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGINT)
    code, lines = ended(process)
    assert (code, lines[-1]) == (1, "blt-edge: interrupted")
    assert "was written, but its validation did not end" in lines[-2]
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_a_reader_that_leaves_ends_it_quietly(tiny_model) -> None:
    process = start(*endless(tiny_model.bundle), "-q", code=SLOW)
    process.stdout.read(4)
    process.stdout.close()
    process.stdout = None
    assert ended(process) == (1, [])


@pytest.mark.parametrize("verb", [["inspect"], ["inspect", "--json", "-"], ["validate", "-q"]])
def test_a_reader_that_left_before(tiny_model, verb: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", MAIN, verb[0], str(tiny_model.bundle), *verb[1:]]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
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


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
@pytest.mark.parametrize("verb", ["generate", "chat", "patches"])
def test_text_in_a_pipe_is_its_bytes_whatever_the_locale(tiny_model, verb: str, encoding: str) -> None:
    text = "早い café \u202e🐇".encode() + b"\xff|\x1b[0m"
    rest = {
        "generate": ["-n", 0, "--echo", "-p", text],
        "chat": ["-n", 0, "-p", text],
        "patches": [text[:-6]],
    }
    environment = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    process = start(verb, "-q", "-m", tiny_model.bundle, *rest[verb], env=environment, stdin=subprocess.PIPE)
    out, err = process.communicate(b"/text\n", timeout=60)
    assert (process.returncode, err) == (0, b"")
    if verb == "patches":
        assert "早" in out.decode()
    else:
        assert out.removesuffix(b"\n") == text


def test_a_table_on_stderr_is_utf8_whatever_the_locale(tiny_model, tmp_path: Path) -> None:
    flags = ("-o", tmp_path / "早い\u202e", "--precision", "fp16", "--no-validate")
    process = start("quantize", tiny_model.bundle, *flags, env={"PYTHONIOENCODING": "cp1252"})
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0
    assert "\u2500" * 20 in err
    assert "早い\\u202e" in err


EVIL = "x\x1b[2J\x1b[32m\nall checks passed\u202e"


def rename_and_break(bundle: Path) -> None:
    """Give every node of the decoder an evil name, and let one fail when it runs: an index out of range."""
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'blt-edge[export]'")
    make = onnx.helper.make_node
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "right"
    broken = [
        make("Shape", ["right"], ["shape"]),
        make("ReduceProd", ["shape"], ["beyond"]),
        make("Gather", ["right", "beyond"], ["gathered"], axis=2),
        make("Add", ["right", "gathered"], ["logits"]),
    ]
    model.graph.node.extend(broken)
    for number, node in enumerate(model.graph.node):
        node.name = f"{EVIL}{number}"
    onnx.save(model, bundle / "decoder.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["decoder.onnx"] = asdict(file_record(bundle / "decoder.onnx"))
    seal(bundle, manifest)


@pytest.mark.parametrize("verb", ["generate -p x -m", "validate --reference {}", "build"])
def test_names_inside_a_graph_reach_no_terminal(own_bundle: Path, tiny_model, verb: str) -> None:
    rename_and_break(own_bundle)
    process = start(*verb.replace("{}", str(tiny_model.checkpoint)).split(), own_bundle)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, b"")
    assert b"Name:'x\\x1b[2J\\x1b[32m" in err.splitlines()[-1]
    assert b"\x1b" not in err
    assert not [line for line in err.splitlines() if line.startswith(b"all checks passed")]


@pytest.fixture
def terminal() -> Any:
    """`terminal("inspect", bundle, ...)`: the program on a terminal of 80 columns."""
    from support.terminal import Terminal  # POSIX only

    def run(*arguments: object, code: str = MAIN) -> Terminal:
        return Terminal(code, arguments, {"OMP_NUM_THREADS": "1", "TERM": "xterm"})

    return run


def test_tables_fit_a_terminal_of_80_columns(terminal, tiny_model, own_bundle: Path, tmp_path: Path) -> None:
    named = tmp_path / ("long-name" * 10)
    named.write_text("some text")
    golden = tiny_model.checkpoint / "golden.safetensors"
    for arguments, told in (
        (["inspect", tiny_model.bundle], "patcher"),
        (["score", "-q", "-m", tiny_model.bundle, named], "bits/byte"),
        (["validate", own_bundle, "-q", "--golden", golden], "greedy: equal bytes of 12"),
    ):
        shell = terminal(*arguments)
        assert shell.end() == 0
        assert max(map(len, shell.shown.splitlines())) <= 80
        assert told in shell.shown


def cursor_is_back(shell: Any) -> bool:
    return shell.raw.count("\x1b[?25l") == shell.raw.count("\x1b[?25h") > 0


def test_progress_on_a_terminal_leaves_nothing_behind(terminal, tiny_model, tmp_path: Path) -> None:
    shell = terminal("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", "--no-validate")
    assert shell.end() == 0
    assert cursor_is_back(shell)
    assert "\x1b[2K" in shell.raw.rsplit("100%", 1)[-1]  # the bar's line is erased


def test_generated_text_on_a_terminal_ends_its_line(terminal, tiny_model) -> None:
    shell = terminal("generate", "-m", tiny_model.bundle, "-p", "x", "-n", 5, "--echo", "-q")
    assert shell.end() == 0
    assert re.fullmatch(r"(?s)x.*\n", shell.shown)


def test_ctrl_c_on_a_terminal_leaves_it_clean(terminal, tiny_model, tmp_path: Path) -> None:
    slow = "import blt_edge.export.export as e, time; e.write_tables = lambda *a: time.sleep(60)\n" + MAIN
    shell = terminal("export", tiny_model.checkpoint, "-o", tmp_path / "bundle", code=slow)
    shell.wait_for("decoder graph")
    shell.type("\x03")
    assert shell.end() == 1
    assert shell.shown.endswith("blt-edge: interrupted\n")
    assert cursor_is_back(shell)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "missing", "code", "line"),
    [
        ("export", "onnx_ir", 1, "error: .*onnx_ir, which is not installed: pip install"),
        ("generate", "onnxruntime", 1, "error: .*ONNX Runtime, which is not installed"),
        ("validate", "onnx_ir", 0, "9 files have the right sha256"),
        ("inspect", "onnxruntime", 0, "patcher.onnx"),
    ],
)
def test_what_is_not_installed(tiny_model, tmp_path: Path, verb, missing, code: int, line: str) -> None:
    arguments = {
        "export": [tiny_model.checkpoint, "-q", "-o", tmp_path / "bundle"],
        "generate": ["-m", tiny_model.bundle, "-p", "x", "-q"],
    }.get(verb, [tiny_model.bundle, "-q"])
    process = start(verb, *arguments, code=f"import sys; sys.modules[{missing!r}] = None\n{MAIN}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.search(line, (out if code == 0 else err).decode())
    assert err.count(b"\n") == (code != 0)
