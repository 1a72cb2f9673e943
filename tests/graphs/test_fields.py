"""Every reader of a config's fields: what it takes, up to which edge, and what it says of the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest
from blt_edge.graphs.fields import ConfigError
from blt_edge.graphs.fields import ConfigFields as Fields
from blt_edge.runtime.fields import shown

NOTHING = object()
NO_INTEGERS = [True, False, 1.5, "1", [1], {}, math.nan]
NO_NUMBERS = [math.inf, -math.inf, math.nan, 10**400, -(10**400), True, False, "1.0", [], {}]
ABOVE_1 = {"above": 1.0}
ABC = {"allowed": ("c", "b", "a"), "default": "a"}
LIST = {"minimum": 2, "maximum": 5, "longest": 3}


@pytest.mark.parametrize(
    ("method", "options", "good", "bad", "needed"),
    [
        (
            "integer",
            {},
            [1, 2**31 - 1],
            [0, 2**31, None, *NO_INTEGERS],
            "a whole number from 1 to 2147483647",
        ),
        ("integer", {"minimum": -3, "maximum": 4}, [-3, 4], [-4, 5], "a whole number from -3 to 4"),
        ("integer", {"default": 7}, [(NOTHING, 7), (2.0, 2)], [None], "a whole number from 1 to 2147483647"),
        ("optional_integer", {}, [1, 2**31 - 1, None, (NOTHING, None)], [0, 2**31, *NO_INTEGERS], "a whole"),
        ("optional_integer", {"default": 7}, [(NOTHING, 7), None], [0], "a whole number"),
        ("number", {}, [0.0, -1.5, 5e-324], [None, *NO_NUMBERS], "a finite number"),
        (
            "number",
            {**ABOVE_1, "below": 3.0, "default": 7},
            [math.nextafter(1, 2), 2.0, math.nextafter(3, 2)],
            [1, 3, 0.5, 3.5, NOTHING],
            "a finite number above 1 below 3",
        ),
        ("optional_number", {}, [0.0, -1.5, None, (NOTHING, None)], NO_NUMBERS, "a finite number"),
        (
            "optional_number",
            {**ABOVE_1, "default": 7},
            [(NOTHING, 7.0), None],
            [1.0],
            "a finite number above 1",
        ),
        (
            "boolean",
            {"default": True},
            [True, False, (None, False), (NOTHING, True)],
            [0, 1, "true"],
            "true or",
        ),
        ("boolean", {"default": False}, [True, (NOTHING, False)], [[], 0.0], "true or false"),
        ("choice", ABC, ["b", (NOTHING, "a")], ["d", None, 1, ["a"]], "one of c, b, a"),
        (
            "integers",
            LIST,
            [([2, 5, 3], (2, 5, 3)), ([2.0], (2,)), (4,), None, ([], None), (NOTHING, None)],
            [[2, 3, 4, 5], [1], [6], [True], [2.5], ["2"], "234", 3, {2: 3}, [2, None]],
            "a list of at most 3 whole numbers from 2 to 5",
        ),
    ],
)
def test_what_a_field_may_hold(
    method: str, options: dict[str, Any], good: list[Any], bad: list[Any], needed: str
) -> None:
    def read(value: Any) -> Any:
        fields = Fields({} if value is NOTHING else {"x": value}, "part")
        return getattr(fields, method)("x", **options)

    for case in good:
        value, wanted = case if isinstance(case, tuple) and len(case) == 2 else (case, case)
        found = read(value)
        assert found == wanted
        assert type(found) is type(wanted)
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            read(value)
        got = options.get("default") if value is NOTHING else value
        assert str(caught.value).startswith(f"part.x: got {shown(got, 80)}, allowed: {needed}")


def test_missing_fields_are_named() -> None:
    for method in ("integer", "number"):
        with pytest.raises(ConfigError, match=r"^part\.x: missing, and it has no default$"):
            getattr(Fields({}, "part"), method)("x")
    with pytest.raises(ConfigError, match=r"^part: got 3, allowed: an object$"):
        Fields(3, "part")
    with pytest.raises(ConfigError, match=r"^config: got \[\], allowed: an object$"):
        Fields([])


def test_sections_and_what_is_there() -> None:
    fields = Fields({"a": {"b": 1, "c": None}, "n": None, "z": 0}, "top")
    inner = fields.section("a")
    assert inner.path("b") == "top.a.b"
    assert Fields({}).path("b") == "b"
    assert [inner.has(name) for name in "bcd"] == [True, False, False]
    assert [fields.has(name) for name in "anz"] == [True, False, True]
    assert ("c" in inner, "d" in inner, "a" in fields.section("n")) == (True, False, False)
    assert [fields.raw("z"), fields.raw("q"), fields.raw("q", 5)] == [0, None, 5]
    with pytest.raises(ConfigError, match=r"^top\.z: got 0, allowed: an object$"):
        fields.section("z")


def test_only_what_is_off_read_or_ignored_may_be_there() -> None:
    def left(name: Any, value: Any) -> None:
        fields = Fields({"known": 1, "ignored": 2, name: value}, "part")
        fields.raw("known")
        fields.refuse_unknown({"ignored"})

    for value in (None, False, 0, 0.0, "", [], {}):
        left("new", value)
    with pytest.raises(ConfigError, match=r"^part\.new: got 'on', but this field is not known here, so "):
        left("new", "on")
    for name, said in (
        ("n" * 80, "n" * 80),
        ("n" * 81, "'" + "n" * 76 + "..."),
        ("a\nb", r"'a\nb'"),
        (7, "7"),
    ):
        with pytest.raises(ConfigError) as caught:
            left(name, 1)
        assert str(caught.value).startswith(f"part.{said}: got 1, but")
    fields = Fields({"x": 1, "y": 2})
    fields.has("x")  # does not count as reading it
    with pytest.raises(ConfigError, match=r"^x: "):
        fields.refuse_unknown({"y"})


def test_values_are_shown_on_one_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 78, 80) == "'" + "x" * 78 + "'"
    assert shown("x" * 79, 80) == "'" + "x" * 76 + "..."
    assert len(shown("x" * 1000)) == 60
    assert [shown({"a": 1}), shown(10**1000)] == ["an object", "a huge number"]
