"""Constraints that somebody wrote to hurt end in one line, and in the way of nobody."""

from __future__ import annotations

import pytest
from blt_edge.runtime import Constraint, GenerationOptions, OptionError
from blt_edge.runtime.guide import new_guide
from blt_edge.tools.fuzz.hostile_constraints import COSTLY, REFUSED

pytest.importorskip("llguidance")


def followed(constraint: Constraint, count: int) -> None:
    guide = new_guide(GenerationOptions(constraint=constraint))
    assert guide is not None
    for _ in range(count):
        guide.advance(guide.forced(1) or [int(guide.mask()[4:].argmax()) + 4])


def check_told(error: OptionError) -> None:
    told = str(error)
    assert told.startswith("constraint: ")
    assert told.isprintable()
    assert len(told) < 400


def test_there_are_many() -> None:
    assert len({**REFUSED, **COSTLY}) == len(REFUSED) + len(COSTLY) > 100


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_hostile_is_refused_in_a_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError) as caught:  # at once, or a few bytes later
        followed(REFUSED[name](), 20)
    check_told(caught.value)
    # Nothing of it stays in the way of the next one.
    followed(Constraint.regex(f"a{{20}}{len(name)}"), 20)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", COSTLY)
def test_what_is_costly_is_followed_or_refused_in_a_line(name: str) -> None:
    try:
        followed(COSTLY[name](), 60)
    except OptionError as error:
        check_told(error)
