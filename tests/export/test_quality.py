import math

import numpy as np
import pytest
from blt_edge.export.quality import Tally, lead_length
from hypothesis import given, settings
from hypothesis import strategies as st


def log_softmax(row: np.ndarray) -> list[float]:
    """By Python's own floats."""
    values = [float(value) for value in row]
    top = max(values)
    total = math.fsum(math.exp(value - top) for value in values)
    return [value - top - math.log(total) for value in values]


def random_rows(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, bytes]:
    random = np.random.default_rng(seed)
    expected = (random.standard_normal((count, 260)) * 5).astype(np.float32)
    own = expected + random.standard_normal((count, 260)).astype(np.float32)
    return own, expected, random.bytes(count)


@given(st.integers(0, 2**32), st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_predictions_by_the_definition(seed: int, count: int) -> None:
    own, expected, data = random_rows(seed, count)
    tally = Tally()
    tally.add_predictions(own, expected, data)
    bits = divergence = 0.0
    agreed = 0
    for row, other, byte in zip(own, expected, data, strict=True):
        p, q = log_softmax(other), log_softmax(row)
        bits -= q[byte + 4] / math.log(2)
        divergence += math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) / math.log(2)
        agreed += p.index(max(p)) == q.index(max(q))
    assert tally.bytes == count
    assert tally.bits == pytest.approx(bits)
    assert tally.divergence == pytest.approx(divergence)
    assert tally.agreed == agreed


def test_a_model_agrees_with_itself() -> None:
    _, rows, data = random_rows(0, 50)
    tally = Tally()
    tally.add_predictions(rows, rows, data)
    assert (tally.mean_divergence, tally.argmax_agreement) == (0.0, 1.0)


def test_huge_logits_do_not_overflow() -> None:
    rows = np.full((1, 260), -1e30, np.float32)
    rows[0, 69] = 1e30
    tally = Tally()
    tally.add_predictions(rows, rows, b"A")
    assert tally.bits_per_byte == 0


@pytest.mark.parametrize(
    ("own", "expected", "false", "missed"),
    [
        ([0, 1, 5, 9], [0, 1, 5, 9], 0, 0),
        ([0, 1, 5, 8, 9, 12], [0, 1, 5, 9], 0.5, 0),
        ([0, 1, 5], [0, 1, 5, 9, 11, 20], 0, 0.75),
        ([0, 1], [0, 1, 2], 0, 1),
        ([0, 1], [0, 1], 0, 0),
    ],
)
def test_boundaries(own: list[int], expected: list[int], false: float, missed: float) -> None:
    tally = Tally()
    tally.add_boundaries(own, expected)
    assert (tally.false_boundaries, tally.missed_boundaries) == (false, missed)


def test_sums_add_up() -> None:
    parts = [Tally(), Tally()]
    whole = Tally()
    for seed, part in enumerate(parts):
        own, expected, data = random_rows(seed, 10)
        for tally in (part, whole):
            tally.add_predictions(own, expected, data)
            tally.add_boundaries([0, 1, 5 + seed, 9], [0, 1, 5, 9])
    total = sum(parts, Tally())
    assert total.to_dict() == whole.to_dict()
    assert total.missed_boundaries == 0.25


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [(b"", b"", 0), (b"abc", b"abc", 3), (b"abc", b"abd", 2), (b"ab", b"abc", 2), (b"x", b"y", 0)],
)
def test_lead(one: bytes, other: bytes, length: int) -> None:
    assert lead_length(one, other) == length
