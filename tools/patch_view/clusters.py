"""A text's bytes as what people see: characters, and clusters of them shown as one. Knows no patches.

Bytes that are no UTF-8 stay single bytes. Marks that combine, joined emoji, flags and Hangul letters stay
with what they belong to (near to Unicode's grapheme clusters, in far fewer rules). What a terminal or a
browser would obey, or nobody could see, is written as an escape.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

MOST_BYTES = 48
"""A cluster is never longer, however many marks a character carries."""

_JOINERS = "\u200c\u200d"
_SIGNS = {"\n": "\u23ce", "\t": "\u21e5", "\x7f": "\u2421"}


@dataclass(frozen=True)
class Character:
    """One character, or one byte that belongs to none."""

    start: int
    """Position of its first byte."""
    end: int
    """Position behind its last byte."""
    text: str | None
    """The character, or a cluster's characters; None for a byte that is no UTF-8."""


@dataclass(frozen=True)
class Cluster(Character):
    """What is shown as one: a character with the marks on it, or a byte that belongs to none."""

    shown: str
    """What stands for it, never empty and on one line: itself, or an escape."""
    escaped: bool
    """Whether `shown` is an escape."""


def characters(data: bytes) -> Iterator[Character]:
    """The characters of `data`, which cover every byte once."""
    end = 0
    for letter in data.decode("utf-8", "surrogateescape"):
        start = end
        if "\udc80" <= letter <= "\udcff":  # UTF-8 itself has no surrogates, so this is an escaped byte
            end += 1
            yield Character(start, end, None)
        else:
            end += len(letter.encode())
            yield Character(start, end, letter)


def clusters(data: bytes) -> list[Cluster]:
    """The clusters of `data`, which cover every byte once."""
    found: list[Cluster] = []
    start, text = 0, ""
    for character in characters(data):
        letter = character.text
        if text and (letter is None or not _joins(text, letter) or character.end - start > MOST_BYTES):
            found.append(_cluster(start, character.start, text))
            text = ""
        if letter is None:
            byte = data[character.start]
            found.append(Cluster(character.start, character.end, None, f"\\x{byte:02x}", True))
            continue
        if not text:
            start = character.start
        text += letter
    if text:
        found.append(_cluster(start, len(data), text))
    return found


def _cluster(start: int, end: int, text: str) -> Cluster:
    first = text[0]
    if unicodedata.category(first)[0] == "M":  # alone, it would sit on whatever happens to stand before it
        return Cluster(start, end, text, "\u25cc" + text, False)
    if first != " " and not first.isprintable():
        return Cluster(start, end, text, "".join(map(_sign, text)), True)
    return Cluster(start, end, text, text, False)


def _joins(before: str, letter: str) -> bool:
    """Whether a character belongs to the cluster before it."""
    last, code = before[-1], ord(letter)
    kind, first_kind = unicodedata.category(letter), unicodedata.category(before[0])
    if first_kind[0] in "CZ":
        return False
    if letter in _JOINERS or kind[0] == "M":
        return True
    if 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F:  # skin tones; the letters of some flags
        return first_kind == "So"
    if last == "\u200d":
        return kind == first_kind == "So"
    if _is_flag_letter(letter):
        return len(before) == 1 and _is_flag_letter(before)
    return 0x1160 <= code <= 0x11FF and (0x1100 <= ord(last) <= 0x11FF or 0xAC00 <= ord(last) <= 0xD7A3)


def _is_flag_letter(letter: str) -> bool:
    return 0x1F1E6 <= ord(letter) <= 0x1F1FF


def escape(letter: str) -> str:
    r"""A character that can't be seen, in ASCII: \n, \x00, \u00a0 or \U000e0001."""
    code = ord(letter)
    if code < 0x80:
        return letter.encode("unicode_escape").decode("ascii")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _sign(letter: str) -> str:
    """The same in one character where there is a sign for it."""
    return _SIGNS.get(letter) or (chr(0x2400 + ord(letter)) if letter < " " else escape(letter))


def break_rows(widths: list[int], starts: list[bool], ends: list[bool], width: int) -> list[range]:
    """Break clusters into rows of at most `width`, rather where a patch starts than inside one.

    widths: of each cluster. starts: whether a patch starts with it. ends: whether a row has to end behind it.
    A cluster wider than a row has one to itself.
    """
    found: list[range] = []
    begin, used = 0, 0
    for index, (wide, ends_row) in enumerate(zip(widths, ends, strict=True)):
        while index > begin and used + wide > width:
            cut = _cut(widths, starts, begin, index, used)
            found.append(range(begin, cut))
            used -= sum(widths[begin:cut])
            begin = cut
        used += wide
        if ends_row:
            found.append(range(begin, index + 1))
            begin, used = index + 1, 0
    if begin < len(widths):
        found.append(range(begin, len(widths)))
    return found


def _cut(widths: list[int], starts: list[bool], begin: int, end: int, used: int) -> int:
    """Where to end a row that `end` does not fit in: the last start of a patch in its second half."""
    left, cut = used, end
    while cut > begin + 1 and not starts[cut]:
        cut -= 1
        left -= widths[cut]
        if 2 * left < used:
            return end
    return cut if starts[cut] else end
