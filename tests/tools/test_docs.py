"""docs/cli.md, written off the parser."""

from __future__ import annotations

import re

import click
import pytest
from blt_edge.tools import docs
from blt_edge.tools.cli.program import VERBS, program


def test_the_page_is_up_to_date() -> None:
    assert docs.page() == docs.PAGE.read_text(encoding="utf-8"), "run: python -m blt_edge.tools.docs"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_there_with_all_it_takes(verb: str) -> None:
    command = program.get_command(click.Context(program), verb)
    section = docs.page().partition(f"\n## {verb}\n")[2].partition("\n## ")[0]
    assert section.startswith("\n```text\nblt-edge " + verb)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            assert str(parameter.metavar) in section
        elif parameter.name not in ("verbose", "quiet"):
            assert f"| `{parameter.opts[0]}`" in section
    tables = [line for line in section.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in tables)


def test_what_markdown_would_take_for_its_own_is_escaped() -> None:
    kind, text = click.IntRange(1, 5), "a*b `c|d` --y [e] <f>"
    option = click.Option(["--x", "x"], type=kind, default=2, show_default=True, metavar="A|B", help=text)
    row = list(docs._table([option]))[-1]
    assert row == (r"| `--x` A\|B | `2` | a\*b `c\|d` `--y` \[e\] \<f\> Allowed: at least 1, at most 5. |")
