"""The program around the verbs: help and docs/cli.md, exit codes, and what becomes of errors."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path

import blt_edge
import click
import pytest
from blt_edge.runtime.errors import BltError, BundleError, OptionError, PromptTooLongError
from blt_edge.tools import docs
from blt_edge.tools.cli import inspect as inspect_verb
from blt_edge.tools.cli.program import VERBS, program
from click.testing import Result

HEAVY = "numpy rich onnxruntime torch onnx onnx_ir onnxscript transformers safetensors starlette uvicorn"
HELPS = [["--help"], ["--version"], [], *([verb, "--help"] for verb in VERBS)]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import atexit, sys
heavy = {HEAVY!r}.split()
atexit.register(lambda: print("loaded:", [name for name in heavy if name in sys.modules]))
from blt_edge.tools.cli import main
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    loaded = done.stdout.splitlines()[-1]
    assert (done.returncode, loaded) == (0 if arguments else 2, "loaded: []")


def help_lines(verb: str) -> list[str]:
    """Where a terminal has 80 columns."""
    with program.make_context("blt-edge", ["--help"], resilient_parsing=True, terminal_width=80) as root:
        command = program.get_command(root, verb)
        with click.Context(command, info_name=verb, parent=root) as ctx:
            return command.get_help(ctx).splitlines()


def test_help_has_no_row_for_an_argument() -> None:
    lines = help_lines("score")
    rows = [line for line in lines[lines.index("Options:") :] if re.match(r"  \S", line)]
    assert all(line.startswith(("  -", "  blt-edge ")) for line in rows)


@pytest.mark.parametrize("verb", ["export", "quantize"])
def test_the_example_of_a_mix_is_on_one_line(verb: str) -> None:
    assert any("latent=int4,decoder=int8;" in line for line in help_lines(verb))


def test_threads_are_t_everywhere() -> None:
    for verb in VERBS:
        for one in program.get_command(click.Context(program), verb).params:
            assert ("-t" in one.opts) == ("--threads" in one.opts)


def test_help_is_fast() -> None:
    """Well under 0.3 s on a quiet machine; the best of five, as this one may be busy."""
    command = [Path(sys.executable).with_name("blt-edge"), "--help"]
    run = partial(subprocess.run, command, capture_output=True, check=True)
    assert min(timeit.repeat(run, number=1, repeat=5)) < 0.6


def test_the_page_of_the_verbs_is_up_to_date() -> None:
    assert docs.page() == docs.PAGE.read_text(encoding="utf-8"), "run: python -m blt_edge.tools.docs"


def test_what_markdown_would_take_for_its_own_is_escaped() -> None:
    kind, text = click.IntRange(1, 5), "a*b `c|d` --y [e] <f>"
    option = click.Option(["--x", "x"], type=kind, default=2, show_default=True, metavar="A|B", help=text)
    row = list(docs._table([option]))[-1]
    assert row == (r"| `--x` A\|B | `2` | a\*b `c\|d` `--y` \[e\] \<f\> Allowed: at least 1, at most 5. |")


@pytest.mark.parametrize("name", VERBS)
def test_help_and_page_of_a_verb_say_what_the_table_says_and_every_default(cli, name: str) -> None:
    command = program.get_command(click.Context(program), name)
    assert command.get_short_help_str(200).rstrip(".") == VERBS[name].rstrip(".")
    assert "Usage: blt-edge" in cli(name, "--help").stdout
    section = docs.page().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert section.startswith("\n```text\nblt-edge " + name)
    tables = [line for line in section.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in tables)
    without = ("prompt", "prompt_file", "stop", "json_file", "output", "reference", "golden")
    for option in command.params:
        if isinstance(option, click.Argument):
            assert str(option.metavar) in section
        else:
            assert option.help, option.name
            assert not any("_" in flag for flag in option.opts)
            default = option.is_flag or option.required or option.name in without or option.show_default
            assert default, option.name
            assert option.name in ("verbose", "quiet") or f"| `{option.opts[0]}`" in section


SINGLE = [
    (name, option.opts[-1])
    for name in VERBS
    for option in program.get_command(click.Context(program), name).params
    if isinstance(option, click.Option) and not option.multiple and not option.is_flag
]


@pytest.mark.parametrize(("verb", "flag"), [*SINGLE, ("patches", "--monotonic")])
def test_an_option_given_twice_is_refused(refused, verb: str, flag: str) -> None:
    words = [flag] if flag == "--monotonic" else [flag, "1"]
    assert refused(verb, *words, *words).rstrip().endswith("is given twice; give it once")
    other = "--no-monotonic" if flag == "--monotonic" else f"{flag}=2"
    assert refused(verb, *words, *([other] if flag.startswith("--") else words)).endswith("give it once\n")


def test_flags_and_options_of_several_values_may_be_repeated(refused) -> None:
    told = refused("generate", "-q", "-q", "--stop", "a", "--stop", "b", "-p", "x")
    assert told.startswith("--model is missing")


@pytest.mark.parametrize("name", VERBS)
def test_help_has_usage_groups_and_two_examples_that_parse(
    cli, tiny_model, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    for file in ("alice.txt", "text.txt", "prompt.txt"):
        (tmp_path / file).write_text("text")
    for bundle in ("demo-bundle", "bundle", "small"):
        (tmp_path / bundle).symlink_to(tiny_model.bundle)
    (tmp_path / "path/to/checkpoint").symlink_to(tiny_model.checkpoint)
    shown = cli(name, "--help").stdout
    head, _, examples = shown.partition("\nExamples:\n")
    command = program.get_command(click.Context(program), name)
    usage = " ".join(head.partition("\n\n")[0].split())
    arguments = [str(one.metavar) for one in command.params if isinstance(one, click.Argument)]
    assert usage.endswith(" ".join(["[OPTIONS]", *arguments]))
    titles = re.findall(r"^([A-Z][\w -]+):$", head, re.M)
    assert titles[-1] == "Every verb"
    assert "Sampling" in titles or name not in ("generate", "chat")
    lines = examples.splitlines()
    assert len(lines) == 2
    for line in lines:
        program_name, verb, *words = shlex.split(line.partition(" > ")[0])
        assert (program_name, verb) == ("blt-edge", name)
        command.make_context(name, words)


def test_help_of_a_verb_by_its_name(cli) -> None:
    assert cli("help", code=0).stdout == cli("--help", code=0).stdout
    assert cli("help", "score", code=0).stdout == cli("score", "--help", code=0).stdout


def test_demo_stands_for_its_bundle_which_is_made_once(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    first, again = (cli("inspect", "demo", "--json", "-", code=0) for _ in range(2))
    assert first.stderr.startswith(f"making the demo's bundle, once: {tmp_path / 'cache' / 'blt-edge'}")
    assert (first.stdout, again.stderr) == (again.stdout, "")
    (bundle,) = (tmp_path / "cache/blt-edge").glob("*/demo")
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace("demo", "dem0"))  # damaged
    assert cli("inspect", "demo", "-q", code=0).stderr == ""
    assert cli("score", "-m", "demo", "--json", "-", "-q", "-", stdin=b"text", code=0).stderr == ""


def test_version_and_no_verb(cli) -> None:
    assert cli("--version", code=0).stdout == f"blt-edge {importlib.metadata.version('blt-edge')}\n"
    result = cli(code=2)
    assert result.stdout == ""
    assert "Verbs:" in result.stderr


def test_the_package_runs_as_the_command_and_knows_its_version() -> None:
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    done = run([sys.executable, "-m", "blt_edge", "--version"])
    assert (done.stdout, done.returncode) == (f"blt-edge {blt_edge.__version__}\n", 0)
    assert run([sys.executable, "-m", "blt_edge", "exprt"]).returncode == 2
    assert blt_edge.__version__ == importlib.metadata.version("blt-edge")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("exprt", "there is no verb 'exprt'; did you mean export?"),
        ("\x1b[31m", "there is no verb '\\x1b[31m'; the verbs are export, validate,"),
        ("help nonsense", "there is no verb 'nonsense'"),
        ("inspect {checkpoint}", "is a checkpoint, not a bundle; make one of it: blt-edge export"),
        ("generate -m owner/name -p x", "if it is a hub id: blt-edge export owner/name -o name-bundle"),
        ("--hlep", "there is no option --hlep; did you mean --help?"),
        ("build {bundle} --target x", "--target: got 'x'"),
        ("build {bundle} --max-patches 9", "--max-patches is for --target tensorrt"),
        ("build {bundle} --compute-capability 8.6 --dry-run", "--compute-capability is for --target"),
        ("build {bundle} --dry-run --json -", "--json is for what was built"),
        ("build {bundle} --target tensorrt-rtx --max-bytes 501", "--max-bytes is 501"),
        ("build {bundle} --target tensorrt --workspace x", "--workspace: got 'x'"),
        ("compare -q {bundle}", "--text is missing"),
        ("compare -q {bundle} --text empty.txt", "--text: empty.txt is empty"),
        ("compare -q {bundle} --text a.txt a.txt", "--text: a.txt is given twice"),
        ("compare -q {bundle} --text a.txt --plot out.jpg", "--plot: got out.jpg"),
        ("compare -q {bundle} nowhere --text a.txt", "BUNDLE: nowhere does not exist"),
        ("completion csh", "SHELL: got 'csh', this version has bash or zsh or fish"),
        ("export demo", "--output is missing"),
        ("export demo -o x --precision int9", "--precision: got 'int9'"),
        ("export demo --tables int9", "--tables: got 'int9'"),
        ("export no/such/folder -o x", "MODEL: no/such/folder does not exist"),
        ("export a.txt -o x", "is a file; give the folder that holds config.json"),
        ("export -q {checkpoint} -o .", "--output . exists; give a new name, or --force"),
        ("export -q {checkpoint} -o gone/bundle", "gone does not exist; create it first"),
        ("export -q {checkpoint} -o new --context 1", "--context: got 1"),
        ("export -q {checkpoint} -o new --rtol -1", "--rtol is -1.0"),
        ("export -q {checkpoint} -o new --atol nan", "--atol is nan"),
        ("export -q {checkpoint} -o . --force", "is not a bundle and not empty"),
        ("generate", "--model is missing; see blt-edge generate --help"),
        ("generate --temprature 1", "did you mean --temperature or --temp?"),
        ("generate --top-k many", "--top-k: 'many' is not a whole number; see blt-edge generate --help"),
        ("generate --top-k", "option '--top-k' requires an argument; see blt-edge generate --help"),
        ("generate --device gpu", "--device: got 'gpu', this version has auto or cpu or tensorrt"),
        ("generate --prompt-file gone", "--prompt-file: gone does not exist"),
        ("generate --prompt-file /", "--prompt-file: / is a directory; give a file"),
        ("generate --json /", "--json: / is a directory; give a file, or - for stdout"),
        ("generate --json /gone/x", "--json: the directory /gone does not exist; create it first"),
        ("inspect", "BUNDLE|STATE is missing; see blt-edge inspect --help"),
        ("score --sweep 1,x {bundle}", "--sweep: 'x' is not a number; see blt-edge score --help"),
        ("inspect a b", "BUNDLE|STATE: a does not exist"),
        ("score -q -m {bundle} -", "FILE: stdin is empty; there is nothing to score"),
        ("score -q -m {bundle} - -", "FILE: - is given twice"),
        ("score -q -m {bundle} a.txt --context 1", "--context is 1; allowed is a whole number from 2 to 500"),
        ("score -q -m {bundle}", "FILE is missing"),
        ("validate / --rtol -1", "BUNDLE: / has no manifest.json, so it is no bundle"),
        ("validate a.txt", "is not a directory; give the directory of a bundle"),
        ("validate -q {bundle} --golden -", "--golden: can't be stdin"),
        ("validate -q {bundle} --golden a.txt --reference demo", "--reference and --golden are both given"),
        ("validate -q {bundle} --reference gone", "--reference: gone does not exist"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(
    refused, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "empty.txt").touch()
    folders = {"bundle": tiny_model.bundle, "checkpoint": tiny_model.checkpoint}
    assert line in refused(*(word.format(**folders) for word in shlex.split(words)))
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "empty.txt"}
    assert not (tiny_model.bundle / "engines").exists()


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
    told = failing(ZeroDivisionError("oops"), "-v").stderr
    assert "Traceback (most recent call last)" in told
    assert told.endswith("blt-edge: error: ZeroDivisionError: oops\n")


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
    code = "from blt_edge.tools.cli import main; main(['--help'])"
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch("blt-edge: error: .*No space left on device\n", done.stderr)
