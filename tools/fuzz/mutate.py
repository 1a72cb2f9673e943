"""Spoils valid inputs: JSON by its structure and as text, bytes, and protocol buffers by their fields.

Everything is decided by the `random.Random` that is passed, so the same state spoils in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

SECRET = "secret.safetensors"
"""A file that lies in the directory above an input's: nobody has a reason to open it."""

NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 8, 64, 255, 256, 260, 261, 512, 4096, 65535, 65536, -1, -2, True, False, None),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**40),
    *(10**400, 0.5, 1.0, 2.0, 260.0, -0.0, 5e-324, 1e-30, 1e30, 1.7e308, math.nan, math.inf, -math.inf),
)
TEXTS = (
    "| |.|..|~|-|a/b|a\\b|C:x|\0|x\0.safetensors|null|true|NaN|1"
    f"|../{SECRET}|./../{SECRET}|..\\{SECRET}|//../{SECRET}|/etc/passwd|/dev/zero"
    "|/proc/self/mem|file:///etc/passwd|model.safetensors|manifest.json|__class__|%s%n{0}"
    "|\x1b[2J\x1b]0;x\x07|\r\nall checks passed|\u202egnp.\u200b|\ud800|\udfff\ud800|\U0010ffff|[red]x[/red]"
    f"|{'é' * 300}|{'x' * 5000}|{chr(0) * 100}|٣|1_0|1e3| 1|0x10|-1|{'9' * 30}"
).split("|")
_WORDS = b"NaN|-Infinity|1e999|-1e999|1E400|-0|01|0x10|1.|'x'|tru|".split(b"|")
RAW = (
    *(*_WORDS, b"9" * 5000, b"-" + b"9" * 4301, b"0." + b"0" * 4000 + b"1", b"[" * 200 + b"]" * 200),
    *(b"[" * 600 + b"]" * 600, b'{"a":' * 1100 + b"1" + b"}" * 1100, b"[" * 30_000 + b"]" * 30_000),
    *(b"[" * 30_000, *b'"\xff\xfe"|"\xed\xa0\x80"|"\\ud800"|"\\u0000"|"\n"|/*x*/1|\xef\xbb\xbf'.split(b"|")),
)
"""What stands in a JSON text in the place of a value, without being one."""
_CONTAINERS = (
    *(
        "[]",
        "{}",
        "[null]",
        "[[]]",
        '{"": null}',
        r'{"\ud800\n": {}}',
        f"[{'0,' * 3000}0]",
        f"[{'{},' * 50}0]",
    ),
)
_MARK = "@raw{}@"


# 1. JSON.


def spoil_json(random: Random, valid: Any, *, keys: Sequence[str] = (), most: int = 3) -> bytes:
    """The text of a JSON value with 1 to `most` changes in structure, and sometimes changed as text.

    keys: names that are worth adding where an object lacks them.
    """
    value = json.loads(json.dumps(valid))
    for _ in range(random.randint(1, most)):
        value = _spoil_tree(random, value, keys)
    text = json.dumps(value, ensure_ascii=random.random() < 0.7, indent=random.choice((None, 1)))
    data = text.encode("utf-8", "surrogatepass")
    for number, raw in enumerate(RAW):
        mark = b'"' + _MARK.format(number).encode() + b'"'
        if mark in data:
            data = data.replace(mark, raw)
    if random.random() < 0.1:
        data = _twice(random, data)
    if random.random() < 0.1:
        data = spoil_bytes(random, data, _WORDS)
    return data


def _spoil_tree(random: Random, tree: Any, keys: Sequence[str]) -> Any:
    places = list(_places(tree))
    if not places or random.random() < 0.01:
        return _hostile(random)
    holder, key = random.choice(places)
    how = random.randrange(9)
    if how < 3:
        holder[key] = _hostile(random)
    elif how < 5:
        holder[key] = _nudged(random, holder[key])
    elif how == 5:
        other, there = random.choice(places)
        holder[key] = json.loads(json.dumps(other[there]))
    elif how == 6:
        del holder[key]
    elif how == 7 and isinstance(holder, dict):
        name = random.choice(keys) if keys and random.random() < 0.7 else random.choice(TEXTS)
        holder[name] = holder.pop(key) if random.random() < 0.3 else _hostile(random)
    elif isinstance(holder, list):
        holder[key:key] = [holder[key]] * random.choice((1, 2, 100))
    else:
        holder[key] = random.choice(([holder[key]], {str(key): holder[key]}))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def _hostile(random: Random) -> Any:
    kind = random.randrange(10)
    if kind < 5:
        return random.choice(NUMBERS)
    if kind < 7:
        return random.choice(TEXTS)
    return _MARK.format(random.randrange(len(RAW))) if kind < 9 else json.loads(random.choice(_CONTAINERS))


