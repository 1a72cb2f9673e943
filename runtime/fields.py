"""Checked values: options that people give, and JSON objects that nobody vouches for.

`checked_int` and its like take one option and return a plain Python value, or raise an `OptionError` of one
line: what was got, what is allowed. `parse_json` reads a file's text, and `Fields` one JSON object field by
field, with nothing left over; it knows types, ranges and how a fault is worded. What fields there are is the
business of its users.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

from .errors import BltError, BundleError, OptionError, first_line
from .names import MANIFEST_NAME

__all__ = [
    "AGAIN",
    "MAX_JSON_BYTES",
    "Fields",
    "by",
    "checked_bytes",
    "checked_call",
    "checked_flag",
    "checked_int",
    "checked_real",
    "checked_texts",
    "fault",
    "file_name",
    "if_there",
    "is_whole",
    "parse_json",
    "plain_text",
    "read",
    "record",
    "shown",
]

AGAIN = "export the checkpoint again"

MAX_JSON_BYTES = 4 << 20
"""The longest JSON that is read from a file: a model of 1000 layers in four stages needs no more, and
what its text says can take 30 times the memory."""
_MAX_DEPTH = 64

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 4096
_MAX_NUMBER = 1e30
REQUIRED: Any = object()
"""The default of a field that has none."""

T = TypeVar("T")


# 1. Options.


def checked_int(name: str, value: object, minimum: int, maximum: int | None = None, *, hint: str = "") -> int:
    """`value` as an int from minimum to maximum (None: no bound). A bool is refused: True for 1 is nearly
    always a mistake.

    `hint` is added to the message's description of what is allowed, e.g. "0 turns it off".
    """
    bounds = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if minimum <= number and (maximum is None or number <= maximum):
            return number
    raise _outside(name, value, f"a whole number {bounds}", hint)


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
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
            too_low = number <= minimum if above_minimum else number < minimum
            if math.isfinite(number) and not too_low and number <= maximum:
                return number
    raise _outside(name, value, " ".join(["a finite number", " and ".join(bounds)]).strip(), hint)


def checked_flag(name: str, value: object) -> bool:
    """`value` if it is True or False; numbers and strings are refused."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {shown(value)}; allowed is true or false")
    return value


def checked_bytes(name: str, value: object) -> bytes:
    """`value` as bytes: of a str its UTF-8, where surrogate escapes are the bytes that they stand for."""
    if isinstance(value, str):
        try:
            return value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise OptionError(f"{name} {shown(value)} is not valid text; give it as bytes") from None
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise OptionError(f"{name} is {shown(value)}; allowed are strings and bytes")
    return bytes(value)


def checked_texts(name: str, value: Iterable[str | bytes]) -> Iterable[str | bytes]:
    """Many texts, as they were given. Raises OptionError for one text, which would be gone through character
    by character, and for what can't be gone through."""
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Iterable):
        raise OptionError(f"{name} is {shown(value)}; allowed are many texts: put a single one into a list")
    return value


def checked_call(name: str, value: object) -> None:
    """Refuse what is neither None nor can be called."""
    if value is not None and not callable(value):
        raise OptionError(f"{name} is {shown(value)}; allowed is a function, or None")


def _outside(name: str, value: object, allowed: str, hint: str) -> OptionError:
    return OptionError(f"{name} is {shown(value)}; allowed is {allowed}" + (f" ({hint})" if hint else ""))


