"""Writing the embedding tables: byte rows, then hash rows, as one plain file the runtime maps into memory.

The released tables have gigabytes, so rows stream through in blocks; a block and its copy in the file's
type are all the memory this takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..graphs.config import ModelConfig
from ..runtime.manifest import EmbeddingSpec
from .checkpoint_base import Checkpoint, CheckpointError
from .tensors import EMBEDDING, HASH_EMBEDDING

__all__ = ["BLOCK_BYTES", "table_spec", "write_tables"]

BLOCK_BYTES = 32 << 20
"""Most bytes of a block of rows, in float32."""

Progress = Callable[[int, int], None]


def table_spec(config: ModelConfig, dtype: str, file: str = "tables.bin") -> EmbeddingSpec:
    """What the tables of a model will be in "float16" or "float32"; `.bytes` tells their size beforehand."""
    if dtype not in ("float16", "float32"):
        raise ValueError(f"tables are float16 or float32, not {dtype}")
    return EmbeddingSpec(
        file=file,
        dtype=dtype,
        width=config.encoder.width,
        byte_rows=config.vocab_size,
        group_sizes=config.hash.group_sizes,
        functions=config.hash.functions,
        hash_vocab=config.hash.vocab,
    )


def write_tables(
    path: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: str,
    progress: Progress | None = None,
) -> EmbeddingSpec:
    """Write the byte rows [260, D] and then the hash rows [tables * vocab, D], little endian, in `dtype`.

    progress(bytes written, bytes in all) after each block. Raises CheckpointError naming tensor and row where
    a value is not finite or beyond float16's range; OSError from writing passes through. A failure leaves a
    partial file.
    """
    spec = table_spec(config, dtype, path.name)
    stored = np.dtype(dtype).newbyteorder("<")
    written = 0
    with path.open("wb") as file:
        for name, rows in ((EMBEDDING, spec.byte_rows), (HASH_EMBEDDING, spec.rows - spec.byte_rows)):
            for first, block in _blocks(checkpoint, name, rows, spec.width):
                _check_values(name, first, block, dtype)
                written += _write(file, block.astype(stored, copy=False))
                if progress is not None:
                    progress(written, spec.bytes)
    return spec


def _blocks(
    checkpoint: Checkpoint, name: str, rows: int, width: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    if checkpoint.shape(name) != (rows, width):
        raise CheckpointError(f"{name}: got shape {list(checkpoint.shape(name))}, expected {[rows, width]}")
    step = max(1, BLOCK_BYTES // (4 * width))
    for first in range(0, rows, step):
        yield first, checkpoint.rows(name, first, min(first + step, rows))


def _check_values(name: str, first: int, block: NDArray[np.float32], dtype: str) -> None:
    # Two passes of min and max tell nan, inf and overflow at memory speed; only a bad block is searched.
    limit = float(np.finfo(dtype).max)
    if -limit <= float(block.min()) and float(block.max()) <= limit:
        return
    bad = ~(np.abs(block) <= limit)
    row, column = (int(index) for index in np.argwhere(bad)[0])
    value = float(block[row, column])
    place = f"{name}: row {first + row}, column {column} is {value:g}"
    if np.isfinite(value):
        raise CheckpointError(
            f"{place}, float16 tables hold at most {limit:g}; export float32 tables instead"
        )
    raise CheckpointError(f"{place}, weights must be finite; the checkpoint is damaged, fetch it again")


def _write(file: BinaryIO, block: NDArray[np.generic]) -> int:
    return file.write(np.ascontiguousarray(block).view(np.uint8).data)
