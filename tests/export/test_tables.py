"""Embedding tables: what is written is what the runtime reads back, however rows are stored."""

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from blt_edge.export import tables
from blt_edge.export.checkpoint_base import Checkpoint, CheckpointError
from blt_edge.export.tables import (
    encode_rows,
    largest_value,
    requantize_tables,
    table_dtype,
    table_spec,
    write_tables,
)
from blt_edge.graphs.config import ModelConfig
from blt_edge.runtime.embedding import EmbeddingTable, as_rows, row_decoder
from blt_edge.runtime.embedding_spec import EmbeddingSpec
from blt_edge.runtime.errors import BundleError, OptionError
from blt_edge.runtime.hashing import HashSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

BYTES = "model.local_encoder.embed_tokens.weight"
HASHES = "model.encoder_hash_tok_embedding.weight"


class FakeCheckpoint:
    """Two tensors; remembers how many rows were asked for at once."""

    def __init__(self, width: int, hash_rows: int) -> None:
        random = np.random.default_rng(3)
        self.tensors = {
            BYTES: random.standard_normal((260, width)).astype(np.float32),
            HASHES: random.standard_normal((hash_rows, width)).astype(np.float32),
        }
        self.asked: list[int] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        self.asked.append(stop - start)
        return self.tensors[name][start:stop].copy()


def model(
    width: int = 8, groups: tuple[int, ...] = (3, 5), functions: int = 2, vocab: int = 50
) -> ModelConfig:
    hashes, encoder = HashSpec(groups, functions, vocab), SimpleNamespace(width=width)
    return cast(ModelConfig, SimpleNamespace(vocab_size=260, encoder=encoder, hash=hashes))


def write(path: Path, checkpoint: Any, config: ModelConfig, dtype: str, **options: Any) -> EmbeddingSpec:
    return write_tables(path, cast(Checkpoint, checkpoint), config, dtype, **options)


@pytest.fixture
def checkpoint() -> FakeCheckpoint:
    return FakeCheckpoint(8, 200)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_file_is_byte_rows_then_hash_rows(tmp_path: Path, checkpoint: FakeCheckpoint, dtype: str) -> None:
    spec = write(tmp_path / "t.bin", checkpoint, model(), dtype)
    assert spec == EmbeddingSpec("t.bin", dtype, 8, 260, (3, 5), 2, 50)
    expected = np.concatenate([checkpoint.tensors[BYTES], checkpoint.tensors[HASHES]]).astype(dtype)
    stored = np.fromfile(tmp_path / "t.bin", np.dtype(dtype).newbyteorder("<")).reshape(-1, 8)
    np.testing.assert_array_equal(stored, expected)
    assert (tmp_path / "t.bin").stat().st_size == spec.bytes == table_spec(model(), dtype).bytes


