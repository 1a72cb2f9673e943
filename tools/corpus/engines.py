"""The engine of this process: one model, which scores many texts.

What it does not know: where texts are from, and what becomes of the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .texts import Engine, ScoredText, Text

if TYPE_CHECKING:
    from ...runtime import BltModel

__all__ = ["local_engine"]


def local_engine(model: BltModel, context: int | None = None, rows: int = 1) -> Engine:
    """An engine of a loaded model; context and rows as `BltModel.score_many` takes them."""

    def score(texts: Iterator[Text]) -> Iterator[ScoredText]:
        numbers: dict[int, int] = {}

        def contents() -> Iterator[bytes]:
            for index, text in enumerate(texts):
                numbers[index] = text.number
                yield text.data

        for index, found in model.score_many(contents(), context=context, rows=rows):
            if isinstance(found, Exception):
                raise found
            yield ScoredText(numbers.pop(index), found.bits, found.patches, found.windows, found.seconds)

    return score
