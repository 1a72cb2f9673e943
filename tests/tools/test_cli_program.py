"""The program around the verbs: help, exit codes, and what becomes of errors."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from blt_edge.runtime.errors import BltError, BundleError, OptionError, PromptTooLongError
from blt_edge.tools.cli import inspect as inspect_verb
from blt_edge.tools.cli.program import VERBS, program
from click.testing import Result

HEAVY = (
    *("numpy", "rich", "onnxruntime", "torch", "onnx", "onnx_ir", "onnxscript", "transformers"),
    *("safetensors", "starlette", "uvicorn"),
)
HELPS = [["--help"], ["--version"], [], *([verb, "--help"] for verb in VERBS)]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from blt_edge.tools.cli import main
try:
    main({arguments!r})
except SystemExit as left:
    assert left.code == {0 if arguments else 2}, left.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_help_is_fast() -> None:
    """Well under 0.3 s on a quiet machine; the best of five, as this one may be busy."""
    script = Path(sys.executable).with_name("blt-edge")
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([script, "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.6


@pytest.mark.parametrize("name", VERBS)
def test_verb_says_in_help_what_the_table_says(name: str) -> None:
    command = program.get_command(click.Context(program), name)
    assert command is not None
    assert command.get_short_help_str(200).rstrip(".") == VERBS[name].rstrip(".")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert not any("_" in flag for flag in parameter.opts)


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_every_default(cli, name: str) -> None:
    command = program.get_command(click.Context(program), name)
    assert command is not None
    shown = cli(name, "--help").stdout
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.is_flag and not parameter.required:
            text = parameter.name in ("prompt", "prompt_file", "stop", "json_file", "output")
            assert text or parameter.name in ("reference", "golden") or parameter.show_default, parameter.name
    assert "Usage: blt-edge" in shown


def test_version(cli) -> None:
    result = cli("--version")
    assert result.stdout == f"blt-edge {importlib.metadata.version('blt-edge')}\n"
    assert result.exit_code == 0


def test_no_verb_shows_the_help_and_is_wrong_usage(cli) -> None:
    result = cli()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Verbs:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["exprt"], "there is no verb 'exprt'; did you mean export?"),
        (["\x1b[31m"], "there is no verb '\\x1b[31m'; the verbs are export, validate,"),
        (["--hlep"], "there is no option --hlep; did you mean --help?"),
        (["generate"], "--model is missing; see blt-edge generate --help"),
        (["inspect"], "BUNDLE is missing; see blt-edge inspect --help"),
        (["inspect", "a", "b"], "BUNDLE: a does not exist"),
        (["generate", "--temprature", "1"], "did you mean --temperature or --temp?"),
        (["generate", "--top-k", "many"], "--top-k: 'many' is not a valid integer"),
        (["generate", "--top-k"], "option '--top-k' requires an argument; see blt-edge generate --help"),
        (["generate", "--device", "gpu"], "--device: got 'gpu', this version has auto or cpu or tensorrt"),
        (["export", "demo", "-o", "x", "--precision", "int9"], "--precision: got 'int9', allowed are fp32"),
        (["export", "demo", "--tables", "int9"], "--tables: got 'int9', this version has auto or fp32 or"),
        (["export", "demo"], "--output is missing"),
        (["export", "no/such/folder", "-o", "x"], "MODEL: no/such/folder does not exist; give a checkpoint"),
        (["export", "./gone", "-o", "x"], "MODEL: ./gone does not exist"),
        (["export", __file__, "-o", "x"], "is a file; give the folder that holds config.json"),
        (["validate", "/", "--rtol", "-1"], "BUNDLE: / has no manifest.json, so it is no bundle"),
        (["validate", __file__], "is not a directory; give the directory of a bundle"),
        (["generate", "--stop", ""], "--stop: is empty; allowed are strings of at least one byte"),
        (["generate", "--stop", r"a\q"], r"--stop: unknown escape \q in"),
        (["generate", "--prompt-file", "gone"], "--prompt-file: gone does not exist"),
        (["generate", "--prompt-file", "/"], "--prompt-file: / is a directory; give a file"),
        (["generate", "--json", "/"], "--json: / is a directory; give a file, or - for stdout"),
        (["generate", "--json", "/gone/x"], "--json: the directory /gone does not exist; create it first"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(refused, arguments: list[str], line: str) -> None:
    assert line in refused(*arguments)


@pytest.fixture
def failing(cli, monkeypatch, tmp_path: Path) -> Callable[..., Result]:
    """`failing(error, "-v")` -> the result of a verb that raises the error."""
    (tmp_path / "manifest.json").touch()

    def run(error: BaseException, *flags: str) -> Result:
        def raise_error(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(inspect_verb.command, "callback", raise_error)
        return cli("inspect", tmp_path, *flags)

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BundleError("tables.bin is truncated"), 1, "tables.bin is truncated"),
        (BltError("one\nline  \x1b[0m"), 1, "one line  \\x1b[0m"),
        (OptionError("threads: got 0, more is needed"), 2, "threads: got 0, more is needed"),
        (PromptTooLongError("the text needs 9 positions"), 2, "the text needs 9 positions"),
        (PermissionError(13, "Permission denied", "x/y"), 1, "x/y: Permission denied"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "out of memory;"),
        (ModuleNotFoundError(name="onnx_ir"), 1, "this needs the package onnx_ir, which is not installed"),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError: oops (run with -v for the traceback)"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "ModuleNotFoundError: No module named 'x'"),
        (KeyError(), 1, "KeyError (run with -v for the traceback)"),
    ],
)
def test_errors_of_a_run_are_one_line(failing, error: Exception, code: int, line: str) -> None:
    result = failing(error)
    assert result.exit_code == code
    assert result.stderr.startswith(f"blt-edge: error: {line}")
    assert result.stderr.count("\n") == 1


def test_verbose_shows_the_traceback_of_an_unforeseen_error(failing) -> None:
    result = failing(ZeroDivisionError("oops"), "-v")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("blt-edge: error: ZeroDivisionError: oops\n")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), "blt-edge: interrupted\n"),
        (click.Abort(), "blt-edge: interrupted\n"),
        (BrokenPipeError(), ""),  # nobody reads on
    ],
)
def test_an_end_before_the_end(failing, error: BaseException, told: str) -> None:
    result = failing(error)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", told)


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/full")
def test_a_full_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from blt_edge.tools.cli import main; main(['--help'])"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("blt-edge: error: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1
