"""From logits to the next id.

In this order: suppress ids 0, 1 and 3 -> repetition penalty (CTRL's rule: logits of ids already in the
text are divided by it when positive, multiplied when negative) -> temperature -> top-k -> top-p -> min-p
-> draw. At temperature 0 the penalised logits' largest wins, the lowest id on ties, and nothing is drawn.
Each filter sees what the one before left, renormalised. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BltError
from .options import GenerationOptions
from .vocabulary import SUPPRESSED

__all__ = ["Sampler", "count_seen", "draw", "make_sampler", "probabilities"]

Sampler = Callable[[NDArray[np.float32], ArrayLike], int]
"""sampler(logits float32 [260], ids of the whole text so far, prompt and generated) -> the next id."""

_SUPPRESSED = list(SUPPRESSED)
_LARGEST = float(np.finfo(np.float64).max)


def make_sampler(options: GenerationOptions) -> Sampler:
    """A sampler that follows `options`; with a seed, the same calls give the same ids.

    The sampler reads its second argument only when there is a repetition penalty. It raises BltError when
    the logits hold a NaN, which means that the model's computation is broken.
    """
    generator = np.random.Generator(np.random.PCG64(options.seed))
    penalised = options.repetition_penalty != 1.0

    def greedy(logits: NDArray[np.float32], ids: ArrayLike) -> int:
        seen = count_seen(ids, len(logits)) if penalised else None
        return int(np.argmax(_allowed(logits, options, seen)))

    def sampled(logits: NDArray[np.float32], ids: ArrayLike) -> int:
        seen = count_seen(ids, len(logits)) if penalised else None
        return draw(probabilities(logits, options, seen), generator)

    return greedy if options.temperature == 0.0 else sampled


def probabilities(
    logits: NDArray[np.float32], options: GenerationOptions, seen_counts: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """The distribution that the next id is drawn from: float64 [V], sum 1, for logits [V].

    `seen_counts` int64 [V] is how often each id is in the text (see `count_seen`); None means that none is.
    At temperature 0 one id has all of it. Raises BltError when the logits hold a NaN.
    """
    scores = _allowed(logits, options, seen_counts)
    if options.temperature == 0.0:
        certain = np.zeros(len(scores))
        certain[np.argmax(scores)] = 1.0
        return certain
    with np.errstate(over="ignore", under="ignore"):  # towards -inf and 0, which is what is meant
        weights: NDArray[np.float64] = np.exp((scores - scores.max()) / options.temperature)
    if 0 < options.top_k < len(weights):
        weights[scores < np.partition(scores, -options.top_k)[-options.top_k]] = 0.0
    if options.top_p < 1.0:
        weights[_outside_top_p(scores, weights, options.top_p)] = 0.0
    if options.min_p > 0.0:
        weights[weights < options.min_p * weights.max()] = 0.0
    weights /= weights.sum()
    return weights


def draw(distribution: NDArray[np.float64], generator: np.random.Generator) -> int:
    """One id by its probability, from one random number; never an id of probability 0."""
    support = np.flatnonzero(distribution)
    cumulative = np.cumsum(distribution[support])
    place = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(support[min(int(place), len(support) - 1)])


def count_seen(ids: ArrayLike, size: int) -> NDArray[np.int64]:
    """How often each of `size` ids occurs in `ids`: int64 [size]."""
    return np.bincount(np.asarray(ids, dtype=np.int64), minlength=size)


def _allowed(
    logits: NDArray[np.float32], options: GenerationOptions, seen_counts: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """float64 [V]: penalised logits, -inf for the suppressed ids, otherwise finite."""
    scores = np.array(logits, dtype=np.float64)
    if np.isnan(scores).any():
        raise BltError("the model gave logits that are not a number; validate the bundle, or export it again")
    if options.repetition_penalty != 1.0 and seen_counts is not None:
        penalty = options.repetition_penalty
        with np.errstate(over="ignore", under="ignore"):
            penalised = np.where(scores > 0, scores / penalty, scores * penalty)
        np.copyto(scores, penalised, where=seen_counts > 0)
    np.clip(scores, -_LARGEST, _LARGEST, out=scores)  # so that no difference is inf - inf
    scores[_SUPPRESSED] = -np.inf
    return scores


def _outside_top_p(
    scores: NDArray[np.float64], weights: NDArray[np.float64], top_p: float
) -> NDArray[np.int64]:
    """The ids to drop: all after the first that bring the sum to `top_p`; likely first, then lower ids."""
    order = np.argsort(-scores, kind="stable")
    cumulative = np.cumsum(weights[order])
    kept = int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1
    return order[kept:]
