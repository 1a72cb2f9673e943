"""Every reader of a config's fields: what it takes, up to which edge, and what it says of the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest
from blt_edge.graphs.fields import ConfigError
from blt_edge.graphs.fields import ConfigFields as Fields
from blt_edge.runtime.fields import shown


def read(method: str, value: Any, *arguments: Any, **options: Any) -> Any:
    return getattr(Fields({"x": value}, "part"), method)("x", *arguments, **options)


def refused(method: str, value: Any, allowed: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read(method, value, *arguments, **options)
    assert str(caught.value) == f"part.x: got {shown(value, 80)}, allowed: {allowed}"


NO_INTEGERS = [True, False, 1.0, "1", [1], {}, math.nan]


@pytest.mark.parametrize("method", ["integer", "optional_integer"])
def test_integers_within_their_bounds(method: str) -> None:
    for value in (1, 2, 2**31 - 1):
        assert read(method, value) == value
    for value in (-3, 4):
        assert read(method, value, minimum=-3, maximum=4) == value
    for value in (0, -1, 2**31, *NO_INTEGERS):
        refused(method, value, f"a whole number from 1 to {2**31 - 1}")
    for value in (-4, 5):
        refused(method, value, "a whole number from -3 to 4", minimum=-3, maximum=4)
    assert getattr(Fields({}), method)("x", 7) == 7
    refused("integer", None, f"a whole number from 1 to {2**31 - 1}")
    assert read("optional_integer", None, 7) is None
    assert Fields({}).optional_integer("x") is None
    assert Fields({}).optional_number("x") is None


@pytest.mark.parametrize("method", ["number", "optional_number"])
def test_numbers_strictly_between_their_bounds(method: str) -> None:
    for value in (0, -1.5, 10**300, 5e-324):
        found = read(method, value)
        assert found == float(value)
        assert type(found) is float
    for value in (math.inf, -math.inf, math.nan, 10**400, -(10**400), True, False, "1.0", [], {}):
        refused(method, value, "a finite number")
    for value in (1, 3, 0.5, 3.5):
        if method == "number":
            refused(method, value, "a finite number above 1 below 3", above=1, below=3)
    refused(method, 1.0, "a finite number above 1", above=1.0)
    for value in (math.nextafter(1, 2), 2, math.nextafter(3, 2)):
        assert read("number", value, above=1, below=3) == value
    assert getattr(Fields({}), method)("x", 7) == 7.0
    refused("number", None, "a finite number")
    assert read("optional_number", None, 7.0) is None


def test_flags_choices_and_lists() -> None:
    assert [read("boolean", value, True) for value in (True, False, None)] == [True, False, False]
    assert [Fields({}).boolean("x", default) for default in (True, False)] == [True, False]
    for value in (0, 1, "true", [], 0.0):
        refused("boolean", value, "true or false", False)
    assert read("choice", "b", ("c", "b", "a"), "a") == "b"
    assert Fields({}).choice("x", ("b", "a"), "a") == "a"
    for value in ("d", None, 1, ["a"]):
        refused("choice", value, "one of c, b, a", ("c", "b", "a"), "a")
    bounds: dict[str, int] = {"minimum": 2, "maximum": 5, "longest": 3}
    assert read("integers", [2, 5, 3], **bounds) == (2, 5, 3)
    assert read("integers", (4,), **bounds) == (4,)
    assert [read("integers", value, **bounds) for value in (None, [])] == [None, None]
    assert Fields({}).integers("x", **bounds) is None
    for value in ([2, 3, 4, 5], [1], [6], [True], [2.0], ["2"], "234", 3, {2: 3}, [2, None]):
        refused("integers", value, "a list of at most 3 whole numbers from 2 to 5", **bounds)


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


def test_only_what_is_off_read_or_inert_may_be_there() -> None:
    def left(name: Any, value: Any) -> None:
        fields = Fields({"known": 1, "inert": 2, name: value}, "part")
        fields.raw("known")
        fields.refuse_unknown({"inert"})

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
