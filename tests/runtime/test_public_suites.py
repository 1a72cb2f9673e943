"""Schemas and patterns that others wrote to find mistakes, with what fits them and what does not."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import BltModel, GenerationOptions, OptionError
from blt_edge.runtime.constraint import Constraint
from blt_edge.runtime.guide import Guide, new_guide
from blt_edge.runtime.vocabulary import byte_ids
from support.fitting_texts import check_fits_schema

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

_SUITE = Path(__file__).parents[1] / "data" / "json_schema_test_suite" / "draft2020-12.json"
SCHEMAS: list[dict[str, Any]] = json.loads(_SUITE.read_text(encoding="utf-8"))
KEYWORDS = sorted({case["keyword"] for case in SCHEMAS})


def takes(guide: Guide, text: str) -> bool:
    """Whether a whole text may come."""
    taking = guide.fork()
    for number in byte_ids(text.encode()).tolist():
        if not taking.mask()[number]:
            return False
        taking.advance([number])
    return taking.accepts_end


def compiled(make: Callable[[Any], Constraint], source: Any) -> tuple[Constraint, Guide] | None:
    """A constraint and its guide; None where it is refused, on one line."""
    told = ""
    try:
        constraint = make(source)
        guide = new_guide(GenerationOptions(constraint=constraint))
    except OptionError as error:
        told = str(error)
    if told:
        assert re.fullmatch("constraint: .+", told)
        return None
    assert guide is not None
    return constraint, guide


def fitting(model: BltModel, constraint: Constraint, temperature: float) -> str | None:
    """A text that ended by itself; None where there was no room for it."""
    options = GenerationOptions(40, temperature=temperature, seed=1, constraint=constraint)
    result = model.generate(b"Once", options)
    return result.data.decode() if result.finish_reason == "eos" else None


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_what_a_schema_refuses_never_comes(model: BltModel, keyword: str) -> None:
    for case in (case for case in SCHEMAS if case["keyword"] == keyword):
        found = compiled(Constraint.json_schema, case["schema"])
        if found is None:
            continue
        constraint, guide = found
        for value in case["invalid"]:
            assert not takes(guide, json.dumps(value, ensure_ascii=False)), (case["description"], value)
        for temperature in (0.0, 1.0):
            text = fitting(model, constraint, temperature)
            if text is not None:
                check_fits_schema(text, case["schema"])


def test_most_of_what_a_schema_allows_may_come() -> None:
    """All but values whose properties stand in another order than the schema's."""
    found = [(case, compiled(Constraint.json_schema, case["schema"])) for case in SCHEMAS]
    used = [(case, one[1]) for case, one in found if one is not None]
    assert len(used) >= 160
    possible = [
        takes(guide, json.dumps(value, ensure_ascii=False)) for case, guide in used for value in case["valid"]
    ]
    assert sum(possible) >= 0.93 * len(possible)


def test_python_s_own_patterns(model: BltModel) -> None:
    """The tests of Python's `re`: what a pattern does not match as a whole never comes, what it does may."""
    suite = pytest.importorskip("test.re_tests")
    used = 0
    for pattern, text, outcome, *_ in suite.tests:
        if outcome == suite.SYNTAX_ERROR or not isinstance(text, str) or "\n" in pattern:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                oracle = re.compile(pattern)
        except (re.error, ValueError):
            continue
        found = compiled(Constraint.regex, pattern)
        # Where a pattern stands in a longer text: nothing here, where it is the whole.
        if found is None or re.search(r"[$^]|\\[AZbB]|\(\?[a-z]", pattern):
            continue
        constraint, guide = found
        used += 1
        assert takes(guide, text) == bool(oracle.fullmatch(text)), (pattern, text)
        made = fitting(model, constraint, float(used % 2))
        assert made is None or oracle.fullmatch(made), (pattern, made)
    assert used >= 100
