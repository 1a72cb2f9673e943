"""Checks of single values that people and files give: options, rules, specifications.

Each returns the value as a plain Python number, so that it prints and serialises the same wherever
it came from, or raises an `OptionError` of one line: what was got, what is allowed.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

from .errors import OptionError

__all__ = ["checked_flag", "checked_int", "checked_real", "shown"]


def checked_int(name: str, value: object, minimum: int, maximum: int | None = None, *, hint: str = "") -> int:
    """`value` as an int from minimum to maximum (None: no bound). A bool is refused: True for 1 is nearly
    always a mistake.

    `hint` is added to the message's description of what is allowed, e.g. "0 turns it off".
    """
    bounds = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    allowed = _allowed(f"a whole number {bounds}", hint)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(f"{name} is {shown(value)}; allowed is {allowed}")
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        raise OptionError(f"{name} is {shown(value)}; allowed is {allowed}")
    return number


def checked_real(
    name: str,
    value: object,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    above_minimum: bool = False,
    hint: str = "",
) -> float:
    """`value` as a finite float in [minimum, maximum], or (minimum, maximum] with `above_minimum`.

    NaN, infinities and bools are refused. Infinite bounds mean no bound.
    """
    bounds = []
    if minimum > -math.inf:
        bounds.append(f"{'>' if above_minimum else '>='} {minimum:g}")
    if maximum < math.inf:
        bounds.append(f"<= {maximum:g}")
    allowed = _allowed(" ".join(["a finite number", " and ".join(bounds)]).strip(), hint)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(f"{name} is {shown(value)}; allowed is {allowed}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    too_low = number <= minimum if above_minimum else number < minimum
    if not math.isfinite(number) or too_low or number > maximum:
        raise OptionError(f"{name} is {shown(value)}; allowed is {allowed}")
    return number


def checked_flag(name: str, value: object) -> bool:
    """`value` if it is True or False; numbers and strings are refused."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {shown(value)}; allowed is true or false")
    return value


def _allowed(range_text: str, hint: str) -> str:
    return f"{range_text} ({hint})" if hint else range_text


def shown(value: object) -> str:
    """`value` for a message: one line, at most 60 characters."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
