"""Checked reading of an untrusted JSON object: each field is typed, ranged, and used or else refused by name.

Knows nothing of BLT. `Fields` remembers which fields were read, so that `refuse_unknown` can name the rest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ..runtime.errors import BltError

__all__ = ["ConfigError", "Fields", "show"]

_MISSING: Any = object()


class ConfigError(BltError, ValueError):
    """A model's config has a value that is malformed or unsupported; the message starts with its path."""


class Fields:
    """One JSON object of a config, with its path for messages (`decoder_config.`; empty at the top).

    Each reader takes the default for a missing field. Where `nullable` is not set, an explicit null is
    refused, with one exception: a reader whose default is None is always nullable.
    """

    def __init__(self, raw: Any, path: str = "") -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{path or 'config'}: got {show(raw)}, expected a JSON object")
        self._raw = raw
        self._prefix = f"{path}." if path else ""
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """The field's full path as messages print it, e.g. `decoder_config.cross_attn_k`."""
        return self._prefix + name

    def has(self, name: str) -> bool:
        """Whether the field is present and not null. Does not count as reading it."""
        return self._raw.get(name) is not None

    def names(self) -> Collection[str]:
        """The fields that are present, null ones included."""
        return self._raw.keys()

    def raw(self, name: str, default: Any = None) -> Any:
        """The field's unchecked value; counts as reading it."""
        self._read.add(name)
        return self._raw.get(name, default)

    def refuse(self, name: str, allowed: str) -> ConfigError:
        """The error for a field's present value: what was got, and what is allowed."""
        return ConfigError(f"{self.path(name)}: got {show(self._raw.get(name))}, allowed: {allowed}")

    def section(self, name: str) -> Fields:
        """A nested object; missing and null are an empty one."""
        value = self.raw(name)
        return Fields({} if value is None else value, self.path(name))

    def integer(
        self, name: str, default: int | None = _MISSING, *, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> int:
        """An integer within [minimum, maximum]; bool and float are no integers."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.refuse(name, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> int | None:
        """Like `integer`, but an explicit null gives None."""
        if self.raw(name, default) is None:
            return None
        return self.integer(name, default, minimum=minimum, maximum=maximum)

    def number(
        self,
        name: str,
        default: float | None = _MISSING,
        *,
        above: float = -math.inf,
        below: float = math.inf,
    ) -> float:
        """A finite number strictly between `above` and `below`; bool is no number."""
        value = self._value(name, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not _finite(value) or not above < value < below:
            limits = [f"above {above:g}"] * math.isfinite(above) + [f"below {below:g}"] * math.isfinite(below)
            raise self.refuse(name, " ".join(["a finite number", *limits]))
        return float(value)

    def optional_number(
        self, name: str, default: float | None = None, *, above: float = -math.inf, below: float = math.inf
    ) -> float | None:
        """Like `number`, but an explicit null gives None."""
        if self.raw(name, default) is None:
            return None
        return self.number(name, default, above=above, below=below)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; null is false, as it is in transformers."""
        value = self.raw(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return bool(value)

    def choice(self, name: str, default: str, allowed: Collection[str]) -> str:
        """A string out of `allowed`; anything else is refused with the list."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.refuse(name, ", ".join(sorted(allowed)))
        return value

    def integers(self, name: str, *, minimum: int, maximum: int, longest: int) -> tuple[int, ...] | None:
        """A list of 1 to `longest` integers; None where it is missing, null or empty."""
        value = self.raw(name)
        if value is None or value == []:
            return None
        allowed = f"a list of at most {longest} integers from {minimum} to {maximum}"
        if not isinstance(value, (list, tuple)) or len(value) > longest:
            raise self.refuse(name, allowed)
        if not all(type(item) is int and minimum <= item <= maximum for item in value):
            raise self.refuse(name, allowed)
        return tuple(value)

    def refuse_unknown(self, inert: Collection[str]) -> None:
        """Refuse, by name, a field that was not read, is not in `inert`, and is not switched off.

        null, false, 0, and an empty string, list or object count as off.
        """
        for name, value in self._raw.items():
            if name in self._read or name in inert or not value:
                continue
            field = str(name) if str(name).isprintable() and len(str(name)) <= 80 else show(name)
            raise ConfigError(
                f"{self.path(field)}: got {show(value)}, but this field is not known here, so the model "
                "may compute something else; remove it if it has no effect"
            )

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw(name, default)
        if value is _MISSING:
            raise ConfigError(f"{self.path(name)}: missing, and it has no default")
        return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def show(value: Any) -> str:
    """An untrusted value for a message: one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
