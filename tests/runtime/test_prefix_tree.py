"""A tree of prefixes against a plain dictionary."""

from __future__ import annotations

import pytest
from blt_edge.runtime.prefix_tree import PrefixTree, common_prefix
from hypothesis import given
from hypothesis import strategies as st

# Few letters, so that keys meet; and long runs, so that labels are cut inside.
texts = st.one_of(
    st.text("ab", max_size=8).map(str.encode),
    st.tuples(st.integers(0, 40), st.text("ab", max_size=3)).map(lambda two: b"a" * two[0] + two[1].encode()),
    st.binary(max_size=3),
)
steps = st.lists(st.tuples(st.sampled_from(["put", "put", "remove"]), texts), max_size=40)


def common(one: bytes, other: bytes) -> int:
    """Bytes that both begin with, one by one."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@given(steps=steps, asked=st.lists(texts, min_size=1, max_size=6), reach=st.integers(0, 9))
def test_a_tree_is_a_dictionary(steps: list[tuple[str, bytes]], asked: list[bytes], reach: int) -> None:
    tree: PrefixTree[int] = PrefixTree()
    truth: dict[bytes, int] = {}
    for number, (what, key) in enumerate(steps):
        if what == "put":
            tree.put(key, number)
            truth[key] = number
        elif key in truth:
            tree.remove(key)
            del truth[key]
        else:
            with pytest.raises(KeyError):
                tree.remove(key)
    assert len(tree) == len(truth)
    # What keys begin with alike is there once: the bytes are those of all distinct prefixes.
    assert tree.bytes == len({key[:end] for key in truth for end in range(1, len(key) + 1)})
    for text in [*asked, *truth]:
        assert tree.get(text) == truth.get(text)
        assert tree.common(text) == max((common(text, key) for key in truth), default=0)
        found = list(tree.nearest(text, reach))
        wanted = {
            (value, common(text, key))
            for key, value in truth.items()
            if len(key) - common(text, key) <= reach
        }
        assert set(found) == wanted
        assert len(found) == len(wanted)
        assert [length for _, length in found] == sorted((length for _, length in found), reverse=True)
        # Of those that have equally much in common, what needs nothing taken back comes first.
        best = [value for value, length in found if length == found[0][1]]
        exact = [value for key, value in truth.items() if key == text[: found[0][1]]] if found else []
        assert not exact or best[0] == exact[0]


@given(one=texts, other=texts)
def test_what_two_texts_have_in_common(one: bytes, other: bytes) -> None:
    assert common_prefix(one, other) == common(one, other)
    assert common_prefix(one, one + other) == len(one)


def test_a_lookup_does_not_grow_with_the_keys_beside_it() -> None:
    """Steps are counted, not seconds: a thousand texts of 3,500 bytes that part early."""
    tree: PrefixTree[int] = PrefixTree()
    for number in range(1000):
        tree.put(b"%04d" % number + b"x" * 3500, number)
    way, _, length = tree._walk(b"0777" + b"x" * 3500)
    assert length == 3504
    assert len(way) <= 6
    assert next(tree.nearest(b"0777" + b"x" * 3500, 64)) == (777, 3504)
