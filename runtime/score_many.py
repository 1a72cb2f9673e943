"""Many texts scored by one model: what of each is told, and that a bad one costs none of the others.

What it does not know: where texts come from, and how a model scores one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .errors import OptionError
from .fields import checked_bytes
from .scoring import EmptyTextError, Score

__all__ = ["score_many"]


def score_many(
    score: Callable[[bytes], Score], texts: Iterable[str | bytes]
) -> Iterator[tuple[int, Score | OptionError]]:
    """Each text's index with its score, or with the error that it is empty or no valid text.

    Texts are taken one by one, each when the one before is done. Whatever else `score` raises, or a text that
    is neither str nor bytes (OptionError), ends it.
    """
    for index, text in enumerate(texts):
        try:
            data = checked_bytes(f"text {index}", text)
        except OptionError as error:
            if not isinstance(text, str):
                raise
            yield index, error
            continue
        try:
            found: Score | OptionError = score(data)
        except EmptyTextError as error:
            found = error
        yield index, found
