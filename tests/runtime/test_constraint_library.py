"""The library is asked only when it must be, and what it is given may be anything."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from blt_edge.runtime import Constraint, GenerationOptions, OptionError, constraint_library
from blt_edge.runtime.constraint_library import compiled
from blt_edge.runtime.guide import new_guide

pytest.importorskip("llguidance")
QUIET = """
import sys
from blt_edge.runtime import Constraint, GenerationOptions
from blt_edge.runtime.guide import new_guide
for options in (
    GenerationOptions(),
    GenerationOptions(utf8=True, logit_bias={5: 1}),
    GenerationOptions(constraint=Constraint.choice(["a", "b"])),
):
    guide = new_guide(options)
    assert guide is None or guide.mask().any()
Constraint.regex("a"), Constraint.json_schema({}), Constraint.grammar('start: "a"')
assert "llguidance" not in sys.modules
"""
MISSING = """
import sys
sys.modules["llguidance"] = None
from blt_edge.runtime import Constraint, GenerationOptions, OptionError
from blt_edge.runtime.guide import new_guide
try:
    new_guide(GenerationOptions(constraint=Constraint.regex("a")))
except OptionError as error:
    print(error)
"""


def python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_the_library_is_imported_only_when_a_constraint_needs_it() -> None:
    assert python(QUIET) == ""


def test_a_missing_library_is_one_line_with_the_command() -> None:
    told = python(MISSING)
    assert told.startswith("constraints need llguidance (but for choices and UTF-8); pip install ")
    assert "[guide]" in told
    assert told.count("\n") == 1


HOSTILE: dict[str, Callable[[], Constraint]] = {
    "many properties": lambda: Constraint.json_schema(
        {"type": "object", "properties": {f"k{i}": {} for i in range(900)}}
    ),
    "products of choices": lambda: Constraint.json_schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}": {}}}, {"properties": {f"b{i}": {"type": "null"}}}]}
                for i in range(14)
            ]
        }
    ),
    "refers to itself": lambda: Constraint.json_schema({"$ref": "#"}),
    "refers to another host": lambda: Constraint.json_schema({"$ref": "http://127.0.0.1:9/x.json"}),
    "refers to a file": lambda: Constraint.json_schema({"$ref": "file:///etc/passwd"}),
    "fits nothing": lambda: Constraint.json_schema({"type": "string", "enum": [1]}),
    "has what is not done": lambda: Constraint.json_schema({"not": {"type": "string"}}),
    "many words": lambda: Constraint.grammar("start: " + " | ".join(f'"w{i}"' for i in range(4000))),
    "no end": lambda: Constraint.grammar("start: start"),
    "doubled terminals": lambda: Constraint.grammar(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(30)) + '\nA30: "x" | "y"'
    ),
    "doubled rules": lambda: Constraint.grammar(
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x"'
    ),
    "deep brackets": lambda: Constraint.grammar("start: " + "(" * 9000 + '"a"' + ")" * 9000),
    "deep brackets of GBNF": lambda: Constraint.grammar("root ::= " + "(" * 9000 + '"a"' + ")" * 9000),
    "no rule": lambda: Constraint.grammar("hello"),
    "an import": lambda: Constraint.grammar('%import "/etc/passwd"\nstart: A'),
    "deep groups": lambda: Constraint.regex("(" * 9000 + "a" + ")" * 9000),
    "look-around": lambda: Constraint.regex("(?=a)b"),
    "a reference": lambda: Constraint.regex(r"(a)\1"),
    "no class": lambda: Constraint.regex("[a"),
}


def followed(constraint: Constraint) -> None:
    """What is refused is refused at once, or a few bytes later."""
    guide = new_guide(GenerationOptions(constraint=constraint))
    assert guide is not None
    for _ in range(20):
        guide.advance(guide.forced(1) or [int(guide.mask()[4:].argmax()) + 4])


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_in_a_line(name: str) -> None:
    with pytest.raises(OptionError, match=r"^constraint: ") as caught:
        followed(HOSTILE[name]())
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 400
    # Nothing of it stays in the way of the next one.
    assert compiled(Constraint.regex("a")).allowed()[ord("a")]


def test_what_takes_too_long_is_left_behind_and_of_those_there_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constraint_library, "PATIENCE", 0.05)
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def slow(constraint: Constraint) -> constraint_library.LibraryRule:
        begun.release()
        go_on.wait(30)
        raise OptionError("at last")

    monkeypatch.setattr(constraint_library, "_compile", slow)
    for pattern in "ab":
        with pytest.raises(
            OptionError, match=r"the regex takes more than 0.05 s to compile; make it simpler"
        ):
            compiled(Constraint.regex(pattern * 7))
        assert begun.acquire(timeout=30)
    with pytest.raises(
        OptionError, match="others are still being compiled, which take long; try again later"
    ):
        compiled(Constraint.regex("ccccccc"))
    go_on.set()
    monkeypatch.undo()
    for thread in threading.enumerate():
        if thread.name == "constraint":
            thread.join(30)
    assert compiled(Constraint.regex("ccccccc")).forced() == b"ccccccc"


def test_rules_are_kept_compiled_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = compiled(Constraint.regex("ab+")), compiled(Constraint.regex("ab+"))
    first.advance(ord("a"))
    assert second.forced() == b"ab"
    assert first.forced() == b"b"
    monkeypatch.setattr(constraint_library, "_compile", None)
    assert compiled(Constraint.regex("ab+")).forced() == b"ab"


def test_a_broken_rule_says_so_each_time() -> None:
    rule = compiled(Constraint.regex("ab"))
    rule.roll_back(0)
    for _ in range(2):
        with pytest.raises(OptionError, match=r"^constraint: the regex can't be followed further: "):
            rule.advance(ord("x"))
    with pytest.raises(OptionError, match="can't be followed further"):
        rule.allowed()
