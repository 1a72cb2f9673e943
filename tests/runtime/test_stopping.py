"""Stop strings are found wherever they end first, however the stream is cut, and never emitted."""

from __future__ import annotations

from itertools import pairwise

import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.runtime.generation import StopMatcher, _borders
from hypothesis import given, settings
from hypothesis import strategies as st

AB = st.lists(st.sampled_from(b"ab"), max_size=30).map(bytes)
STOPS = st.lists(st.lists(st.sampled_from(b"ab"), min_size=1, max_size=5).map(bytes), max_size=4)
CUTS = st.lists(st.integers(0, 30), max_size=8)


def by_definition(data: bytes, stops: list[bytes]) -> tuple[bytes, bytes | None]:
    """What is emitted in all, and the stop string found: earliest end, then longest."""
    for end in range(1, len(data) + 1):
        here = [stop for stop in stops if data[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return data[: end - len(longest)], longest
    return data, None


def streamed(data: bytes, stops: list[bytes], cuts: list[int]) -> tuple[bytes, bytes | None]:
    matcher, emitted = StopMatcher(stops), b""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    stopped = False
    for start, end in pairwise(edges):
        piece, stopped = matcher.push(data[start:end])
        emitted += piece
        assert stopped == (matcher.found is not None)
    held = matcher.flush()
    assert not (stopped and held)
    return emitted + held, matcher.found


@settings(max_examples=1000)
@given(AB, STOPS, CUTS)
def test_any_cut_gives_what_the_definition_says(data: bytes, stops: list[bytes], cuts: list[int]) -> None:
    assert streamed(data, stops, cuts) == by_definition(data, stops)
    assert streamed(data, stops, list(range(len(data)))) == by_definition(data, stops)


@settings(max_examples=500)
@given(AB, STOPS)
def test_exactly_what_may_begin_a_stop_string_is_held_back(data: bytes, stops: list[bytes]) -> None:
    matcher, emitted = StopMatcher(stops), b""
    for count in range(1, len(data) + 1):
        piece, stopped = matcher.push(data[count - 1 : count])
        emitted += piece
        if stopped:
            return
        begun = [size for stop in stops for size in range(1, len(stop)) if data[:count].endswith(stop[:size])]
        assert emitted == data[: count - max(begun, default=0)]


def test_the_earliest_end_wins_over_the_earliest_start() -> None:
    assert streamed(b"xabcd", [b"abcd", b"bc"], []) == (b"xa", b"bc")


def test_the_longest_wins_at_the_same_end() -> None:
    for stops in ([b"c", b"abc"], [b"abc", b"c"], [b"bc", b"c", b"abc"]):
        assert streamed(b"xabcd", stops, [1, 2, 3, 4]) == (b"x", b"abc")


def test_a_stop_string_that_overlaps_itself() -> None:
    assert streamed(b"aabaabaaab", [b"aabaaab"], list(range(10))) == (b"aab", b"aabaaab")


def test_a_false_beginning_comes_out_as_soon_as_it_is_one() -> None:
    matcher = StopMatcher([b"</end>"])
    assert matcher.push(b"a</en") == (b"a", False)
    assert matcher.push(b"<") == (b"</en", False)
    assert matcher.push(b"/end>tail") == (b"", True)
    assert matcher.found == b"</end>"


def test_after_a_stop_everything_is_dropped() -> None:
    matcher = StopMatcher([b"."])
    assert matcher.push(b"one. two. three") == (b"one", True)
    assert matcher.push(b"more") == (b"", True)
    assert matcher.flush() == b""
    assert matcher.found == b"."


def test_without_stops_all_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.push(b"abc") == (b"abc", False)
    assert matcher.flush() == b""


def test_flush_ends_the_stream_and_what_follows_is_a_new_one() -> None:
    matcher = StopMatcher([b"ab"])
    assert matcher.push(b"xa") == (b"x", False)
    assert matcher.flush() == b"a"
    assert matcher.push(b"b") == (b"b", False)


def test_bytes_of_every_value_and_long_stops() -> None:
    every = bytes(range(256))
    data = b"\xff" + every[:-1] + every + b"tail"
    assert streamed(data, [every], list(range(0, len(data), 7))) == (b"\xff" + every[:-1], every)


@pytest.mark.parametrize("stops", [[b""], [b"a", b""]])
def test_an_empty_stop_string_is_refused(stops: list[bytes]) -> None:
    with pytest.raises(OptionError, match="a stop string is empty"):
        StopMatcher(stops)


def test_a_lone_string_is_refused() -> None:
    for lone in (b"ab", "ab", [1, 2], ["ab"]):
        with pytest.raises(TypeError):
            StopMatcher(lone)  # type: ignore[arg-type]


@given(AB)
def test_borders_are_those_of_the_definition(stop: bytes) -> None:
    prefixes = [stop[:end] for end in range(1, len(stop) + 1)]
    longest = [max(n for n in range(len(prefix)) if prefix.endswith(prefix[:n])) for prefix in prefixes]
    assert _borders(stop) == longest


@given(AB, AB, STOPS)
def test_a_stream_after_a_flush_is_a_fresh_one(first: bytes, second: bytes, stops: list[bytes]) -> None:
    matcher = StopMatcher(stops)
    if matcher.push(first)[1]:
        return
    matcher.flush()
    fresh = StopMatcher(stops)
    assert matcher.push(second) == fresh.push(second)
    assert matcher.flush() == fresh.flush()
    assert matcher.found == fresh.found
