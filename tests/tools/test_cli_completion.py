"""What shells are told about verbs, options and values; real shells where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from blt_edge.tools.cli.completion import COMPLETION, SHELLS
from blt_edge.tools.cli.program import VERBS, program
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def offered(*words: str) -> list[str]:
    """What bash is told for a command line whose last word is being typed: "type,value" each."""
    asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    told = CliRunner().invoke(program, [], env={COMPLETION: "bash_complete", **asked})
    assert (told.exit_code, told.stderr) == (0, "")
    return told.stdout.split()


def test_nothing_heavy_is_imported() -> None:
    heavy = ("numpy", "rich", "onnxruntime", "onnx", "blt_edge.tools.cli.export", "blt_edge.tools.cli.score")
    code = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", [name for name in {heavy!r} if name in sys.modules]))
from blt_edge.tools.cli import main
main()
"""
    for words, last in (("blt-edge ex", "1"), ("blt-edge generate --dr", "2")):
        asked = {**os.environ, COMPLETION: "bash_complete", "COMP_WORDS": words, "COMP_CWORD": last}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=asked, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("verb", VERBS)
def test_options_of_a_verb(verb: str) -> None:
    command = program.get_command(click.Context(program), verb)
    options = [option for option in command.params if isinstance(option, click.Option)]
    flags = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    told = {word.removeprefix("plain,") for word in offered("blt-edge", verb, "-")}
    assert told == {*flags, "-h", "--help"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("",), [f"plain,{verb}" for verb in VERBS]),
        (("--ver",), ["plain,--version"]),
        (("generate", "--draft", "l"), ["plain,lookup"]),
        (("generate", "--draft=l"), ["plain,lookup"]),
        (("generate", "-m", ""), ["plain,demo", "dir,"]),
        (("generate", "-m", "a", "--prompt-file", "x/y"), ["file,x/y"]),
        (("inspect", "x"), ["file,x"]),
        (("validate", "x"), ["dir,x"]),
        (("score", "-m", "a", "b"), ["file,b"]),
        (("score", "--json", ""), ["file,"]),
        (("compare", "a", "b"), ["dir,b"]),
        (("compare", "a", "--text", "b", ""), ["file,"]),
        (("export", ""), ["plain,demo", "dir,"]),
        (("export", "no-such-folder"), ["dir,no-such-folder"]),
        (("export", "demo", "--tables", "f"), ["plain,fp32", "plain,fp16"]),
        (("completion", "b"), ["plain,bash"]),
        (("bogus", "x"), []),
        (("bogus",), []),
    ],
    ids=" ".join,
)
def test_values(words: tuple[str, ...], expected: list[str]) -> None:
    assert offered("blt-edge", *words) == expected


def test_demo_and_options_where_no_argument_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert offered("blt-edge", "export", "de") == ["plain,demo"]
    (tmp_path / "demo-bundle").mkdir()
    assert offered("blt-edge", "export", "de") == ["plain,demo", "dir,de"]
    assert "plain,--temperature" in offered("blt-edge", "generate", "")


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), max_size=4))
def test_nothing_typed_breaks_it(words: list[str]) -> None:
    offered("blt-edge", *words, "")


@pytest.mark.parametrize("asked", ["bogus", "bash", "bash_bogus", "powershell_source", "_", "\x1b"])
def test_an_unknown_question_is_one_line(asked: str) -> None:
    told = CliRunner().invoke(program, ["--help"], env={COMPLETION: asked})
    assert (told.exit_code, told.stdout, told.stderr.count("\n")) == (2, "", 1)
    assert "allowed is bash_source or" in told.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_say_how_to_install_them(cli, shell: str) -> None:
    done = cli("completion", shell, code=0)
    head = done.stdout.splitlines()[:2]
    assert any(line.startswith("# ") and f"blt-edge completion {shell}" in line for line in head)
    assert (done.stderr, COMPLETION in done.stdout) == ("", True)
    assert shell != "zsh" or head[0] == "#compdef blt-edge"


# Real shells.


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_at_a_terminal(tmp_path: Path) -> None:
    terminal = pytest.importorskip("support.terminal")
    for name in ("bundle", "more"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").touch()
    shell = ["bash", "--norc", "--noprofile", "-i"]
    start = f"import os; os.chdir({str(tmp_path)!r}); os.execvp('bash', {shell})"
    bash = terminal.Terminal(start, [], {"PATH": PATH, "PS1": "$ ", "TERM": "dumb"})
    prepare = 'bind "set enable-bracketed-paste off"; eval "$(blt-edge completion bash)"; echo rea""dy\n'
    bash.ask(prepare, "\nready\n")
    for typed, completed in (
        ("blt-edge gen", "blt-edge generate "),
        ("blt-edge generate --draft lo", "--draft lookup "),
        ("blt-edge score -m bu", "-m bundle/"),
        ("blt-edge score -m bundle te", "bundle text.txt "),
    ):
        bash.ask(f"{typed}\t", completed)
        bash.type("\x15")  # forgets the line
    bash.type("exit\n")
    assert bash.end() == 0


FISH = """
blt-edge completion fish | source
complete -C "blt-edge generate --draft l"
complete -C "blt-edge generate -m b"
complete -C "blt-edge insp"
"""
ZSH = 'autoload -U compinit; compinit -u -D; eval "$(blt-edge completion zsh)"; print $_comps[blt-edge]'


@pytest.mark.parametrize(
    ("shell", "script", "shown"),
    [
        ("fish --no-config -c", FISH, ["lookup", "bundle/", "inspect"]),
        ("zsh -f -c", ZSH, ["_blt_edge_completion"]),
    ],
)
def test_fish_and_zsh(tmp_path: Path, shell: str, script: str, shown: list[str]) -> None:
    command = [*shell.split(), script]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    (tmp_path / "bundle").mkdir()
    variables = {**os.environ, "PATH": PATH, "HOME": str(tmp_path)}
    told = subprocess.check_output(command, env=variables, cwd=tmp_path, text=True, timeout=60)
    assert [line.split("\t")[0] for line in told.splitlines()] == shown
