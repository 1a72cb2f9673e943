import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from blt_edge.export import tables
from blt_edge.export.checkpoint_base import Checkpoint, CheckpointError
from blt_edge.export.tables import table_spec, write_tables
from blt_edge.graphs.config import ModelConfig
from blt_edge.runtime.embedding import EmbeddingTable
from blt_edge.runtime.hashing import HashSpec
from blt_edge.runtime.manifest import EmbeddingSpec
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
    config = SimpleNamespace(
        vocab_size=260, encoder=SimpleNamespace(width=width), hash=HashSpec(groups, functions, vocab)
    )
    return cast(ModelConfig, config)


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
    for table, (prime, size) in enumerate(
        [(1000000007, 3), (1000000007, 5), (5915587277, 3), (5915587277, 5)]
    ):
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


def test_blocks_are_at_most_32_mib() -> None:
    assert tables.BLOCK_BYTES <= 32 << 20


def test_memory_is_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1 << 20)
    checkpoint = FakeCheckpoint(64, 200_000)  # 51 MB
    config = model(64, (3,), 1, 200_000)
    tracemalloc.start()
    write(tmp_path / "t", checkpoint, config, "float16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20


def test_progress_reaches_the_end(
    tmp_path: Path, checkpoint: FakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)
    calls: list[tuple[int, int]] = []
    spec = write(
        tmp_path / "t",
        checkpoint,
        model(),
        "float16",
        progress=lambda done, total: calls.append((done, total)),
    )
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


def test_largest_float16_is_taken(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    checkpoint.tensors[HASHES][0, :2] = 65504, -65504
    write(tmp_path / "t", checkpoint, model(), "float16")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(tmp_path: Path, checkpoint: FakeCheckpoint, dtype: str, value: float) -> None:
    checkpoint.tensors[HASHES][199, 7] = value
    with pytest.raises(
        CheckpointError, match=rf"{HASHES}: row 199, column 7 is {value:g}, weights must be finite"
    ):
        write(tmp_path / "t", checkpoint, model(), dtype)


def test_wrong_shape_is_named(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=rf"{HASHES}: got shape \[200, 8\], expected \[204, 8\]"):
        write(tmp_path / "t", checkpoint, model(vocab=51), "float16")


def test_no_other_type(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        write(tmp_path / "t", checkpoint, model(), "bfloat16")
    assert not (tmp_path / "t").exists()
