"""Writing the embedding tables: byte rows, then hash rows, as one plain file the runtime maps into memory.

They come from a checkpoint, or from a bundle to be had in another precision. The released tables have
gigabytes, so rows stream through in blocks; a block and its copies are all the memory this takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..graphs.config import ModelConfig
from ..runtime.errors import BltError, BundleError, OptionError
from ..runtime.files import open_plain
from ..runtime.specs import TABLE_PRECISIONS, EmbeddingSpec
from ..runtime.table_rows import as_rows, row_decoder
from .checkpoint_base import Checkpoint, CheckpointError
from .table_rows import encode_rows, largest_value
from .tensors import EMBEDDING, HASH_EMBEDDING

__all__ = ["BLOCK_BYTES", "requantize_tables", "table_dtype", "table_spec", "write_tables"]

BLOCK_BYTES = 32 << 20
"""Most bytes of a block of rows, in float32."""

Progress = Callable[[int, int], None]

_DTYPES = {precision: dtype for dtype, precision in TABLE_PRECISIONS.items()}


def table_dtype(precision: str) -> str:
    """ "float16" for "fp16" and so on. Raises OptionError for a precision that tables do not have."""
    if precision not in _DTYPES:
        raise OptionError(f"tables: got {precision!r}, allowed are auto, {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def table_spec(config: ModelConfig, dtype: str, file: str = "tables.bin") -> EmbeddingSpec:
    """A model's tables in a dtype of `TABLE_PRECISIONS`; `.bytes` tells their size beforehand."""
    if dtype not in TABLE_PRECISIONS:
        raise ValueError(f"tables are {', '.join(TABLE_PRECISIONS)}, not {dtype}")
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
    """Write the byte rows [260, D] and then the hash rows [tables * vocab, D] in `dtype`.

    progress(bytes written, bytes in all) after each block. Raises CheckpointError naming tensor and row where
    a value is not finite or beyond the dtype's range; OSError from writing passes through. A failure leaves a
    partial file.
    """
    spec = table_spec(config, dtype, path.name)

    def rows() -> Iterator[NDArray[np.float32]]:
        for name, count in ((EMBEDDING, spec.byte_rows), (HASH_EMBEDDING, spec.rows - spec.byte_rows)):
            for first, block in _blocks(checkpoint, name, count, spec.width):
                _check_values(f"{name}: row", first, block, dtype, CheckpointError)
                yield block

    _write(path, spec, rows(), progress)
    return spec


def requantize_tables(
    bundle: Path,
    spec: EmbeddingSpec,
    path: Path,
    dtype: str,
    progress: Progress | None = None,
) -> EmbeddingSpec:
    """Write the tables that `spec` describes in the directory `bundle` to `path`, in `dtype`.

    The same dtype is a copy. progress and failures are those of `write_tables`. Raises OptionError for tables
    that are quantized already, BundleError where the file is not what `spec` says or a value does not fit.
    """
    if spec.dtype not in (dtype, "float32", "float16"):
        raise OptionError(
            f"tables: those of {bundle} are {spec.precision} already, which can't become "
            f"{TABLE_PRECISIONS[dtype]}; give a bundle whose tables are fp16 or fp32"
        )
    result = EmbeddingSpec(
        path.name, dtype, spec.width, spec.byte_rows, spec.group_sizes, spec.functions, spec.hash_vocab
    )
    decode = row_decoder(spec)

    def rows() -> Iterator[NDArray[np.float32]]:
        first = 0
        for stored in _stored_rows(bundle, spec):
            block = decode(as_rows(stored, spec))
            _check_values(f"{spec.file}: row", first, block, dtype, BundleError)
            yield block
            first += len(block)

    if dtype == spec.dtype:
        _copy(path, spec, _stored_rows(bundle, spec), progress)
    else:
        _write(path, result, rows(), progress)
    return result


# 1. Where rows come from.


def _blocks(
    checkpoint: Checkpoint, name: str, rows: int, width: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    if checkpoint.shape(name) != (rows, width):
        raise CheckpointError(f"{name}: got shape {list(checkpoint.shape(name))}, expected {[rows, width]}")
    step = _rows_per_block(width)
    for first in range(0, rows, step):
        yield first, checkpoint.rows(name, first, min(first + step, rows))


def _stored_rows(bundle: Path, spec: EmbeddingSpec) -> Iterator[memoryview]:
    """The file's bytes, some rows at a time, read and not mapped: pages of a map would count as ours."""
    path = bundle / spec.file
    with open_plain(path) as file:
        for first in range(0, spec.rows, _rows_per_block(spec.width)):
            wanted = min(_rows_per_block(spec.width), spec.rows - first) * spec.row_bytes
            block, filled = memoryview(bytearray(wanted)), 0
            while filled < wanted:
                count = file.readinto(block[filled:])  # type: ignore[attr-defined]
                if not count:
                    raise BundleError(f"{path} is shorter than its {spec.bytes} bytes; copy the bundle again")
                filled += count
            yield block


def _rows_per_block(width: int) -> int:
    return max(1, BLOCK_BYTES // (4 * width))


def _check_values(
    place: str, first: int, block: NDArray[np.float32], dtype: str, kind: type[BltError]
) -> None:
    # Two passes of min and max tell nan, inf and overflow at memory speed; only a bad block is searched.
    limit = largest_value(dtype)
    if -limit <= float(block.min()) and float(block.max()) <= limit:
        return
    bad = ~(np.abs(block) <= limit)
    row, column = (int(index) for index in np.argwhere(bad)[0])
    value = float(block[row, column])
    where = f"{place} {first + row}, column {column} is {value:g}"
    if np.isfinite(value):
        raise kind(f"{where}, {dtype} tables hold at most {limit:g}; export float32 tables instead")
    raise kind(f"{where}, weights must be finite; the checkpoint is damaged, fetch it again")


# 2. Where they go.


def _write(
    path: Path, spec: EmbeddingSpec, blocks: Iterator[NDArray[np.float32]], progress: Progress | None
) -> None:
    encoded = (np.ascontiguousarray(encode_rows(block, spec)).view(np.uint8).data for block in blocks)
    _copy(path, spec, encoded, progress)


def _copy(path: Path, spec: EmbeddingSpec, blocks: Iterator[memoryview], progress: Progress | None) -> None:
    written = 0
    with path.open("wb") as file:
        for block in blocks:
            written += file.write(block)
            if progress is not None:
                progress(written, spec.bytes)
    assert written == spec.bytes, (written, spec)