def test_the_runtime_maps_it(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    spec = write(tmp_path / "tables.bin", checkpoint, model(), "float32")
    embedded = EmbeddingTable.open(tmp_path, spec).embed(np.array([1]), 1)
    # After nothing but BOS (id 1), every window is zeros and then 1: hash = prime ** (size - 1), mod 2 ** 64.
    row = checkpoint.tensors[BYTES][1].copy()
    hashes = [(1000000007, 3), (1000000007, 5), (5915587277, 3), (5915587277, 5)]
    for table, (prime, size) in enumerate(hashes):
        wrapped = (prime ** (size - 1) + 2**63) % 2**64 - 2**63
        row += checkpoint.tensors[HASHES][table * 50 + wrapped % 50]
    np.testing.assert_array_equal(embedded[0], row)


@pytest.mark.parametrize("block", [1, 32, 100, 32 * 7, 1 << 20])
def test_blocks_do_not_matter(
    tmp_path: Path, checkpoint: FakeCheckpoint, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole", checkpoint, model(), "float16")
    checkpoint.asked.clear()
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    write(tmp_path / "parts", checkpoint, model(), "float16")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert max(checkpoint.asked) == min(max(1, block // 32), 260)
    assert sum(checkpoint.asked) == 460


def test_memory_is_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tables.BLOCK_BYTES <= 32 << 20
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1 << 20)
    checkpoint = FakeCheckpoint(64, 200_000)  # 51 MB in float32
    tracemalloc.start()
    spec = write(tmp_path / "t", checkpoint, model(64, (3,), 1, 200_000), "float16")
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.reset_peak()
    requantize_tables(tmp_path, spec, tmp_path / "t8", "int8")
    assert tracemalloc.get_traced_memory()[1] < 7 << 20
    tracemalloc.stop()


def test_progress_reaches_the_end(
    tmp_path: Path, checkpoint: FakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)
    calls: list[tuple[int, int]] = []
    spec = write(tmp_path / "t", checkpoint, model(), "float16", progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert calls[-1] == (spec.bytes, spec.bytes)
    assert len(calls) > 5


@pytest.mark.parametrize("name", [BYTES, HASHES])
@pytest.mark.parametrize("value", [65536.0, -70000.0])
def test_beyond_float16_is_refused_by_name(
    tmp_path: Path, checkpoint: FakeCheckpoint, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)
    checkpoint.tensors[name][123, 4] = value
    with pytest.raises(CheckpointError, match=rf"{name}: row 123, column 4 is {value:g}, .* at most 65504"):
        write(tmp_path / "t", checkpoint, model(), "float16")
    write(tmp_path / "t", checkpoint, model(), "float32")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(tmp_path: Path, checkpoint: FakeCheckpoint, dtype: str, value: float) -> None:
    checkpoint.tensors[HASHES][199, 7] = value
    wrong = rf"{HASHES}: row 199, column 7 is {value:g}, weights must be finite"
    with pytest.raises(CheckpointError, match=wrong):
        write(tmp_path / "t", checkpoint, model(), dtype)


def test_wrong_shape_is_named(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=rf"{HASHES}: got shape \[200, 8\], expected \[204, 8\]"):
        write(tmp_path / "t", checkpoint, model(vocab=51), "float16")


def test_no_other_type(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        write(tmp_path / "t", checkpoint, model(), "bfloat16")
    assert not (tmp_path / "t").exists()


# Tables of a bundle, in another precision.


def bundle(folder: Path, dtype: str = "float32", width: int = 40, vocab: int = 500) -> EmbeddingSpec:
    spec = EmbeddingSpec("tables.bin", dtype, width, 260, (3, 4), 1, vocab)
    rows = np.random.default_rng(5).standard_normal((spec.rows, width)).astype(dtype)
    (folder / spec.file).write_bytes(rows.tobytes())
    return spec


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize("block", [1, 999, 1 << 25])
def test_new_tables_give_nearly_the_same(
    tmp_path: Path, dtype: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    (tmp_path / "new").mkdir()
    spec = bundle(tmp_path, vocab=50)
    calls: list[tuple[int, int]] = []
    made = requantize_tables(tmp_path, spec, tmp_path / "new/t.bin", dtype, lambda *call: calls.append(call))
    assert (tmp_path / "new/t.bin").stat().st_size == made.bytes
    assert calls[-1] == (made.bytes, made.bytes)
    ids = np.random.default_rng(6).integers(4, 260, 200)
    old = EmbeddingTable.open(tmp_path, spec).embed(ids, 200)
    new = EmbeddingTable.open(tmp_path / "new", made).embed(ids, 200)
    missed = (new - old).std() / old.std()
    assert 0 < missed < {"float16": 3e-4, "int8": 0.01, "int4": 0.1}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_the_same_precision_is_a_copy(tmp_path: Path, dtype: str) -> None:
    spec = EmbeddingSpec("tables.bin", dtype, 40, 260, (3, 4), 1, 50)
    data = np.random.default_rng(0).integers(0, 60, spec.bytes, dtype=np.uint8).tobytes()
    (tmp_path / spec.file).write_bytes(data)
    made = requantize_tables(tmp_path, spec, tmp_path / "copy.bin", dtype)
    assert (tmp_path / "copy.bin").read_bytes() == data
    assert (made.dtype, made.file) == (dtype, "copy.bin")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_tables_are_not_quantized_again(tmp_path: Path, dtype: str) -> None:
    spec = EmbeddingSpec("tables.bin", dtype, 40, 260, (3, 4), 1, 50)
    with pytest.raises(OptionError, match=f"are {dtype} already, which can't become fp16; give a bundle"):
        requantize_tables(tmp_path, spec, tmp_path / "t.bin", "float16")
    assert not (tmp_path / "t.bin").exists()


def test_a_value_beyond_float16_is_named(tmp_path: Path) -> None:
    spec = bundle(tmp_path, vocab=50)
    rows = np.fromfile(tmp_path / spec.file, np.float32).reshape(-1, 40)
    rows[300, 7] = 1e5
    (tmp_path / spec.file).write_bytes(rows.tobytes())
    with pytest.raises(BundleError, match=r"tables.bin: row 300, column 7 is 100000, .* at most 65504"):
        requantize_tables(tmp_path, spec, tmp_path / "t.bin", "float16")


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    spec = bundle(tmp_path, vocab=50)
    (tmp_path / spec.file).write_bytes(bytes(spec.bytes - 8))
    with pytest.raises(BundleError, match="is shorter than its"):
        requantize_tables(tmp_path, spec, tmp_path / "t.bin", "int8")


def test_precision_words() -> None:
    dtypes = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}
    assert {word: table_dtype(word) for word in dtypes} == dtypes
    with pytest.raises(OptionError, match="tables: got 'int2', allowed are"):
        table_dtype("int2")


# Rows, there and back.


def little(dtype: str, width: int) -> EmbeddingSpec:
    return EmbeddingSpec("tables.bin", dtype, width, 260, (3,), 1, 7)


def there_and_back(block: np.ndarray, dtype: str) -> np.ndarray:
    layout = little(dtype, block.shape[1])
    rows = encode_rows(block, layout)
    assert rows.nbytes == len(block) * layout.row_bytes
    return row_decoder(layout)(as_rows(rows.tobytes(), layout))


def blocks(largest: float) -> st.SearchStrategy[np.ndarray]:
    values = st.floats(-largest, largest, width=32)
    return arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 70)), elements=values)


@given(blocks(2.0**100))
@settings(max_examples=100, deadline=None)
def test_int8_misses_by_half_a_step(block: np.ndarray) -> None:
    found = there_and_back(block, "int8").astype(np.float64)
    for row, stored in zip(block.astype(np.float64), found, strict=True):
        step = max(np.abs(row).max() / 127, 1e-44)
        assert np.abs(row - stored).max() <= step * 0.50001 + 1e-44


@given(blocks(1000.0))
@settings(max_examples=100, deadline=None)
def test_int4_is_no_worse_than_plain_rounding(block: np.ndarray) -> None:
    found = there_and_back(block, "int4").astype(np.float64)
    for at in range(0, block.shape[1], 32):
        part = block[:, at : at + 32].astype(np.float64)
        for row, stored in zip(part, found[:, at : at + 32], strict=True):
            scale = float(np.float16(np.abs(row).max() / 7))
            plain = np.clip(np.rint(row / scale), -8, 7) * scale if scale else np.zeros_like(row)
            allowed = ((row - plain) ** 2).sum()
            assert ((row - stored) ** 2).sum() <= allowed * 1.0001 + 32 * 1e-13


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_largest_value_is_held(dtype: str) -> None:
    largest = largest_value(dtype)
    block = np.zeros((2, 64), np.float32)
    block[0, :2] = largest, -largest
    found = there_and_back(block, dtype)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0, :2], block[0, :2], rtol=0.07)
    assert not found[0, 32:].any()
    assert not found[1].any()


def test_rows_that_fit_are_exact() -> None:
    random = np.random.default_rng(0)
    whole = random.integers(-7, 8, (50, 64)).astype(np.float32)
    whole[:, ::32] = 7
    np.testing.assert_array_equal(there_and_back(whole / 4, "int4"), whole / 4)
    whole = random.integers(-127, 128, (50, 64)).astype(np.float32)
    whole[:, 0] = 127
    np.testing.assert_array_equal(there_and_back(whole / 16, "int8"), whole / 16)


@pytest.mark.parametrize(("dtype", "allowed"), [("float16", 3e-4), ("int8", 0.008), ("int4", 0.084)])
def test_error_on_gaussian_rows(dtype: str, allowed: float) -> None:
    block = np.random.default_rng(0).standard_normal((500, 1024)).astype(np.float32)
    missed = there_and_back(block, dtype) - block
    assert missed.std() < allowed * block.std()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rows_do_not_depend_on_their_block(dtype: str) -> None:
    block = np.random.default_rng(0).standard_normal((3000, 40)).astype(np.float32)
    whole = encode_rows(block, little(dtype, 40))
    parts = [encode_rows(block[at : at + 7], little(dtype, 40)) for at in range(0, 3000, 7)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
