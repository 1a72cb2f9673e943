"""Hash rows equal transformers' hashes and big-integer arithmetic, for any cut of the text."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.runtime.hashing import PRIMES, HashSpec, hash_rows
from blt_edge.runtime.vocabulary import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.torch_only import torch_or_skip, transformers_or_skip

RELEASED = HashSpec((3, 4, 5, 6, 7, 8), 1, 500002)

SPECS = st.builds(
    HashSpec,
    st.lists(st.integers(1, 12), max_size=4).map(tuple),
    st.integers(0, 13),
    st.one_of(st.integers(1, 50), st.sampled_from([500002, 2**31 + 11, 2**40 + 15])),
)
IDS = st.lists(st.integers(0, 259), max_size=40)


def signed(value: int) -> int:
    """What int64 arithmetic makes of an exact result."""
    return (value + 2**63) % 2**64 - 2**63


def by_definition(spec: HashSpec, ids: list[int]) -> list[list[int]]:
    rows = []
    for i in range(len(ids)):
        row: list[int] = []
        for function in range(spec.functions):
            for size in spec.group_sizes:
                window = [ids[k] if k >= 0 else 0 for k in range(i - size + 1, i + 1)]
                exact = sum(value * PRIMES[function % len(PRIMES)] ** j for j, value in enumerate(window))
                row.append(len(row) * spec.vocab + signed(exact) % spec.vocab)
        rows.append(row)
    return rows


@settings(max_examples=300, deadline=None)
@given(SPECS, IDS, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 3))
def test_rows_equal_big_integer_arithmetic_for_any_cut(
    spec: HashSpec, numbers: list[int], cuts: list[int], more: int
) -> None:
    ids = np.array(numbers, np.int64)
    ids.flags.writeable = False
    whole = hash_rows(spec, ids, len(ids))
    assert (whole.shape, whole.dtype) == ((len(ids), spec.tables), np.int64)
    assert whole.tolist() == by_definition(spec, numbers)
    for start, end in pairwise([0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]):
        past = max(0, start - spec.history - more)  # more history than needed changes nothing
        np.testing.assert_array_equal(hash_rows(spec, ids[past:end], end - start), whole[start:end])


@pytest.mark.parametrize("spec", [RELEASED, HashSpec((2, 3, 11), 3, 4093), HashSpec((1, 20), 12, 500002)])
def test_rows_equal_transformers(spec: HashSpec) -> None:
    torch = torch_or_skip()
    blt = transformers_or_skip("transformers.models.blt.modeling_blt")
    every = bytes(range(256))
    ids = encode(every + every[::-1] + b"\xff" * 32 + b"\x00" * 32 + "Ünïcödé — text, 文字".encode())
    rows, table = hash_rows(spec, ids, len(ids)), 0
    for function in range(spec.functions):
        for size in spec.group_sizes:
            prime = PRIMES[function % len(PRIMES)]
            expected = blt.byte_group_hash_function(torch.from_numpy(ids)[None], size, prime, spec.vocab)
            np.testing.assert_array_equal(rows[:, table], expected[0].numpy() + table * spec.vocab)
            table += 1


def test_rows_equal_the_ones_transformers_looks_up() -> None:
    """Order of functions, groups and primes: the fused table's rows that its own embedding reads."""
    torch = torch_or_skip()
    blt = transformers_or_skip("transformers.models.blt.modeling_blt")
    spec = HashSpec((2, 5, 3), 12, 97)  # twelve functions: the primes begin again
    read: list[NDArray[np.int64]] = []

    def lookup(rows: Any) -> Any:
        read.append(rows[0].numpy())
        return torch.zeros(*rows.shape, 1)

    encoder = SimpleNamespace(embed_tokens=torch.nn.Embedding(260, 1))
    ids = encode(b"The quick brown fox")
    sizes = (spec.functions, list(spec.group_sizes), spec.vocab)
    with torch.no_grad():
        blt.compute_hash_embeddings(torch.from_numpy(ids)[None], encoder, lookup, *sizes)
    np.testing.assert_array_equal(hash_rows(spec, ids, len(ids)), np.stack(read, axis=1))


def test_hashes_do_overflow_int64_at_the_released_sizes() -> None:
    """Else the wrap-around would not be tested."""
    ids = encode(b"wrap around")
    exact = sum(int(value) * PRIMES[0] ** j for j, value in enumerate(ids[-8:]))
    assert exact > 2**63
    assert signed(exact) % 500002 != exact % 500002
    assert hash_rows(RELEASED, ids, 1)[0, 5] == 5 * 500002 + signed(exact) % 500002


def test_nothing_new_gives_no_rows() -> None:
    ids = encode(b"abc")
    assert hash_rows(RELEASED, ids, 0).shape == hash_rows(RELEASED, ids[:0], 0).shape == (0, 6)
    assert hash_rows(HashSpec((), 1, 10), ids, 4).shape == (4, 0)
    assert hash_rows(HashSpec((3,), 0, 10), ids, 1).shape == (1, 0)


@pytest.mark.parametrize("count", [-1, 5])
def test_a_count_that_does_not_fit_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count}; allowed is 0 to the number of ids, 4"):
        hash_rows(RELEASED, encode(b"abc"), count)


def test_a_specification_is_a_value_of_plain_numbers() -> None:
    assert (RELEASED.tables, RELEASED.history) == (6, 7)
    spec = HashSpec([np.int64(4), 2], np.int64(3), np.int64(10))  # type: ignore[arg-type]
    assert (spec.tables, spec.history) == (6, 3)
    assert [type(value) for value in (*spec.group_sizes, spec.functions, spec.vocab)] == [int] * 4
    assert HashSpec((), 2, 10).history == 0
    assert spec == HashSpec((4, 2), 3, 10)
    assert hash(spec) == hash(HashSpec((4, 2), 3, 10))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (((3, 0), 1, 10), "a hash group size is 0; allowed is a whole number >= 1"),
        (((3, True), 1, 10), "a hash group size is True"),
        (((2.0,), 1, 10), "a hash group size is 2.0"),
        (("345", 1, 10), "hash group sizes are '345'; allowed is a list of whole numbers"),
        ((3, 1, 10), "hash group sizes are 3; allowed is a list of whole numbers"),
        (((3,), -1, 10), "the number of hash functions is -1"),
        (((3,), 1, 0), "the hash table's rows is 0"),
        (((3,), 4, 2**61), "more than int64 can index"),
        (((1,), 2, 2**62), "more than int64 can index"),
        (((1,), 1, 2**63), "more than int64 can index"),
    ],
)
def test_impossible_specifications_are_refused(fields: tuple[Any, int, int], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        HashSpec(*fields)


def test_the_last_row_may_be_the_last_int64() -> None:
    assert HashSpec((1,), 1, 2**63 - 1).vocab == 2**63 - 1
    assert HashSpec((1, 1, 1), 1, 2**62 // 2).tables == 3