def shown(value: object, longest: int = 60) -> str:
    """`value` for a message: one line, at most so many characters; of a big one, only what it is."""
    if isinstance(value, dict):
        return "an object"
    # Python refuses to print numbers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def plain_text(text: str, most: int = _MAX_TEXT) -> str:
    """Text as `Fields.text` takes it back: "?" for what a terminal would obey, and for nothing."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most]) or "?"


# 2. JSON objects.


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What JSON says. `pairs` makes an object of its fields, where that is to be another than a dict.

    Raises ValueError with a reason of one line, also for what is longer than `MAX_JSON_BYTES`, or nested
    deeper than any writer nests: whatever walks over the value, one call a level, comes to its end.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(first_line(error)) from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for holder in level for item in _items(holder) if isinstance(item, (dict, list))]
    if level:
        raise ValueError("nested too deep")
    return value


def _items(holder: Any) -> Iterable[Any]:
    if isinstance(holder, dict):
        return holder.values()
    return holder if isinstance(holder, list) else ()


def fault(path: str, value: object, needed: str) -> BundleError:
    """The error for a bad value, one line: its place, what was got, what is needed, what to do."""
    place = f"{MANIFEST_NAME}: {path}" if path else MANIFEST_NAME
    return BundleError(f"{place}: got {shown(value)}, {needed} is needed; {AGAIN}")


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether it is a JSON whole number in the range (true and 1.0 are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def file_name(value: object, where: str) -> str:
    """A name that can only mean a visible file of the bundle's own directory, on every system."""
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value) or value.lower() == MANIFEST_NAME:
        raise fault(where, value, "a plain file name (letters, digits, '.', '_', '-') inside the bundle")
    return value


def read(value: object, path: str, reader: Callable[[Fields], T]) -> T:
    """Let `reader` take the fields of one object, then refuse what it did not take."""
    fields = Fields(value, path)
    result = reader(fields)
    fields.refuse_rest()
    return result


