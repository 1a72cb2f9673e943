"""The sampler's distribution equals transformers' chain of processors, and draws are pinned to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime.errors import BltError
from blt_edge.runtime.options import GenerationOptions
from blt_edge.runtime.sampling import Sampler, draw, probabilities
from blt_edge.runtime.vocabulary import EOS, SUPPRESSED, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.torch_only import torch_or_skip, transformers_or_skip

Logits = NDArray[np.float32]
Oracle = Callable[[Logits, GenerationOptions, NDArray[np.int64]], NDArray[np.float64]]
NO_IDS: NDArray[np.int64] = np.empty(0, dtype=np.int64)
SEEDS = st.integers(0, 2**32 - 1)
OPTIONS = st.builds(
    GenerationOptions,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.7, 10.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 256, 257, 260, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.1, 3.0]),
)


def some_logits(seed: int, scale: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).normal(size=260) * scale).astype(np.float32)


def by_transformers(
    logits: Logits, options: GenerationOptions, ids: NDArray[np.int64]
) -> NDArray[np.float64]:
    """transformers' own processors, in float64, in the order that our module states."""
    torch, t = torch_or_skip(), transformers_or_skip("transformers.generation.logits_process")
    chain: list[Any] = [t.SuppressTokensLogitsProcessor(list(SUPPRESSED))]
    if options.repetition_penalty != 1.0:
        chain.append(t.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    chain.append(t.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        chain.append(t.TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        chain.append(t.TopPLogitsWarper(options.top_p))
    if options.min_p > 0.0:
        chain.append(t.MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for processor in chain:
        scores = processor(torch.from_numpy(ids)[None], scores)
    result: NDArray[np.float64] = torch.softmax(scores, dim=-1)[0].numpy()
    return result


def by_definition(logits: Logits, options: GenerationOptions, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same from the definitions, for where transformers is not installed."""
    scores = logits.astype(np.float64)
    scores[list(SUPPRESSED)] = -np.inf
    for seen in set(ids.tolist()):
        penalty = options.repetition_penalty
        scores[seen] *= penalty if scores[seen] < 0 else 1 / penalty
    scores /= options.temperature
    if options.top_k:
        scores[scores < np.sort(scores)[-min(options.top_k, 260)]] = -np.inf
    if options.top_p < 1:
        order = np.argsort(scores, kind="stable")
        tail = np.cumsum(softmax(scores)[order]) <= 1 - options.top_p
        scores[order[:-1][tail[:-1]]] = -np.inf  # the likeliest stays
    if options.min_p:
        scores[softmax(scores) < options.min_p * softmax(scores).max()] = -np.inf
    return softmax(scores)


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


@pytest.mark.parametrize("oracle", [by_definition, by_transformers])
@settings(max_examples=300, deadline=None)
@given(SEEDS, OPTIONS, st.binary(max_size=30), st.booleans())
def test_the_distribution_is_the_oracles(
    oracle: Oracle, seed: int, options: GenerationOptions, text: bytes, likely_special: bool
) -> None:
    logits, ids = some_logits(seed), encode(text)
    if likely_special:
        logits[list(SUPPRESSED)] = 1000.0
    expected = oracle(logits, options, ids)
    actual = probabilities(logits, options, np.bincount(ids, minlength=260))
    assert (actual.dtype, actual.shape) == (np.float64, (260,))
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    assert ((actual > 0) == (expected > 0)).all()
    assert not actual[list(SUPPRESSED)].any()


def test_the_end_of_the_text_may_be_chosen() -> None:
    logits = some_logits(0)
    logits[EOS] = 50.0
    assert Sampler(GenerationOptions())(logits, NO_IDS) == EOS
    assert Sampler(GenerationOptions(temperature=1.0, seed=0))(logits, NO_IDS) == EOS


def test_greedy_takes_the_largest_and_the_lowest_of_equals() -> None:
    greedy = Sampler(GenerationOptions())
    logits = np.zeros(260, dtype=np.float32)
    assert greedy(logits, NO_IDS) == EOS  # ids 0, 1 and 3 are out
    logits[[200, 100, 0, 1, 3]] = [2.0, 2.0, 9.0, 9.0, 9.0]
    assert greedy(logits, NO_IDS) == 100
    assert logits[0] == 9.0  # the caller's array is as it was


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.binary(max_size=30), st.sampled_from([0.5, 1.0, 2.0]))
def test_greedy_is_certain_and_heeds_only_the_penalty(seed: int, text: bytes, penalty: float) -> None:
    logits, ids = some_logits(seed), encode(text)
    options = GenerationOptions(repetition_penalty=penalty, top_k=5, top_p=0.3, min_p=0.9, seed=1)
    warm = by_definition(logits, GenerationOptions(temperature=1.0, repetition_penalty=penalty), ids)
    chosen = Sampler(options)(logits, ids)
    assert chosen == int(warm.argmax())
    assert type(chosen) is int
    certain = probabilities(logits, options, np.bincount(ids, minlength=260))
    assert certain[chosen] == 1.0
    assert certain.sum() == 1.0


def test_the_penalty_is_for_ids_seen_however_often() -> None:
    logits = np.full(260, -9.0, dtype=np.float32)
    logits[[10, 20, 30]] = [2.0, 3.0, -1.0]
    options = GenerationOptions(repetition_penalty=2.0)
    greedy = Sampler(options)
    assert greedy(logits, NO_IDS) == 20
    assert greedy(logits, np.array([20, 20, 20])) == 10  # 3 / 2 < 2, and not 3 / 8
    assert greedy(logits, [10, 20]) == 20
    warm = GenerationOptions(repetition_penalty=2.0, temperature=1.0)
    seen = np.zeros(260, dtype=np.int64)
    seen[30] = 3
    ratio = probabilities(logits, warm, seen)[30] / probabilities(logits, warm)[30]
    np.testing.assert_allclose(ratio, np.exp(-1.0), rtol=0.05)  # -1 became -2
    np.testing.assert_array_equal(probabilities(logits, warm, None), probabilities(logits, warm, seen * 0))


def test_equals_are_kept_together_by_top_k_and_in_order_by_top_p() -> None:
    logits = np.full(260, -50.0, dtype=np.float32)
    logits[[10, 20, 30, 40]] = [1.0, 1.0, 1.0, 2.0]
    kept = probabilities(logits, GenerationOptions(temperature=1.0, top_k=2))
    assert np.flatnonzero(kept).tolist() == [10, 20, 30, 40]
    kept = probabilities(logits, GenerationOptions(temperature=1.0, top_p=0.6))
    assert np.flatnonzero(kept).tolist() == [10, 40]
    # Among many equals as well, the lower ids come first.
    for levels in (1, 2, 5):
        logits = (np.arange(260) % levels).astype(np.float32) * 20
        kept = probabilities(logits, GenerationOptions(temperature=1.0, top_p=0.3))
        best = [number for number in range(2, 260) if number % levels == levels - 1 and number != 3]
        assert np.flatnonzero(kept).tolist() == best[: math.ceil(0.3 * len(best))]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = some_logits(3, scale=1e4)
    options = GenerationOptions(temperature=temperature, seed=0, repetition_penalty=1e308)
    with np.errstate(all="raise"):
        distribution = probabilities(logits, options, np.bincount(encode(b"text"), minlength=260))
    expected = by_definition(logits, GenerationOptions(temperature=1.0), NO_IDS)
    assert distribution[expected.argmax()] == 1.0


@pytest.mark.parametrize("temperature", [1e30, 1e308])
def test_the_highest_temperatures_are_uniform_but_filters_still_see_the_order(temperature: float) -> None:
    logits = some_logits(3)
    distribution = probabilities(logits, GenerationOptions(temperature=temperature))
    np.testing.assert_allclose(np.delete(distribution, SUPPRESSED), 1 / 257, rtol=1e-12)
    best = int(np.argmax(np.where(np.isin(np.arange(260), SUPPRESSED), -np.inf, logits)))
    assert probabilities(logits, GenerationOptions(temperature=temperature, top_k=1))[best] == 1.0
    assert probabilities(logits, GenerationOptions(temperature=temperature, top_p=1e-9))[best] == 1.0


@pytest.mark.parametrize("penalty", [5e-324, 1e308])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 1e308])
def test_extreme_values_stay_a_distribution(penalty: float, temperature: float) -> None:
    logits = some_logits(1)
    logits[[50, 51, 52]] = [np.inf, -np.inf, np.finfo(np.float32).max]
    options = GenerationOptions(temperature=temperature, repetition_penalty=penalty, top_p=0.9, min_p=0.1)
    with np.errstate(all="raise"):
        distribution = probabilities(logits, options, np.ones(260, dtype=np.int64))
    assert abs(distribution.sum() - 1) < 1e-12
    assert not distribution[list(SUPPRESSED)].any()


@pytest.mark.parametrize("options", [GenerationOptions(), GenerationOptions(temperature=1.0, seed=0)])
def test_logits_that_are_no_numbers_are_an_error(options: GenerationOptions) -> None:
    logits = some_logits(0)
    logits[77] = np.nan
    with pytest.raises(BltError, match="not a number"):
        Sampler(options)(logits, NO_IDS)


def test_a_seed_means_the_same_numbers_in_every_version() -> None:
    """Pinned draws: numpy keeps PCG64's stream stable, and one draw takes one random number."""
    uniforms = np.random.Generator(np.random.PCG64(7)).random(20)
    logits = some_logits(5, scale=1.0)
    options = GenerationOptions(temperature=0.7, top_k=99, top_p=0.95, seed=7)
    cumulative = np.cumsum(probabilities(logits, options))
    expected = [int((cumulative <= u).sum()) for u in uniforms]

    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(replace(options, seed=seed))
        return [sampler(logits, NO_IDS) for _ in uniforms]

    assert drawn(7) == expected != drawn(8)
    assert drawn(None) != drawn(None)


def test_nothing_of_probability_zero_is_ever_drawn() -> None:
    distribution = np.zeros(260)
    distribution[[5, 6, 250]] = [0.1, 0.2, 0.7]
    last = float(np.nextafter(1.0, 0.0))
    drawn = [draw(distribution, u) for u in (0.0, 0.0999, 0.1001, 0.2999, 0.3001, last, 1.0)]
    assert drawn == [5, 5, 6, 6, 250, 250, 250]
    # The ids share [0, 1) out without gap: a number on an edge is the later id's.
    halves = np.array([0.5, 0.0, 0.25, 0.25])
    assert [draw(halves, u) for u in (0.0, np.nextafter(0.5, 0.0), 0.5, 0.75)] == [0, 0, 2, 3]


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.lists(st.integers(0, 5), max_size=30))
def test_guesses_look_ahead_and_use_nothing_up(seed: int, guesses: list[int]) -> None:
    logits = some_logits(seed, scale=1.0)
    options = GenerationOptions(temperature=1.0, seed=seed)
    plain, guessing = Sampler(options), Sampler(options)
    expected = [plain(logits, NO_IDS) for _ in range(len(guesses) + 6)]
    for index, ahead in enumerate(guesses):
        assert guessing.guess(logits, NO_IDS, ahead) == expected[index + ahead]
        assert guessing(logits, NO_IDS) == expected[index]


ODD = st.sampled_from([np.inf, -np.inf, np.nan, 3.0, -1e38])


@settings(max_examples=200, deadline=None)
@given(SEEDS, st.dictionaries(st.integers(0, 259), ODD, max_size=6), st.booleans())
def test_greedy_is_the_certain_id_whatever_the_logits(
    seed: int, changes: dict[int, float], all_minus_infinity: bool
) -> None:
    logits = some_logits(seed)
    if all_minus_infinity:
        logits[:] = -np.inf
    logits[list(changes)] = list(changes.values())
    options = GenerationOptions()
    try:
        expected = int(probabilities(logits, options).argmax())
    except BltError:
        with pytest.raises(BltError, match="not a number"):
            Sampler(options)(logits, NO_IDS)
        return
    assert Sampler(options)(logits, NO_IDS) == expected
