"""Text that must fit, asked for on a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import BltModel, Constraint, GenerationOptions

pytest.importorskip("llguidance")
SCHEMA = {"type": "object", "properties": {"a b": {"type": "boolean"}}, "required": ["a b"]}
SCHEMA["additionalProperties"] = False


@pytest.fixture
def generate(cli, tiny_model) -> Callable[..., Any]:
    """`generate("-n", 4, ...)` -> click's Result, of the tiny model."""
    return partial(cli, "generate", "-m", tiny_model.bundle, "-p", "Once")


def test_each_kind_is_what_the_runtime_makes(generate, model: BltModel, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "lark").write_text('start: "x" /[0-9]{3}/')
    (tmp_path / "gbnf").write_text('root ::= "y" [0-9] [0-9]')
    kinds: list[tuple[list[Any], Constraint]] = [
        (["--json-schema", tmp_path / "schema.json"], Constraint.json_schema(SCHEMA)),
        (["--json-schema", json.dumps(SCHEMA)], Constraint.json_schema(SCHEMA)),
        (["--json-object"], Constraint.json_object()),
        (["--regex", "é[ab]{3}"], Constraint.regex("é[ab]{3}")),
        (["--grammar", tmp_path / "lark"], Constraint.grammar('start: "x" /[0-9]{3}/')),
        (["--grammar", tmp_path / "gbnf"], Constraint.grammar('root ::= "y" [0-9] [0-9]')),
        (["--choice", "one", "--choice", r"t\x77o"], Constraint.choice(["one", "two"])),
    ]
    for flags, constraint in kinds:
        expected = model.generate("Once", GenerationOptions(30, constraint=constraint))
        result = generate("-n", 30, "--utf8", "--json", "-", *flags)
        document = json.loads(result.stdout)
        assert document["text"] == expected.text
        assert document["finish_reason"] == expected.finish_reason
        assert document["options"]["constraint"]["kind"] == constraint.kind
        assert document["options"]["constraint"]["source"] == constraint.source
        assert document["stats"]["forced"] == expected.stats.forced
        ending = {"eos": "the text is complete", "length": "so the text may lack its end"}
        assert ending[expected.finish_reason] in result.stderr
        assert "could only come next" not in generate("-n", 3).stderr
    assert document["options"]["constraint"]["texts"] == ["one", "two"]


def test_utf8_alone(generate) -> None:
    free = json.loads(generate("-n", 60, "--temp", 2, "--seed", 1, "--json", "-").stdout)
    kept = json.loads(generate("-n", 60, "--temp", 2, "--seed", 1, "--utf8", "--json", "-").stdout)
    assert "\ufffd" in free["text"]
    assert "\ufffd" not in kept["text"][:-1]
    assert kept["options"]["utf8"]


WRONG: dict[str, list[str]] = {
    "--json-object and --regex are given; a text can fit one of them only": ["--json-object", "--regex", "a"],
    "constraint: the regex can't be used: unclosed character class": ["--regex", "[a"],
    "--json-schema: nowhere does not exist": ["--json-schema", "nowhere"],
    "constraint: the JSON schema is no JSON": ["--json-schema", "{1}"],
    "--choice: is empty": ["--choice", ""],
    "is not read from stdin; give a file": ["--grammar", "-"],
}


@pytest.mark.parametrize("told", WRONG)
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_what_is_wrong_is_told_before_anything_is_loaded(refused, tiny_model, told: str, verb: str) -> None:
    line = refused(verb, "-m", tiny_model.bundle, "-p", "x", *WRONG[told])
    assert told in line


def test_a_file_that_is_no_text(refused, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    line = refused("generate", "-m", tiny_model.bundle, "-p", "x", "--grammar", tmp_path / "bytes", code=1)
    assert "bytes is no text in UTF-8; give one that is" in line


def test_a_mark_of_the_encoding_is_no_part_of_a_file(generate, tmp_path: Path) -> None:
    for option, content in (("--json-schema", '{"const": 7}'), ("--grammar", 'start: "7"')):
        file = tmp_path / "marked"
        file.write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert json.loads(generate("--json", "-", option, file).stdout)["text"] == "7"


def test_every_turn_of_a_chat_fits(cli, tiny_model) -> None:
    result = cli(
        "chat", "-m", tiny_model.bundle, "--regex", "[a-c]{4}!", "--temp", 1, stdin=b"one\ntwo\n", code=0
    )
    assert re.fullmatch(r"([a-c]{4}!\n){2}", result.stdout)
    assert result.stderr.count("; the text is complete") == 2
    cut = cli("chat", "-m", tiny_model.bundle, "--regex", "[a-c]{9}", "-n", 4, stdin=b"one\n", code=0)
    assert "; it may lack its end" in cut.stderr
