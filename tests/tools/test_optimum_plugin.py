"""`optimum-cli export blt`: found by optimum-cli, and the same export as `blt-edge export`."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest
from blt_edge.tools.cli.export import command
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("optimum.commands.optimum_cli", reason="needs optimum: pip install 'blt-edge[optimum]'")

from optimum.commands import optimum_cli
from optimum.commands.register import blt_edge as plugin

Optimum = Callable[..., int]


@pytest.fixture
def optimum(monkeypatch: pytest.MonkeyPatch) -> Optimum:
    """`optimum("-m", "demo")` -> exit code of `optimum-cli export blt -m demo`."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "blt", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            optimum_cli.main()
        assert isinstance(left.value.code, int)
        return left.value.code

    return run


def test_help_has_every_option_of_blt_edge_export(optimum: Optimum, capsys) -> None:
    assert optimum("--help") == 0
    shown = capsys.readouterr().out
    flags = [flag for option in plugin.OPTIONS for flag in option.opts]
    assert all(words in shown for words in (*flags, "[default: fp32]", "--model"))


def test_an_option_given_twice_is_refused(optimum: Optimum, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flag in ("--precision", "-m"):
        assert optimum("-m", "demo", "out", "--precision", "int8", flag, "int4") == 2
        assert f"{flag} is given twice; give it once" in capsys.readouterr().err


def test_optimum_cli_starts_without_anything_heavy() -> None:
    code = """
import atexit, sys
heavy = ("numpy", "torch", "onnx", "onnxruntime", "rich")
atexit.register(lambda: print("loaded:", [name for name in heavy if name in sys.modules]))
from optimum.commands import optimum_cli
sys.argv = ["optimum-cli", "export", "--help"]
optimum_cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "blt " in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"


VALUES = {
    "precision": st.sampled_from(["fp32", "int4,decoder=int8w"]),
    "tables": st.sampled_from(["auto", "int4"]),
    "rtol": st.floats(-1, 1, allow_nan=False),
    "windows": st.integers(-3, 3),
    "output": st.sampled_from(["a", "a b", "x=y", "-o"]),
}


@given(
    st.fixed_dictionaries({}, optional=VALUES),
    st.lists(st.sampled_from([__file__, "-"]), max_size=3),
    st.sets(st.sampled_from(["force", "no_validate", "dry_run"])),
)
def test_blt_edge_gets_what_was_typed(values: dict[str, object], texts: list[str], flags: set[str]) -> None:
    typed = ["-m", "demo", *("--" + flag.replace("_", "-") for flag in flags)]
    typed += [f"--{name}={value}" for name, value in values.items()]
    typed += ["--calibration", *texts] if texts else []
    parser = ArgumentParser()
    plugin.BltExportCommand.parse_args(parser)
    words = plugin.arguments(parser.parse_args(typed))
    assert words[0] == "export"
    got = command.make_context("export", words[1:]).params
    given_ = {"precision": "fp32", "tables": "auto", "rtol": None, "windows": None, "output": None, **values}
    assert {name: got[name] for name in given_} | {"output": got["output"] and str(got["output"])} == given_
    assert (got["source"], got["texts"]) == ("demo", tuple(map(Path, texts)))
    assert {name for name in ("force", "no_validate", "dry_run") if got[name]} == flags


def test_exports_what_blt_edge_exports(optimum: Optimum, cli, tiny_model, tmp_path: Path, capsys) -> None:
    options = ("--precision", "fp16", "--no-validate", "-q")
    assert optimum("-m", tiny_model.checkpoint, tmp_path / "theirs", *options) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{tmp_path / 'theirs'}\n", "")
    assert cli("export", tiny_model.checkpoint, "-o", tmp_path / "ours", *options).exit_code == 0
    theirs, ours = (tmp_path / name / "manifest.json" for name in ("theirs", "ours"))
    assert theirs.read_text() == ours.read_text()


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ("", 2, "--model is missing; see optimum-cli export blt --help"),
        ("-m demo a -o b", 2, "the output is given twice; see"),
        ("-m ./gone x", 2, "MODEL: ./gone does not exist"),
        ("-m demo x --rtol -1", 2, "--rtol is -1.0"),
        ("-m demo x --rtol", 2, "argument --rtol: expected one argument; see optimum-cli"),
        ("-m empty x -q", 1, ""),
    ],
)
def test_refusals_are_one_line(
    optimum: Optimum, capsys, tmp_path: Path, monkeypatch, words: str, code: int, line: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert optimum(*words.split()) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"blt-edge: error: {line}")
    assert not (tmp_path / "x").exists()
