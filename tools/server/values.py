"""Single values of a request, checked: each is what the runtime takes, or refused by the parameter's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ...runtime import GenerationOptions, OptionError
from ...runtime.fields import checked_flag, checked_int
from .refusals import invalid

T = TypeVar("T")
_Types = type | tuple[type, ...]


def text_bytes(name: str, text: str) -> bytes:
    """A text as UTF-8. Raises ApiError for one with half a character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        advice = "bytes that are no text go as a list of byte values" if name == "prompt" else "leave it out"
        raise invalid(f"{name} has half a character, {half}, at {error.start}; {advice}", name) from None


def option(name: str, value: Any, types: _Types) -> Any:
    """A value as the field of `GenerationOptions` by that name takes it. Raises ApiError."""

    def check(name: str, value: Any) -> Any:
        return getattr(GenerationOptions(**{name: value}), name)

    return _checked(check, name, value, types=types)


def flag(name: str, given: Mapping[str, Any]) -> bool:
    """A boolean that may be left out, which is false. Raises ApiError."""
    return _checked(checked_flag, name, given.get(name, False), types=())


def whole(name: str, value: Any, least: int, most: int | None) -> int:
    """A whole number from `least` to `most`. Raises ApiError."""
    return _checked(checked_int, name, value, least, most, types=(int, float))


def _checked(check: Callable[..., T], name: str, value: Any, *limits: int | None, types: _Types) -> T:
    """What `check` makes of a value of one of the types. Raises ApiError."""
    try:
        return check(name, value, *limits)
    except OptionError as error:
        fits = isinstance(value, types) and not isinstance(value, bool)
        raise invalid(str(error), name, "invalid_value" if fits else "invalid_type") from None
