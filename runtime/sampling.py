"""From logits to the next id.

In this order: suppress the special ids that end no text, and what a constraint does not allow -> repetition
penalty (CTRL's rule: logits of ids already in the text are divided by it when positive, multiplied when
negative) -> logit bias -> temperature -> top-k -> top-p -> min-p -> draw. At temperature 0 the largest of
these logits wins, the lowest id on ties, and nothing is drawn. Each filter sees what the one before left,
renormalised. Everything is in float64.

The n-th choice always takes the n-th random number of the seed, however the ids were computed. A guess at a
later choice may look at that choice's number ahead of time: where the guessed distribution is close to the
real one, both fall on the same id. So speculation compares guess and choice, and changes no text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BltError
from .options import GenerationOptions
from .vocabulary import SUPPRESSED

__all__ = ["Sampler", "draw", "log_probabilities", "probabilities"]

_LARGEST = float(np.finfo(np.float64).max)


class Sampler:
    """Chooses ids by `GenerationOptions`; with a seed, the same calls give the same ids.

    `ids` is read only when there is a repetition penalty (`reads_ids`): those of the whole text before the
    choice, prompt and generated. `allowed` bool [260] is what a constraint lets come next, None for all; at
    least one of them is not suppressed. Both methods raise BltError when the logits hold a NaN, which means
    that the model's computation is broken; where one id only is allowed, they need not be looked at.
    """

    def __init__(self, options: GenerationOptions, suppressed: Iterable[int] = SUPPRESSED) -> None:
        """suppressed: ids that are never chosen."""
        self._options, self._suppressed = options, list(suppressed)
        self._generator = np.random.Generator(np.random.PCG64(options.seed))
        self._numbers: deque[float] = deque()  # drawn for guesses, not yet used up by a choice
        self.reads_ids = options.repetition_penalty != 1.0
        self._plain = options.temperature == 0.0 and not self.reads_ids and not options.logit_bias

    def __call__(
        self, logits: NDArray[np.float32], ids: ArrayLike, allowed: NDArray[np.bool_] | None = None
    ) -> int:
        """The next id, from logits float32 [260]."""
        chosen = self.guess(logits, ids, 0, allowed)
        if self._numbers:
            self._numbers.popleft()
        return chosen

    def guess(
        self,
        logits: NDArray[np.float32],
        ids: ArrayLike,
        ahead: int,
        allowed: NDArray[np.bool_] | None = None,
    ) -> int:
        """What the choice after `ahead` more will be, if its logits are these; nothing is used up."""
        if self._plain:
            return _largest_allowed(logits, self._suppressed, allowed)
        if self._options.temperature != 0.0:
            while len(self._numbers) <= ahead:  # for an id that is certain, too: the n-th choice, the n-th
                self._numbers.append(self._generator.random())
        if allowed is not None and np.count_nonzero(allowed) == 1:
            return int(allowed.argmax())
        seen = None
        if self.reads_ids:
            seen = np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(logits))
        if self._options.temperature == 0.0:
            return int(np.argmax(_scores(logits, self._options, seen, self._suppressed, allowed)))
        distribution = probabilities(logits, self._options, seen, self._suppressed, allowed)
        return draw(distribution, self._numbers[ahead])


def probabilities(
    logits: NDArray[np.float32],
    options: GenerationOptions,
    seen_counts: NDArray[np.int64] | None = None,
    suppressed: Iterable[int] = SUPPRESSED,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """The distribution that the next id is drawn from: float64 [V], sum 1, for logits [V].

    `seen_counts` int64 [V] is how often each id is in the text; None means that none is. `allowed` bool [V]:
    the ids that may come, all filters act on those; None means all. At
    temperature 0 one id has all of it. Raises BltError when the logits hold a NaN.
    """
    scores = _scores(logits, options, seen_counts, list(suppressed), allowed)
    if options.temperature == 0.0:
        certain = np.zeros(len(scores))
        certain[np.argmax(scores)] = 1.0
        return certain
    with np.errstate(over="ignore", under="ignore"):  # towards -inf and 0, which is what is meant
        weights: NDArray[np.float64] = np.exp((scores - scores.max()) / options.temperature)
    if 0 < options.top_k < len(weights):
        weights[scores < np.partition(scores, -options.top_k)[-options.top_k]] = 0.0
    if options.top_p < 1.0:
        # Dropped are all after the first that bring the sum to top_p; likely first, then lower ids.
        order = np.argsort(-scores, kind="stable")
        cumulative = np.cumsum(weights[order])
        kept = int(np.searchsorted(cumulative, options.top_p * cumulative[-1])) + 1
        weights[order[kept:]] = 0.0
    if options.min_p > 0.0:
        weights[weights < options.min_p * weights.max()] = 0.0
    weights /= weights.sum()
    return weights


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the model's own probabilities: float64 [..., V] for logits [..., V].

    Over all V ids, without options; finite even where a logit is infinite.
    """
    scores = np.clip(logits.astype(np.float64), -_LARGEST, _LARGEST)
    with np.errstate(over="ignore", under="ignore"):  # towards -inf and 0, which is what is meant
        scores -= scores.max(axis=-1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return np.maximum(scores, -_LARGEST, out=scores)


def draw(distribution: NDArray[np.float64], number: float) -> int:
    """One id by its probability, from one random number in [0, 1); never an id of probability 0."""
    support = np.flatnonzero(distribution)
    cumulative = np.cumsum(distribution[support])
    place = np.searchsorted(cumulative, number * cumulative[-1], side="right")
    return int(support[min(int(place), len(support) - 1)])


def _largest_allowed(
    logits: NDArray[np.float32], suppressed: list[int], allowed: NDArray[np.bool_] | None = None
) -> int:
    """The argmax of `_scores` without penalty and bias, in a fraction of the time."""
    if not np.isfinite(logits).all():
        return int(np.argmax(_scores(logits, GenerationOptions(), None, suppressed, allowed)))
    scores = logits.copy()
    if allowed is not None:
        scores[~allowed] = -np.inf
    scores[suppressed] = -np.inf
    return int(scores.argmax())


def _scores(
    logits: NDArray[np.float32],
    options: GenerationOptions,
    seen_counts: NDArray[np.int64] | None,
    suppressed: list[int],
    allowed: NDArray[np.bool_] | None,
) -> NDArray[np.float64]:
    """float64 [V]: penalised and biased logits, -inf for ids that can't be chosen, otherwise finite."""
    scores = np.array(logits, dtype=np.float64)
    if np.isnan(scores).any():
        raise BltError("the model gave logits that are not a number; validate the bundle, or export it again")
    if options.repetition_penalty != 1.0 and seen_counts is not None:
        penalty = options.repetition_penalty
        with np.errstate(over="ignore", under="ignore"):
            penalised = np.where(scores > 0, scores / penalty, scores * penalty)
        np.copyto(scores, penalised, where=seen_counts > 0)
    for number, bias in options.biases:
        scores[number] += bias
    np.clip(scores, -_LARGEST, _LARGEST, out=scores)  # so that no difference is inf - inf
    scores[suppressed] = -np.inf
    if allowed is not None:
        scores[~allowed] = -np.inf
    return scores
