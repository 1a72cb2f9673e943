"""UTF-8 against Python's decoder, choices against their definition, byte by byte."""

from __future__ import annotations

import pytest
from blt_edge.runtime.constraint_automata import ChoiceRule, Rule, Utf8Rule, cut_character
from hypothesis import given, settings
from hypothesis import strategies as st


def allowed_bytes(rule: Rule) -> set[int]:
    flags = rule.allowed()
    assert flags.shape == (256,)
    return {byte for byte in range(256) if flags[byte]}


def begins_text(data: bytes) -> bool:
    """Whether some bytes after these make it valid, by Python's decoder."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


ALL = "".join(map(chr, [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x3FFFF, 0x10FFFF]))


@settings(deadline=None)
@given(st.text(max_size=4).map(lambda text: text + ALL), st.data())
def test_utf8_is_what_python_decodes(text: str, data: st.DataObject) -> None:
    whole = text.encode()
    place = data.draw(st.integers(0, len(whole)))
    rule = Utf8Rule()
    for byte in whole[:place]:
        assert rule.allowed()[byte]
        rule.advance(byte)
    before = whole[:place]
    assert allowed_bytes(rule) == {byte for byte in range(256) if begins_text(before + bytes([byte]))}
    try:
        before.decode()
        complete = True
    except UnicodeDecodeError:
        complete = False
    assert rule.accepts_end == complete
    tail = cut_character(before)
    assert bool(tail) != complete
    assert before.endswith(tail)
    assert allowed_bytes(Utf8Rule(tail)) == allowed_bytes(rule)


@pytest.mark.parametrize(
    ("data", "tail"),
    [
        *((b"", b""), (b"ab", b""), (b"\xff\xe3", b"\xe3"), (b"a\x80", b"")),
        *((b"\xf0\x9f\x90", b"\xf0\x9f\x90"), (b"\xe3\x81\x82", b""), (b"\xed\xa0", b"")),
        *((b"\xc3a", b""), (b"\xe0\x80", b""), (b"\xc3\xc3", b"\xc3")),
    ],
)
def test_a_character_that_is_cut(data: bytes, tail: bytes) -> None:
    assert cut_character(data) == tail


TEXTS = st.lists(st.binary(max_size=5) | st.text("ab", max_size=4).map(str.encode), min_size=1, max_size=8)


@settings(deadline=None)
@given(TEXTS, st.data())
def test_a_choice_is_one_of_its_texts(texts: list[bytes], data: st.DataObject) -> None:
    rule = ChoiceRule(tuple(sorted(set(texts))))
    taken = b""
    for _ in range(12):
        expected = {text[len(taken)] for text in texts if text.startswith(taken) and len(text) > len(taken)}
        assert allowed_bytes(rule) == expected
        assert rule.accepts_end == (taken in texts)
        forced = rule.forced()
        for end in range(len(forced)):
            step = taken + forced[:end]
            assert step not in texts
            assert {text[: end + 1 + len(taken)] for text in texts if text.startswith(taken)} == {
                taken + forced[: end + 1]
            }
        move = data.draw(st.sampled_from(["on", "on", "back", "fork"]))
        if move == "on" and expected:
            byte = data.draw(st.sampled_from(sorted(expected)))
            other = rule.fork()
            rule.advance(byte)
            assert allowed_bytes(other) == expected  # a fork stays
            taken += bytes([byte])
        elif move == "back":
            count = data.draw(st.integers(0, len(taken)))
            rule.roll_back(count)
            taken = taken[: len(taken) - count]
        elif move == "fork":
            rule = rule.fork()
