import numpy as np
import pytest
from blt_edge.export.tables import encode_rows, largest_value
from blt_edge.runtime.embedding import as_rows, row_decoder
from blt_edge.runtime.manifest import EmbeddingSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays


def spec(dtype: str, width: int) -> EmbeddingSpec:
    return EmbeddingSpec("tables.bin", dtype, width, 260, (3,), 1, 7)


def there_and_back(block: np.ndarray, dtype: str) -> np.ndarray:
    layout = spec(dtype, block.shape[1])
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
    whole = encode_rows(block, spec(dtype, 40))
    parts = [encode_rows(block[at : at + 7], spec(dtype, 40)) for at in range(0, 3000, 7)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