def _nudged(random: Random, value: Any) -> Any:
    """A value that is nearly the same, of the same type or of one that looks like it."""
    if isinstance(value, bool) or value is None:
        return random.choice((not value, int(bool(value)), str(value).lower(), None))
    if isinstance(value, (int, float)):
        third, whole = (value / 3, value + 0.0) if abs(value) < 1e300 else (0.5, 0.0)
        steps = (value + 1, value - 1, -value, value * 2, value * 2**20, third, value // 2)
        return random.choice((*steps, whole, str(value), [value], bool(value)))
    if isinstance(value, str):
        at, piece = random.randint(0, len(value)), random.choice(TEXTS)
        changed = (value[:at] + piece + value[at:], value[:at], value.upper(), value * 50)
        return random.choice((*changed, [value]))
    if isinstance(value, list):
        return random.choice((value[::-1], value * 20, value[:1], dict(enumerate(map(str, value)))))
    return random.choice(([list(pair) for pair in value.items()], list(value), list(value.values())))


def _twice(random: Random, data: bytes) -> bytes:
    """An object's text with one of its members said twice."""
    at = data.find(b'": ', random.randrange(len(data) + 1))
    start, end = data.rfind(b'"', 0, max(at, 0)), data.find(b",", at)
    if at < 0 or start < 0 or end < 0:
        return data
    return data[: end + 1] + data[start : end + 1] + data[end + 1 :]


# 2. Bytes.


def spoil_bytes(random: Random, data: bytes, words: Sequence[bytes] = (), most: int = 4) -> bytes:
    """Bytes with 1 to `most` changes: bits, numbers, pieces cut, doubled, moved or filled in; `words` too."""
    found = bytearray(data)
    for _ in range(random.randint(1, most)):
        at, size = random.randint(0, len(found)), min(len(found), 1 << random.randrange(12))
        how = random.randrange(9 if words else 8)
        if how == 0:
            found[at : at + 1] = bytes(byte ^ 1 << random.randrange(8) for byte in found[at : at + 1])
        elif how == 1:
            width = random.choice((1, 2, 4, 8))
            number = random.choice((0, 1, 2, 2**7, 2**15, 2**31, 2**63, 2**64, 2 * len(found)))
            number = (number + random.choice((0, -1))) % (1 << 8 * width)
            found[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))
        elif how == 2:
            del found[at:]
        elif how == 3:
            del found[at : at + size]
        elif how == 4:
            found[at:at] = found[at : at + size]
        elif how == 5:
            start = random.randint(0, len(found))
            found[at : at + size] = found[start : start + size]
        elif how == 6:
            found[at : at + size] = random.randbytes(size)
        elif how == 7:
            found[at:at] = bytes([random.choice((0, 0x20, 0xFF, 0x80))]) * size
        else:
            found[at:at] = random.choice(words)
    return bytes(found)


# 3. Protocol buffers.


def spoil_message(random: Random, message: Any, most: int = 3) -> None:
    """Change 1 to `most` fields of a protobuf message or of those within, whatever its schema is.

    A kind of message is chosen first, so that the few that matter come as often as the many that do not.
    """
    for _ in range(random.randint(1, most)):
        kinds: dict[str, list[Any]] = {}
        for each in _messages(message):
            kinds.setdefault(each.DESCRIPTOR.name, []).append(each)
        chosen = random.choice(kinds[random.choice(sorted(kinds))])
        field = random.choice(chosen.DESCRIPTOR.fields)
        value = getattr(chosen, field.name)
        if hasattr(value, "extend"):
            _spoil_repeated(random, value, field, kinds)
        elif field.message_type is not None:
            other = _copy(random.choice(kinds.get(field.message_type.name) or [value]))
            chosen.ClearField(field.name)
            if random.random() < 0.7:
                getattr(chosen, field.name).CopyFrom(other)
        elif random.random() < 0.2:
            chosen.ClearField(field.name)
        else:
            setattr(chosen, field.name, _scalar(random, field, value))


def _copy(message: Any) -> Any:
    """One that does not go when what it was part of is cleared."""
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if hasattr(value, "extend") else [value]:
                yield from _messages(each)


def _spoil_repeated(random: Random, values: Any, field: Any, kinds: dict[str, list[Any]]) -> None:
    count, how = len(values), random.randrange(5)
    if how == 0 and count:
        del values[random.randrange(count)]
    elif how == 1 and count > 1:
        kept = [value if field.message_type is None else _copy(value) for value in values]
        random.shuffle(kept)
        del values[:]
        values.extend(kept)
    elif field.message_type is not None:
        others = list(values) or kinds.get(field.message_type.name, [])
        if others:
            values.add().CopyFrom(_copy(random.choice(others)))
    elif count and how < 4:
        at = random.randrange(count)
        values[at] = _scalar(random, field, values[at])
    else:
        values.extend([_scalar(random, field, 0)] * random.choice((1, 5, 1000)))


def _scalar(random: Random, field: Any, value: Any) -> Any:
    if field.type == field.TYPE_STRING:
        near = [_nudged(random, value) for _ in range(3)] if isinstance(value, str) else []
        texts = [text for text in (*near, *TEXTS) if isinstance(text, str)]
        return random.choice(texts).encode("utf-8", "replace").decode()
    if field.type == field.TYPE_BYTES:
        return spoil_bytes(random, value) if isinstance(value, bytes) else random.randbytes(16)
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return random.choice((0.0, -1.0, 1e30, math.nan, math.inf, 1e-40))
    if field.cpp_type == field.CPPTYPE_ENUM:
        return random.choice(field.enum_type.values).number
    bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    low = 0 if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else -(1 << bits - 1)
    high = low + (1 << bits) - 1
    numbers = (0, 1, 2, 3, 7, 11, 16, 64, 4096, 2**31 - 1, low, high, -1, value + 1, value - 1, value * 2**16)
    return min(max(random.choice(numbers), low), high)
