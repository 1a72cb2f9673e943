import os
import struct
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime.embedding import EmbeddingTable, as_rows, row_decoder
from blt_edge.runtime.manifest import EmbeddingSpec
from hypothesis import given, settings
from hypothesis import strategies as st


def spec(dtype: str, width: int, rows: int = 260) -> EmbeddingSpec:
    return EmbeddingSpec("tables.bin", dtype, width, 260, (3,), 1, max(1, rows - 260))


def decode(data: bytes, layout: EmbeddingSpec) -> np.ndarray:
    return row_decoder(layout)(as_rows(data, layout))


def by_hand(row: bytes, dtype: str, width: int) -> list[float]:
    """One row as the module's text describes it, with struct and Python's own integers."""
    if dtype == "float32":
        return list(struct.unpack(f"<{width}f", row))
    if dtype == "float16":
        return list(struct.unpack(f"<{width}e", row))
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
@given(width=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_rows_mean_what_the_layout_says(dtype: str, width: int, seed: int) -> None:
    layout = spec(dtype, width)
    data = bytearray(np.random.default_rng(seed).bytes(3 * layout.row_bytes))
    # Random bits are infinite or nan now and then, which no table is.
    step, mask = {"float32": (4, 0xBF), "float16": (2, 0xBB), "int8": (4, 0xBF), "int4": (2, 0xBB)}[dtype]
    for row in range(3):
        floats = {"int8": 4, "int4": 2 * layout.blocks}.get(dtype, layout.row_bytes)
        for at in range(step - 1, floats, step):
            data[row * layout.row_bytes + at] &= mask
    found = decode(bytes(data), layout)
    assert found.dtype == np.float32
    assert found.shape == (3, width)
    for row in range(3):
        part = bytes(data[row * layout.row_bytes : (row + 1) * layout.row_bytes])
        assert found[row].tolist() == by_hand(part, dtype, width)


def test_every_finite_float16() -> None:
    patterns = np.arange(65536, dtype="<u2")
    patterns = patterns[np.isfinite(patterns.view("<f2"))]
    layout = spec("float16", 1, len(patterns))
    found = decode(patterns.tobytes(), layout)[:, 0]
    expected = [struct.unpack("<e", pattern.tobytes())[0] for pattern in patterns]
    assert found.tobytes() == np.array(expected, np.float32).tobytes()  # zeros keep their sign


@pytest.mark.parametrize(("dtype", "released"), [("float16", 6.145e9), ("int8", 3.1e9), ("int4", 1.73e9)])
def test_size_at_the_released_shape(dtype: str, released: float) -> None:
    layout = EmbeddingSpec("tables.bin", dtype, 1024, 260, (3, 4, 5, 6, 7, 8), 1, 500_002)
    assert layout.rows == 3_000_272
    assert released * 0.99 < layout.bytes <= released


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_row_depends_on_no_other(tmp_path: Path, dtype: str) -> None:
    layout = EmbeddingSpec("tables.bin", dtype, 40, 260, (3, 4), 2, 101)
    rows = np.random.default_rng(1).integers(0, 60, layout.bytes, dtype=np.uint8)
    (tmp_path / layout.file).write_bytes(rows.tobytes())
    table = EmbeddingTable.open(tmp_path, layout)
    ids = np.random.default_rng(2).integers(4, 260, 50)
    at_once = table.embed(ids, 50)
    for i in range(50):
        one = table.embed(ids[max(0, i - layout.hash.history) : i + 1], 1)
        assert one.tobytes() == np.ascontiguousarray(at_once[i : i + 1]).tobytes()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_large_tables_are_not_loaded(tmp_path: Path, dtype: str) -> None:
    layout = EmbeddingSpec("tables.bin", dtype, 1024, 260, (3, 4, 5, 6, 7, 8), 1, 50_000)
    with (tmp_path / layout.file).open("wb") as file:
        file.truncate(layout.bytes)  # a hole of 170 to 310 MB

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    table = EmbeddingTable.open(tmp_path, layout)
    for _ in range(10):
        table.embed(np.arange(4, 12), 1)
    assert resident() - before < 20 << 20
