"""Many texts scored by one model: what of each is told, and that a bad one costs none of the others.

What it does not know: where texts come from, and how a model scores one, or several in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .batch import Batch
from .errors import OptionError
from .fields import checked_bytes
from .many import run_many
from .scoring import EmptyTextError, Score

__all__ = ["score_many"]


def score_many(
    score: Callable[[bytes], Score], texts: Iterable[str | bytes], batch: Batch | None = None, rows: int = 1
) -> Iterator[tuple[int, Score | OptionError]]:
    """Each text's index with its score, or with the error that it is empty or no valid text.

    Texts are taken one by one, each when the one before is done; with a batch `rows` of them are at work at a
    time. Whatever else `score` raises, or a text that is neither str nor bytes (OptionError), ends it.
    """

    def work(item: tuple[int, str | bytes]) -> Iterator[Score | OptionError]:
        try:
            yield score(_checked(*item))
        except (EmptyTextError, _NoTextError) as error:
            yield error

    if batch is not None:
        yield from run_many(batch, enumerate(texts), work, rows)
        return
    for index, text in enumerate(texts):
        yield from ((index, found) for found in work((index, text)))


class _NoTextError(OptionError):
    """A str that is no text."""


def _checked(index: int, text: str | bytes) -> bytes:
    try:
        return checked_bytes(f"text {index}", text)
    except OptionError as error:
        raise (_NoTextError(str(error)) if isinstance(text, str) else error) from None
