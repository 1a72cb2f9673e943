"""A model's config, field by field: defaults and nulls as in transformers, errors with a field's path."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from ..runtime.errors import BltError
from ..runtime.fields import REQUIRED, Fields, shown

__all__ = ["ConfigError", "ConfigFields", "as_whole"]


class ConfigError(BltError, ValueError):
    """A model's config has a value that is malformed or unsupported; the message starts with its path."""


def as_whole(value: Any) -> Any:
    """A whole number as an int, anything else as it is: JSON has one kind, and tools write 260 or 260.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class ConfigFields(Fields):
    """One JSON object of a config. Each reader takes the default for a missing field, and refuses null; those
    called optional give None for it.
    """

    def refusal(self, path: str, value: object, needed: str) -> ConfigError:
        """What was got, and what is allowed."""
        return ConfigError(f"{path or 'config'}: got {shown(value, 80)}, allowed: {needed}")

    def missing(self, path: str) -> ConfigError:
        return ConfigError(f"{path}: missing, and it has no default")

    def refuse(self, name: str, allowed: str) -> ConfigError:
        return self.refusal(self.path(name), self._values.get(name), allowed)

    def has(self, name: str) -> bool:
        """Whether the field is present and not null. Does not count as reading it."""
        return self._values.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:
        """The field's unchecked value; counts as reading it."""
        return self.take(name, default)[0]

    def as_whole(self, value: Any) -> Any:
        return as_whole(value)

    def section(self, name: str) -> ConfigFields:
        """A nested object; missing and null are an empty one."""
        value = self.raw(name)
        return ConfigFields({} if value is None else value, self.path(name))

    def integer(
        self, name: str, default: Any = REQUIRED, *, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> int:
        return self.whole(name, minimum, maximum, default)

    def optional_integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> int | None:
        return None if self.raw(name, default) is None else self.whole(name, minimum, maximum, default)

    def optional_number(
        self, name: str, default: float | None = None, *, above: float = -math.inf
    ) -> float | None:
        return None if self.raw(name, default) is None else self.number(name, default, above=above)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; null is false, as it is in transformers."""
        return self.raw(name, default) is not None and self.flag(name, default)

    def integers(self, name: str, *, minimum: int, maximum: int, longest: int) -> tuple[int, ...] | None:
        """A list of whole numbers; None where it is missing, null or empty."""
        return self.wholes(name, minimum, maximum, longest) if self.raw(name) not in (None, []) else None

    def refuse_unknown(self, ignored: Collection[str]) -> None:
        """Refuse, by name, a field that was not read, is not in `ignored`, and is not switched off.

        null, false, 0, and an empty string, list or object count as off.
        """
        for name in self._unread:
            value = self._values[name]
            if name in ignored or not value:
                continue
            field = str(name) if str(name).isprintable() and len(str(name)) <= 80 else shown(name, 80)
            raise ConfigError(
                f"{self.path(field)}: got {shown(value, 80)}, but this field is not known here, so the model "
                "may compute something else; remove it if it has no effect"
            )
