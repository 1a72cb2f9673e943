import os
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime.embedding import EmbeddingTable
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.manifest import EmbeddingSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

PRIMES = (1000000007, 5915587277, 1500450271)

SPECS = {
    "released shape": EmbeddingSpec("tables.bin", "float16", 24, 260, (3, 4, 5, 6, 7, 8), 1, 997),
    "two functions": EmbeddingSpec("tables.bin", "float32", 8, 260, (2, 5), 2, 50),
    "many tables, width 1": EmbeddingSpec("tables.bin", "float32", 1, 260, (1, 2, 3, 4, 9), 3, 31),
    "no hashes": EmbeddingSpec("tables.bin", "float16", 8, 260, (3,), 0, 7),
}


def random_rows(spec: EmbeddingSpec) -> NDArray[np.generic]:
    # Wildly different sizes, so that another order of additions shows in the bits.
    random = np.random.default_rng(spec.rows)
    values = random.standard_normal((spec.rows, spec.width)) * 10.0 ** random.integers(-3, 4, (spec.rows, 1))
    return values.astype(spec.dtype)


def by_hand(rows: NDArray[np.generic], spec: EmbeddingSpec, ids: list[int]) -> NDArray[np.float32]:
    """Every position's embedding, with Python's own integers and one float32 addition after the other."""
    result = np.zeros((len(ids), spec.width), np.float32)
    for i, byte_id in enumerate(ids):
        wanted = [byte_id]
        for f in range(spec.functions):
            for g, size in enumerate(spec.group_sizes):
                window = ([0] * size + ids[: i + 1])[-size:]
                total = sum(x * PRIMES[f] ** j for j, x in enumerate(window))
                wrapped = (total + 2**63) % 2**64 - 2**63
                table = f * len(spec.group_sizes) + g
                wanted.append(260 + table * spec.hash_vocab + wrapped % spec.hash_vocab)
        for column in range(spec.width):
            value = np.float32(rows[wanted[0], column])
            for row in wanted[1:]:
                value = np.float32(value + np.float32(rows[row, column]))
            result[i, column] = value
    return result


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


def written(tmp_path: Path, spec: EmbeddingSpec) -> NDArray[np.generic]:
    rows = random_rows(spec)
    (tmp_path / spec.file).write_bytes(rows.tobytes())
    return rows


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_equals_the_definition_bit_for_bit(tmp_path: Path, spec: EmbeddingSpec) -> None:
    rows = written(tmp_path, spec)
    table = EmbeddingTable.open(tmp_path, spec)
    ids = [1, *np.random.default_rng(1).integers(4, 260, 255).tolist()]
    expected = by_hand(rows, spec, ids)
    assert same_bits(table.embed(np.array(ids), len(ids)), expected)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_one_by_one_equals_at_once(tmp_path: Path, spec: EmbeddingSpec) -> None:
    written(tmp_path, spec)
    table = EmbeddingTable.open(tmp_path, spec)
    ids = np.random.default_rng(2).integers(4, 260, 40)
    at_once = table.embed(ids, len(ids))
    history = spec.hash.history
    for i in range(len(ids)):
        assert same_bits(table.embed(ids[max(0, i - history) : i + 1], 1), at_once[i : i + 1])


@given(st.lists(st.integers(0, 259), min_size=1, max_size=60), st.data())
@settings(max_examples=50, deadline=None)
def test_any_cut_gives_the_same(ids: list[int], data: st.DataObject) -> None:
    spec = SPECS["two functions"]
    table = EmbeddingTable(random_rows(spec), spec)
    every = np.array(ids, np.int64)
    count = data.draw(st.integers(0, len(ids)))
    part = table.embed(every[max(0, len(ids) - count - spec.hash.history) :], count)
    assert same_bits(part, table.embed(every, len(ids))[len(ids) - count :])


def test_results_are_the_callers_own(tmp_path: Path) -> None:
    spec = SPECS["no hashes"]
    rows = written(tmp_path, spec)
    table = EmbeddingTable.open(tmp_path, spec)
    table.embed(np.array([5]), 1)[:] = 0
    assert same_bits(table.embed(np.array([5]), 1), rows[5:6].astype(np.float32))


def test_float32_rows_are_not_written_through(tmp_path: Path) -> None:
    spec = EmbeddingSpec("tables.bin", "float32", 8, 260, (3,), 1, 7)
    rows = written(tmp_path, spec)
    EmbeddingTable.open(tmp_path, spec).embed(np.array([5, 6, 7]), 3)[:] = 0
    assert (tmp_path / "tables.bin").read_bytes() == rows.tobytes()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_large_table_is_not_loaded(tmp_path: Path) -> None:
    spec = EmbeddingSpec("tables.bin", "float16", 1024, 260, (3, 4, 5, 6, 7, 8), 1, 50_000)
    with (tmp_path / spec.file).open("wb") as file:
        file.truncate(spec.bytes)  # a hole of 600 MB

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    table = EmbeddingTable.open(tmp_path, spec)
    for _ in range(10):
        table.embed(np.arange(4, 12), 1)
    assert resident() - before < 20 << 20


@pytest.mark.parametrize("difference", [-1, 1, -16])
def test_wrong_size_is_refused(tmp_path: Path, difference: int) -> None:
    spec = SPECS["no hashes"]
    (tmp_path / spec.file).write_bytes(bytes(spec.bytes + difference))
    with pytest.raises(
        BundleError, match=rf"has {spec.bytes + difference} bytes, its tables need {spec.bytes}"
    ):
        EmbeddingTable.open(tmp_path, spec)


def test_missing_and_linked_files_are_refused(tmp_path: Path) -> None:
    spec = SPECS["no hashes"]
    with pytest.raises(BundleError, match="is missing"):
        EmbeddingTable.open(tmp_path, spec)
    (tmp_path / "real").write_bytes(bytes(spec.bytes))
    (tmp_path / spec.file).symlink_to("real")
    with pytest.raises(BundleError, match="is a link"):
        EmbeddingTable.open(tmp_path, spec)
