"""The library is asked only when it must be, and what it is given may be anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from blt_edge.runtime import (
    Constraint,
    GenerationOptions,
    OptionError,
    constraint_compiler,
    constraint_library,
)
from blt_edge.runtime.constraint_compiler import compile_matcher, guarded
from blt_edge.runtime.constraint_library import compiled
from blt_edge.runtime.guide import new_guide, prepare
from blt_edge.runtime.worker import WorkerBusyError, WorkerDiedError, WorkerTimeoutError

pytest.importorskip("llguidance")
QUIET = """
import sys
from blt_edge.runtime import Constraint, GenerationOptions
from blt_edge.runtime.guide import new_guide, prepare
for options in (
    GenerationOptions(),
    GenerationOptions(utf8=True, logit_bias={5: 1}),
    GenerationOptions(constraint=Constraint.choice(["a", "b"])),
):
    guide = new_guide(options)
    assert guide is None or guide.mask().any()
    assert prepare(options) is None
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


@pytest.mark.parametrize(
    ("happened", "told"),
    [
        (
            WorkerTimeoutError("takes more than 1 s"),
            "the regex takes more than 1 s to compile; make it simpler",
        ),
        (
            WorkerDiedError("crashed (SIGSEGV)"),
            r"the regex can't be used: its compilation crashed \(SIGSEGV\); make it simpler",
        ),
        (WorkerBusyError("is busy"), "others are still being compiled, which take long; try again later"),
    ],
)
def test_what_happens_to_the_trial_is_told_and_nothing_is_compiled_here(
    monkeypatch: pytest.MonkeyPatch, happened: Exception, told: str
) -> None:
    def ask(*_: object) -> None:
        raise happened

    with monkeypatch.context() as patched:
        patched.setattr(constraint_library._trial, "ask", ask)
        patched.setattr(constraint_library, "compile_matcher", None)
        with pytest.raises(OptionError, match=f"^constraint: {told}$"):
            compiled(Constraint.regex(type(happened).__name__))
    # Nothing of it stays in the way.
    assert compiled(Constraint.regex(type(happened).__name__)).forced() == type(happened).__name__.encode()


def test_one_is_compiled_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_library, "_QUEUE_PATIENCE", -0.95)
    with constraint_library._turn, pytest.raises(OptionError, match="others are still being compiled"):
        compiled(Constraint.regex("d{5}"))
    assert compiled(Constraint.regex("d{5}")).forced() == b"ddddd"


def test_threads_that_ask_for_the_same_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Constraint] = []

    def counted(constraint: Constraint) -> object:
        asked.append(constraint)
        return compile_matcher(constraint)

    monkeypatch.setattr(constraint_library, "compile_matcher", counted)
    with ThreadPoolExecutor(8) as pool:
        rules = list(pool.map(lambda _: compiled(Constraint.regex("e{6}")), range(16)))
    assert len(asked) == 1
    rules[0].advance(ord("e"))
    assert [len(rule.forced()) for rule in rules] == [5] + [6] * 15


def test_rules_are_kept_compiled_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = compiled(Constraint.regex("ab+")), compiled(Constraint.regex("ab+"))
    first.advance(ord("a"))
    assert second.forced() == b"ab"
    assert first.forced() == b"b"
    monkeypatch.setattr(constraint_library, "compile_matcher", None)
    assert compiled(Constraint.regex("ab+")).forced() == b"ab"


@pytest.mark.parametrize("keep", [prepare, new_guide])
def test_what_is_in_use_stays_compiled_whatever_comes_between(
    monkeypatch: pytest.MonkeyPatch, keep: Callable[[GenerationOptions], object]
) -> None:
    options = GenerationOptions(constraint=Constraint.regex("fg{3}"))
    kept = keep(options)
    for number in range(constraint_library._KEPT + 1):
        compiled(Constraint.regex(f"other {number}"))
    assert options.constraint not in constraint_library._recent
    with monkeypatch.context() as patched:
        patched.setattr(constraint_library, "compile_matcher", None)
        guide = new_guide(options)
        assert guide is not None
        assert len(guide.forced(9)) == 4
    del kept, guide
    assert options.constraint not in constraint_library._in_use


def test_what_needs_no_compiling_needs_no_preparing() -> None:
    for options in (
        GenerationOptions(utf8=True),
        GenerationOptions(constraint=Constraint.choice(["a"])),
    ):
        assert prepare(options) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_of_a_process_that_is_compiling_compiles() -> None:
    with constraint_library._turn, constraint_library._lock:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = int(compiled(Constraint.regex("hi")).forced() != b"hi")
            finally:
                os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


class PanicException(BaseException):
    """As pyo3 calls what a panic of Rust's becomes."""


def test_a_panic_is_an_error_of_ours() -> None:
    class Panics:
        def __getattr__(self, name: str) -> Callable[..., object]:
            def call(*_: object) -> object:
                raise PanicException(f"in {name}\nsecond line")

            return call

    rule = compiled(Constraint.regex("panics"))
    rule._matcher = Panics()
    for step in (rule.allowed, rule.forced, rule.fork, lambda: rule.advance(1), lambda: rule.roll_back(1)):
        with pytest.raises(OptionError, match=r"^constraint: the regex can't be followed further: in \w+$"):
            step()
    with pytest.raises(OptionError, match="in is_accepting"):
        _ = rule.accepts_end
    with pytest.raises(KeyboardInterrupt):
        guarded("", Interrupted())


def walked(constraint: Constraint, seed: int, count: int) -> int:
    """How many letters of two a text took."""
    rule, random = compiled(constraint), Random(seed)
    for number in range(count):
        try:
            rule.allowed()
            rule.advance(random.choice(b"ab"))
        except OptionError:
            return number
    return count


def test_one_text_s_end_is_not_the_next_one_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """What texts of a constraint have in common fills up; then it is made anew."""
    monkeypatch.setitem(constraint_compiler._LIMITS, "max_lexer_states", 600)
    constraint = Constraint.regex("(a|b)*a(a|b){200}")
    steps = [walked(constraint, seed, 250) for seed in range(6)]
    assert min(steps[::2]) == 250
    assert max(steps[1::2]) < 250  # begun with what the one before had left


def test_what_many_texts_went_through_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_library, "_MOST_TAKEN", 300)
    constraint = Constraint.regex("(a|b)*a(a|b){201}")
    taken = []
    for seed in range(6):
        walked(constraint, seed, 200)
        taken.append(constraint in constraint_library._in_use)
    assert taken == [True, False] * 3
    first = compiled(constraint)
    walked(constraint, 7, 301)
    assert constraint not in constraint_library._recent
    assert compiled(constraint)._origin is first._origin  # while that is at work


class Interrupted:
    def __call__(self) -> None:
        raise KeyboardInterrupt


def test_a_broken_rule_says_so_each_time() -> None:
    rule = compiled(Constraint.regex("ab"))
    rule.roll_back(0)
    for _ in range(2):
        with pytest.raises(OptionError, match=r"^constraint: the regex can't be followed further: "):
            rule.advance(ord("x"))
    with pytest.raises(OptionError, match="can't be followed further"):
        rule.allowed()
