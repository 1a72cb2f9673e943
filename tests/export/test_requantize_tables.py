import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from blt_edge.export import tables
from blt_edge.export.tables import requantize_tables, table_dtype
from blt_edge.runtime.embedding import EmbeddingTable
from blt_edge.runtime.errors import BundleError, OptionError
from blt_edge.runtime.manifest import EmbeddingSpec


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
    made = requantize_tables(
        tmp_path, spec, tmp_path / "new/t.bin", dtype, lambda done, total: calls.append((done, total))
    )
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


def test_memory_is_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1 << 20)
    spec = bundle(tmp_path, "float16", 64, 100_000)  # 51 MB in float32
    tracemalloc.start()
    requantize_tables(tmp_path, spec, tmp_path / "t.bin", "int8")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 << 20


def test_precision_words() -> None:
    assert [table_dtype(word) for word in ("fp32", "fp16", "int8", "int4")] == [
        "float32",
        "float16",
        "int8",
        "int4",
    ]
    with pytest.raises(OptionError, match="tables: got 'int2', allowed are"):
        table_dtype("int2")
