"""Values under byte strings, found by what they have in common with another one.

A radix tree: an edge carries the bytes that all keys below it go on with, so what many keys begin with is
there once, and looking a key up costs a comparison of its bytes and a step for each branch on the way.
What this does not know: what the values are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["PrefixTree", "common_prefix"]

V = TypeVar("V")


class _Node(Generic[V]):
    __slots__ = ("children", "depth", "label", "value")

    def __init__(self, label: bytes, depth: int) -> None:
        """label: the bytes from the parent to here. depth: bytes from the root to here."""
        self.label, self.depth = label, depth
        self.children: dict[int, _Node[V]] = {}
        """By the first byte of their label."""
        self.value: V | None = None


class PrefixTree(Generic[V]):
    """A mapping from bytes to values that are not None."""

    def __init__(self) -> None:
        self._root: _Node[V] = _Node(b"", 0)
        self._count = 0
        self.bytes = 0
        """Bytes of all labels: of keys, those that several begin with once."""

    def __len__(self) -> int:
        return self._count

    def get(self, key: bytes) -> V | None:
        """The value of a key, None where there is none."""
        way, _, common = self._walk(key)
        return way[-1].value if way[-1].depth == common == len(key) else None

    def put(self, key: bytes, value: V) -> None:
        """Give a key a value, in the place of one that it may have."""
        way, cut, common = self._walk(key)
        node = way[-1]
        if cut is not None:
            node = self._split(node, cut, common)
        if common < len(key):
            leaf: _Node[V] = _Node(key[common:], len(key))
            node.children[key[common]] = leaf
            self.bytes += len(leaf.label)
            node = leaf
        self._count += node.value is None
        node.value = value

    def remove(self, key: bytes) -> None:
        """Forget a key. Raises KeyError where it has no value."""
        way, _, common = self._walk(key)
        node = way[-1]
        if node.depth != common or common != len(key) or node.value is None:
            raise KeyError(key)
        node.value = None
        self._count -= 1
        if node is not self._root and not node.children:
            parent = way[-2]
            del parent.children[node.label[0]]
            self.bytes -= len(node.label)
            node = parent
        if node is not self._root and node.value is None and len(node.children) == 1:
            self._join(way[way.index(node) - 1], node)

    def common(self, text: bytes) -> int:
        """Bytes at the beginning of `text` that some key begins with, too: as many as there are."""
        return self._walk(text)[2]

    def nearest(self, text: bytes, reach: int) -> Iterator[tuple[V, int]]:
        """Values of keys, each with the number of bytes that its key and `text` have in common: most first.

        Only of keys that have at most `reach` bytes behind those; of each number first the key that has none.
        """
        way, cut, common = self._walk(text)
        below = [*way[-1].children.values()] if cut is None else [cut]
        if cut is not None and common > way[-1].depth:
            yield from self._within(below, common, reach)
            below = [child for child in way[-1].children.values() if child is not cut]
        for place in range(len(way) - 1, -1, -1):
            node = way[place]
            if node.value is not None:
                yield node.value, node.depth
            yield from self._within(below, node.depth, reach)
            if place:
                below = [child for child in way[place - 1].children.values() if child is not node]

    def _within(self, nodes: list[_Node[V]], common: int, reach: int) -> Iterator[tuple[V, int]]:
        waiting = nodes
        while waiting:
            node = waiting.pop()
            if node.depth - common <= reach:
                if node.value is not None:
                    yield node.value, common
                waiting += node.children.values()

    def _walk(self, text: bytes) -> tuple[list[_Node[V]], _Node[V] | None, int]:
        """The nodes on the way of `text`, a child of the last that shares a part of its label with the rest,
        if there is one, and how many bytes of the text are found."""
        node = self._root
        way, done = [node], 0
        while (child := node.children.get(text[done]) if done < len(text) else None) is not None:
            label = child.label
            if not text.startswith(label, done):
                return way, child, done + common_prefix(label, text[done : done + len(label)])
            done += len(label)
            way.append(child)
            node = child
        return way, None, done

    def _split(self, parent: _Node[V], child: _Node[V], depth: int) -> _Node[V]:
        """A node at `depth`, on the edge to `child`."""
        size = depth - parent.depth
        middle: _Node[V] = _Node(child.label[:size], depth)
        parent.children[middle.label[0]] = middle
        child.label = child.label[size:]
        middle.children[child.label[0]] = child
        return middle

    def _join(self, parent: _Node[V], node: _Node[V]) -> None:
        """Let the only child of a node take its place."""
        (child,) = node.children.values()
        child.label = node.label + child.label
        parent.children[child.label[0]] = child


def common_prefix(one: bytes, other: bytes) -> int:
    """How many bytes two strings begin with alike."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
