"""Checked values come back as plain numbers; a refusal says what was got and what is allowed."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from blt_edge.runtime.errors import BltError, OptionError
from blt_edge.runtime.fields import checked_flag, checked_int, checked_real, parse_json


@pytest.mark.parametrize("value", [3, np.int32(3), np.uint8(3)])
def test_whole_numbers_become_int(value: object) -> None:
    checked = checked_int("n", value, 3)
    assert checked == 3
    assert type(checked) is int


@pytest.mark.parametrize("value", [2, -1, True, np.True_, 3.0, "3", None, b"3", float("nan"), [3]])
def test_other_values_are_no_int(value: object) -> None:
    with pytest.raises(OptionError, match=r"^n is .*; allowed is a whole number >= 3 \(0 = off\)$"):
        checked_int("n", value, 3, hint="0 = off")


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_real_numbers_become_float(value: object) -> None:
    checked = checked_real("x", value, 0, 1)
    assert checked == 0.5
    assert type(checked) is float


def test_bounds_belong_to_the_range_unless_said_otherwise() -> None:
    assert checked_real("x", 0, 0, 1) == 0.0
    assert checked_real("x", 1, 0, 1) == 1.0
    with pytest.raises(OptionError, match=r"^x is 0; allowed is a finite number > 0 and <= 1$"):
        checked_real("x", 0, 0, 1, above_minimum=True)


@pytest.mark.parametrize(
    "value", [-0.1, 1.5, True, "0.5", None, 1j, math.nan, math.inf, -math.inf, np.float32("nan"), 10**999]
)
def test_other_values_are_no_real(value: object) -> None:
    with pytest.raises(OptionError, match=r"^x is .*; allowed is a finite number >= 0 and <= 1$"):
        checked_real("x", value, 0, 1)


def test_without_bounds_any_finite_number_will_do() -> None:
    assert checked_real("x", -1e300) == -1e300
    with pytest.raises(OptionError, match=r"^x is nan; allowed is a finite number$"):
        checked_real("x", float("nan"))


@pytest.mark.parametrize("value", [1, 0, None, "true", np.True_])
def test_only_true_and_false_are_flags(value: object) -> None:
    assert checked_flag("f", True) is True
    assert checked_flag("f", False) is False
    with pytest.raises(OptionError, match=r"^f is .*; allowed is true or false$"):
        checked_flag("f", value)


def test_a_message_is_one_short_line_whatever_was_given() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    class Tall:
        def __repr__(self) -> str:
            return "a\nb\n" * 1000

    for value in (Rude(), Tall(), "x" * 10_000, np.zeros((100, 100))):
        with pytest.raises(OptionError) as caught:
            checked_int("n", value, 0)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 150


def test_option_errors_are_of_both_families() -> None:
    assert issubclass(OptionError, BltError)
    assert issubclass(OptionError, ValueError)


def test_json_is_read_up_to_a_depth_that_every_walk_survives() -> None:
    deep: object = 1
    for _ in range(64):
        deep = [deep]
    assert parse_json(json.dumps(deep)) == deep
    for depth in (65, 600, 100_000):
        for start, end in (("[", "]"), ('{"a":', "}")):
            with pytest.raises(ValueError, match=r"^nested too deep$"):
                parse_json(start * depth + "1" + end * depth)
    for broken in ("", "{", b"\xff", "9" * 10_000, '{"a" 1}'):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            parse_json(broken)
    assert parse_json(b'{"a":1,"a":2}', tuple) == (("a", 1), ("a", 2))
