"""Many texts continued at a time, a few of them in each pass.

What this does not know: how passes are shared (`batch`), how a text is made (`generation`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from .batch import Batch
from .errors import OptionError
from .generation import GenerationChunk, GenerationResult, joined

__all__ = ["joined_many", "run_many"]

_Item = TypeVar("_Item")
_Piece = TypeVar("_Piece")


def run_many(
    batch: Batch,
    items: Iterable[_Item],
    work: Callable[[_Item], Iterable[_Piece]],
    texts: int,
    cancel: threading.Event | None = None,
) -> Generator[tuple[int, _Piece], None, None]:
    """What `work` makes of each item, piece by piece as it comes: (number of the item, piece).

    `texts` (>= 1) of them are at work at a time; the next one begins when one has ended, and no other begins
    once `cancel` is set. What an item raises ends everything, as does closing the generator. Items are asked
    for in order, when their turn comes. Raises OptionError where it is gone on with in another thread.
    """
    pieces: deque[tuple[int, _Piece]] = deque()
    tasks = []

    def begin(number: int, item: _Item) -> Callable[[], None]:
        def run() -> None:
            for piece in work(item):
                pieces.append((number, piece))
                batch.attention = True  # it is handed out before the next pass

        return run

    waiting: Iterator[tuple[int, _Item]] | None = enumerate(items)
    thread = threading.get_ident()
    try:
        while True:
            while waiting is not None and len(batch) < texts:
                following = None if cancel is not None and cancel.is_set() else next(waiting, None)
                if following is None:
                    waiting = None
                else:
                    tasks.append(batch.start(begin(*following)))
            going_on = batch.step()
            while pieces:
                yield pieces.popleft()
                if threading.get_ident() != thread:
                    raise OptionError(
                        "texts that share passes were gone on with in another thread; go through all of them "
                        "in the thread that began"
                    )
            for task in [task for task in tasks if task.ended]:
                tasks.remove(task)
                if task.error is not None:
                    raise task.error
            if not going_on and waiting is None and not len(batch):
                return
    finally:
        batch.close()


def joined_many(pieces: Iterable[tuple[int, GenerationChunk]]) -> list[GenerationResult]:
    """All that texts yield, one result for each that began."""
    texts: dict[int, list[GenerationChunk]] = {}
    for number, chunk in pieces:
        texts.setdefault(number, []).append(chunk)
    return [joined(texts[number]) for number in sorted(texts)]
