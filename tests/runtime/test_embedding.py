"""Rows of every type against struct and Python's own integers; embeddings against one addition at a time."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import embedding
from blt_edge.runtime.embedding import EmbeddingTable, as_rows, row_decoder
from blt_edge.runtime.embedding_spec import EmbeddingSpec
from blt_edge.runtime.errors import BundleError
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

PRIMES = (1000000007, 5915587277, 1500450271)
DTYPES = ("float32", "float16", "int8", "int4")
RELEASED = (3, 4, 5, 6, 7, 8)

SPECS = {
    "released shape": EmbeddingSpec("tables.bin", "float16", 24, 260, RELEASED, 1, 997),
    "two functions": EmbeddingSpec("tables.bin", "float32", 8, 260, (2, 5), 2, 50),
    "many tables, width 1": EmbeddingSpec("tables.bin", "float32", 1, 260, (1, 2, 3, 4, 9), 3, 31),
    "no hashes": EmbeddingSpec("tables.bin", "float16", 8, 260, (3,), 0, 7),
    "int8": EmbeddingSpec("tables.bin", "int8", 40, 260, (3, 4), 2, 101),
    "int4": EmbeddingSpec("tables.bin", "int4", 40, 260, (3, 4), 2, 101),
}
by_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


# 1. Rows.


def narrow(dtype: str, width: int, rows: int = 261) -> EmbeddingSpec:
    return EmbeddingSpec("tables.bin", dtype, width, 260, (3,), 1, rows - 260)


def row_by_hand(row: bytes, dtype: str, width: int) -> list[float]:
    """One row as the module's text describes it, with struct and Python's own integers."""
    if dtype in ("float32", "float16"):
        return list(struct.unpack(f"<{width}{'f' if dtype == 'float32' else 'e'}", row))
    if dtype == "int8":
        scale, *values = struct.unpack(f"<f{width}b", row)
        return [float(np.float32(scale) * np.float32(value)) for value in values]
    blocks = (width + 31) // 32
    scales = struct.unpack(f"<{blocks}e", row[: 2 * blocks])
    result = []
    for column in range(width):
        byte = row[2 * blocks + column // 2]
        half = byte >> 4 if column % 2 else byte & 15
        result.append(float(np.float32(scales[column // 32]) * np.float32(half - 16 if half > 7 else half)))
    return result


def random_bytes(spec: EmbeddingSpec, rows: int, seed: int) -> bytes:
    """Rows of random bits, but none infinite or nan, which no table is."""
    data = np.random.default_rng(seed).integers(0, 256, (rows, spec.row_bytes), dtype=np.uint8)
    floats = {"int8": 4, "int4": 2 * spec.blocks}.get(spec.dtype, spec.row_bytes)
    step, mask = (4, 0xBF) if spec.dtype in ("float32", "int8") else (2, 0xBB)
    data[:, step - 1 : floats : step] &= mask
    return data.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@given(width=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_rows_mean_what_the_layout_says(dtype: str, width: int, seed: int) -> None:
    spec = narrow(dtype, width)
    data = random_bytes(spec, 3, seed)
    found = row_decoder(spec)(as_rows(data, spec))
    assert (found.dtype, found.shape) == (np.float32, (3, width))
    for row in range(3):
        part = data[row * spec.row_bytes : (row + 1) * spec.row_bytes]
        assert found[row].tolist() == row_by_hand(part, dtype, width)


def test_every_finite_float16() -> None:
    patterns = np.arange(65536, dtype="<u2")
    patterns = patterns[np.isfinite(patterns.view("<f2"))]
    spec = narrow("float16", 1, len(patterns))
    found = row_decoder(spec)(as_rows(patterns.tobytes(), spec))[:, 0]
    expected = [struct.unpack("<e", pattern.tobytes())[0] for pattern in patterns]
    assert found.tobytes() == np.array(expected, np.float32).tobytes()  # zeros keep their sign


@pytest.mark.parametrize(("dtype", "released"), [("float16", 6.145e9), ("int8", 3.1e9), ("int4", 1.73e9)])
def test_size_at_the_released_shape(dtype: str, released: float) -> None:
    spec = EmbeddingSpec("tables.bin", dtype, 1024, 260, RELEASED, 1, 500_002)
    assert spec.rows == 3_000_272
    assert released * 0.99 < spec.bytes <= released


# 2. Embeddings.


def written(folder: Path, spec: EmbeddingSpec) -> NDArray[np.float32]:
    """Write random rows; returns what they mean."""
    if spec.dtype.startswith("int"):
        data = random_bytes(spec, spec.rows, seed=1)
    else:
        # Wildly different sizes, so that another order of additions shows in the bits.
        random = np.random.default_rng(spec.rows)
        sizes = 10.0 ** random.integers(-3, 4, (spec.rows, 1))
        data = (random.standard_normal((spec.rows, spec.width)) * sizes).astype(spec.dtype).tobytes()
    (folder / spec.file).write_bytes(data)
    return row_decoder(spec)(as_rows(data, spec))


def by_hand(rows: NDArray[np.float32], spec: EmbeddingSpec, ids: list[int]) -> NDArray[np.float32]:
    """Every position's embedding, with Python's own integers and one float32 addition after the other."""
    result = np.zeros((len(ids), spec.width), np.float32)
    for i, byte_id in enumerate(ids):
        wanted = [byte_id]
        for table in range(spec.functions * len(spec.group_sizes)):
            size = spec.group_sizes[table % len(spec.group_sizes)]
            prime = PRIMES[table // len(spec.group_sizes)]
            window = ([0] * size + ids[: i + 1])[-size:]
            total = sum(x * prime**j for j, x in enumerate(window))
            wrapped = (total + 2**63) % 2**64 - 2**63
            wanted.append(260 + table * spec.hash_vocab + wrapped % spec.hash_vocab)
        result[i] = rows[wanted[0]]
        for row in wanted[1:]:
            result[i] += rows[row]
    return result


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


@by_spec
def test_at_once_and_one_by_one_equal_the_definition_bit_for_bit(tmp_path: Path, spec: EmbeddingSpec) -> None:
    rows = written(tmp_path, spec)
    table = EmbeddingTable.open(tmp_path, spec)
    ids = np.array([1, *np.random.default_rng(1).integers(4, 260, 99).tolist()])
    expected = by_hand(rows, spec, ids.tolist())
    with np.errstate(all="ignore"):
        assert same_bits(table.embed(ids, len(ids)), expected)
        for i in range(len(ids)):
            one = table.embed(ids[max(0, i - spec.hash.history) : i + 1], 1)
            assert same_bits(np.ascontiguousarray(one), expected[i : i + 1])


@by_spec
def test_results_are_the_callers_own(tmp_path: Path, spec: EmbeddingSpec) -> None:
    written(tmp_path, spec)
    before, table = (tmp_path / spec.file).read_bytes(), EmbeddingTable.open(tmp_path, spec)
    first = table.embed(np.array([5, 6, 7]), 3)
    kept = first.copy()
    first[:] = 0
    assert same_bits(np.ascontiguousarray(table.embed(np.array([5, 6, 7]), 3)), kept)
    assert (tmp_path / spec.file).read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_a_large_table_is_not_loaded(tmp_path: Path, dtype: str) -> None:
    spec = EmbeddingSpec("tables.bin", dtype, 1024, 260, RELEASED, 1, 50_000)
    with (tmp_path / spec.file).open("wb") as file:
        file.truncate(spec.bytes)  # a hole of 170 to 600 MB

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    table = EmbeddingTable.open(tmp_path, spec)
    for _ in range(10):
        table.embed(np.arange(4, 12), 1)
    assert resident() - before < 20 << 20


class Advised:
    """A mapped file that writes down what the system was told of."""

    def __init__(self, size: int) -> None:
        self.size, self.told = size, set[int]()

    def __len__(self) -> int:
        return self.size

    def madvise(self, option: int, start: int, length: int) -> None:
        assert option == mmap.MADV_WILLNEED
        assert start % mmap.PAGESIZE == 0
        assert 0 <= start < start + length <= -(-self.size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.told |= set(range(start, start + length, mmap.PAGESIZE))


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="this system takes no such advice")
@by_spec
def test_reading_ahead_is_of_every_page_that_a_chunk_reads(
    spec: EmbeddingSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = as_rows(random_bytes(spec, spec.rows, 3), spec)
    ids = np.random.default_rng(5).integers(4, 260, 200)

    class Watched(np.ndarray):
        """Rows that write down which of them were taken."""

        def take(self, index: NDArray[np.int64], axis: int) -> NDArray[np.generic]:  # type: ignore[override]
            taken.append(index)
            return np.asarray(self).take(index, axis=axis)

    taken: list[NDArray[np.int64]] = []
    monkeypatch.setattr(embedding, "_NEVER_RESIDENT", 0)
    memory = Advised(spec.bytes)
    table = EmbeddingTable(rows.view(Watched), spec, memory)  # type: ignore[arg-type]
    table.read_ahead(ids[:10], 10)  # few rows are there as soon as they are told of
    assert not memory.told
    table.read_ahead(ids, 150)
    table.embed(ids, 150)
    starts = np.unique(taken[0][1:]) * spec.row_bytes
    pages = {int(at) // mmap.PAGESIZE * mmap.PAGESIZE for at in (*starts, *(starts + spec.row_bytes - 1))}
    assert memory.told == pages
    monkeypatch.setattr(embedding, "_NEVER_RESIDENT", spec.bytes)
    small = Advised(spec.bytes)
    EmbeddingTable(rows, spec, small).read_ahead(ids, 150)  # type: ignore[arg-type]
    assert not small.told


def test_reading_ahead_of_a_file_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["int8"]
    (tmp_path / spec.file).write_bytes(random_bytes(spec, spec.rows, 3))
    ids = np.arange(4, 240)
    wanted = EmbeddingTable.open(tmp_path, spec).embed(ids, 200)
    monkeypatch.setattr(embedding, "_NEVER_RESIDENT", 0)
    table = EmbeddingTable.open(tmp_path, spec)
    table.read_ahead(ids, 200)
    assert np.array_equal(table.embed(ids, 200), wanted)


@pytest.mark.parametrize("difference", [-1, 1, -16])
def test_wrong_size_is_refused(tmp_path: Path, difference: int) -> None:
    spec = SPECS["no hashes"]
    (tmp_path / spec.file).write_bytes(bytes(spec.bytes + difference))
    with pytest.raises(BundleError, match=rf"has {spec.bytes + difference} bytes.* need {spec.bytes}"):
        EmbeddingTable.open(tmp_path, spec)


def test_missing_and_linked_files_are_refused(tmp_path: Path) -> None:
    spec = SPECS["no hashes"]
    with pytest.raises(BundleError, match="is missing"):
        EmbeddingTable.open(tmp_path, spec)
    (tmp_path / "real").write_bytes(bytes(spec.bytes))
    (tmp_path / spec.file).symlink_to("real")
    with pytest.raises(BundleError, match="is a link"):
        EmbeddingTable.open(tmp_path, spec)