class Fields:
    """One JSON object and its place. Each method takes a field and checks it, or raises what `refusal` says.

    A missing field is refused, unless a default is given.
    """

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, Mapping):
            raise self.refusal(path, value, "an object")
        self._values, self._path, self._unread = value, path, dict.fromkeys(value)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def path(self, key: str) -> str:
        """The field's full path as messages print it, e.g. `decoder_config.cross_attn_k`."""
        return f"{self._path}.{key}" if self._path else key

    def refusal(self, path: str, value: object, needed: str) -> BltError:
        return fault(path, value, needed)

    def missing(self, path: str) -> BltError:
        return BundleError(f"{MANIFEST_NAME}: {path} is missing; {AGAIN}")

    def refuse_rest(self) -> None:
        """Refuse a field that nobody took."""
        for key in self._unread:
            place = f"{MANIFEST_NAME}: {self._path}" if self._path else MANIFEST_NAME
            raise BundleError(f"{place}: got a field {shown(key)}, which its schema does not have; {AGAIN}")

    def whole(self, key: str, low: int, high: int, default: Any = REQUIRED) -> int:
        value, where = self.take(key, default)
        if not is_whole(self.as_whole(value), low, high):
            raise self.refusal(where, value, f"a whole number from {low} to {high}")
        return int(value)

    def as_whole(self, value: Any) -> Any:
        """What counts as a whole number: of what we wrote ourselves, only that."""
        return value

    def whole_or_none(self, key: str, low: int, high: int) -> int | None:
        return None if self._took_null(key) else self.whole(key, low, high)

    def number(
        self, key: str, default: Any = REQUIRED, *, above: float = -math.inf, below: float = math.inf
    ) -> float:
        """A finite number strictly between the two."""
        value, where = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < below:
            limits = [f"above {above:g}"] * math.isfinite(above) + [f"below {below:g}"] * math.isfinite(below)
            raise self.refusal(where, value, " ".join(["a finite number", *limits]))
        try:
            return float(value)
        except OverflowError:
            raise self.refusal(where, value, "a finite number") from None

    def number_or_none(self, key: str) -> float | None:
        return None if self._took_null(key) else self.number(key, above=-_MAX_NUMBER, below=_MAX_NUMBER)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        value, where = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refusal(where, value, "true or false")
        return value

    def text(self, key: str, most: int = _MAX_TEXT) -> str:
        """Text of at most so many characters that is safe to print."""
        value, where = self.take(key)
        if not isinstance(value, str) or not 1 <= len(value) <= most or not value.isprintable():
            raise self.refusal(where, value, f"printable text of 1 to {most} characters")
        return value

    def text_or_none(self, key: str, most: int = _MAX_TEXT) -> str | None:
        return None if self._took_null(key) else self.text(key, most)

    def texts(self, key: str, most: int) -> tuple[str, ...]:
        """A list of up to `most` texts that are safe to print."""
        value, where = self.take(key)
        if not isinstance(value, list) or len(value) > most:
            raise self.refusal(where, value, f"a list of at most {most} texts")
        return tuple(Fields({"": item}, f"{where}[{index}]").text("") for index, item in enumerate(value))

    def choice(self, key: str, allowed: Collection[str], default: Any = REQUIRED) -> str:
        value, where = self.take(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.refusal(where, value, f"one of {', '.join(allowed)}")
        return value

    def digest(self, key: str) -> str:
        value, where = self.take(key)
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            raise self.refusal(where, value, "a sha256 of 64 small hexadecimal digits")
        return value

    def file_name(self, key: str) -> str:
        return file_name(*self.take(key))

    def wholes(self, key: str, low: int, high: int, most: int, default: Any = REQUIRED) -> tuple[int, ...]:
        """A list of up to `most` whole numbers in the range."""
        value, where = self.take(key, default)
        short = isinstance(value, (list, tuple)) and len(value) <= most
        if not short or not all(is_whole(self.as_whole(item), low, high) for item in value):
            needed = f"a list of at most {most} whole numbers from {low} to {high}"
            raise self.refusal(where, value, needed)
        return tuple(map(int, value))

    def tree(self, key: str) -> dict[str, Any]:
        value, where = self.take(key)
        if not isinstance(value, dict):
            raise self.refusal(where, value, "an object")
        return value

    def tree_or_none(self, key: str) -> dict[str, Any] | None:
        return None if self._took_null(key) else self.tree(key)

    def part(self, key: str, reader: Callable[[Fields], T]) -> T:
        value, where = self.take(key)
        return read(value, where, reader)

    def part_or_none(self, key: str, reader: Callable[[Fields], T]) -> T | None:
        return None if self._took_null(key) else self.part(key, reader)

    def parts(
        self, key: str, check_name: Callable[[object, str], str], reader: Callable[[Fields], T]
    ) -> dict[str, T]:
        """A map from checked names to objects of one kind."""
        values, where = self.tree(key), self.path(key)
        return {
            check_name(name, where): read(item, f"{where}.{name}", reader) for name, item in values.items()
        }

    def take(self, key: str, default: Any = REQUIRED) -> tuple[Any, str]:
        """The unchecked value, and its path."""
        self._unread.pop(key, None)
        value = self._values.get(key, default)
        if value is REQUIRED:
            raise self.missing(self.path(key))
        return value, self.path(key)

    def _took_null(self, key: str) -> bool:
        if self._values.get(key, 0) is not None:
            return False
        self.take(key)
        return True


# 3. Dataclasses that are read as their annotations say: `Annotated[int, by(Fields.whole, 1, 1000)]`.

Reader = Callable[[Fields, str], Any]
"""reader(fields, key) takes a field and checks it, or raises BundleError."""


def record(kind: type[T]) -> Callable[[Fields], T]:
    """What reads an object as a dataclass; a field without a reader is a dataclass of its own."""

    def reader(fields: Fields) -> T:
        return kind(**{name: take(fields, name) for name, take in _readers(kind).items()})  # type: ignore[arg-type]

    return reader


@cache
def _readers(kind: type) -> dict[str, Reader]:
    return {
        name: hint.__metadata__[0] if get_origin(hint) is Annotated else part(hint)
        for name, hint in get_type_hints(kind, include_extras=True).items()
    }


def part(kind: type) -> Reader:
    """Reads a field as a dataclass."""
    return by(Fields.part, record(kind))


def by(method: Callable[..., Any], *arguments: Any) -> Reader:
    """Reads a field with a method of `Fields`, given these arguments after its key."""
    return lambda fields, key: method(fields, key, *arguments)


def if_there(reader: Reader) -> Reader:
    """For a field that may be missing, which means None."""
    return lambda fields, key: reader(fields, key) if key in fields else None
