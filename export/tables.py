"""Writing the embedding tables: byte rows, then hash rows, as one plain file the runtime maps into memory.

They come from a checkpoint, or from a bundle to be had in another precision. The released tables have
gigabytes, so rows stream through in blocks; a block and its copies are all the memory this takes.

A scale is a row's own in int8, where 127 steps to the largest value lose next to nothing, and a block's own
in int4, where it is searched for by squared error; `runtime.embedding` is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..graphs.config import ModelConfig
from ..runtime.embedding import as_rows, row_decoder
from ..runtime.embedding_spec import TABLE_BLOCK, EmbeddingSpec
from ..runtime.errors import BltError, BundleError, OptionError
from ..runtime.files import open_plain
from ..runtime.names import TABLE_PRECISIONS
from .checkpoint_base import EMBEDDING, HASH_EMBEDDING, Checkpoint, CheckpointError

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]

BLOCK_BYTES = 32 << 20
"""Most bytes of a block of rows, in float32."""
_DTYPES = {precision: dtype for dtype, precision in TABLE_PRECISIONS.items()}
# What the largest value of a block becomes at first. There is a step -8 but none +8, so the scale may be
# negative. On Gaussian rows plain rounding to 7 misses by 9.7 % of the deviation, one scale a row by 14 %;
# these two with the fit after them by 8.3 %, and five tries more, which cut the largest value off, by 8.1 %.
_STEPS = (-8.0, 7.0)
# Rows at a time so that all passes of the search stay in the processor's cache.
_SEARCH_VALUES = 1 << 16


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

    def rows() -> Iterator[Floats]:
        for name, count in ((EMBEDDING, spec.byte_rows), (HASH_EMBEDDING, spec.rows - spec.byte_rows)):
            shape, step = [count, spec.width], _rows_per_block(spec.width)
            if list(checkpoint.shape(name)) != shape:
                raise CheckpointError(f"{name}: got shape {list(checkpoint.shape(name))}, expected {shape}")
            for first in range(0, count, step):
                block = checkpoint.rows(name, first, min(first + step, count))
                _check_values(f"{name}: row", first, block, dtype, CheckpointError)
                yield block

    _write(path, spec, _encoded(rows(), spec), progress)
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
    result = replace(spec, file=path.name, dtype=dtype)
    decode = row_decoder(spec)

    def rows() -> Iterator[Floats]:
        first = 0
        for stored in _stored_rows(bundle, spec):
            block = decode(as_rows(stored, spec))
            _check_values(f"{spec.file}: row", first, block, dtype, BundleError)
            yield block
            first += len(block)

    same = dtype == spec.dtype
    _write(path, result, _stored_rows(bundle, spec) if same else _encoded(rows(), result), progress)
    return result


# 1. Where rows come from.


def _stored_rows(bundle: Path, spec: EmbeddingSpec) -> Iterator[memoryview]:
    """The file's bytes, some rows at a time, read and not mapped: pages of a map would count as ours."""
    path, step = bundle / spec.file, _rows_per_block(spec.width)
    with open_plain(path) as file:
        for first in range(0, spec.rows, step):
            wanted = min(step, spec.rows - first) * spec.row_bytes
            block = np.fromfile(file, np.uint8, wanted)
            if block.size < wanted:
                raise BundleError(f"{path} is shorter than its {spec.bytes} bytes; copy the bundle again")
            yield block.data


def _rows_per_block(width: int) -> int:
    return max(1, BLOCK_BYTES // (4 * width))


def _check_values(place: str, first: int, block: Floats, dtype: str, kind: type[BltError]) -> None:
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


def _encoded(blocks: Iterator[Floats], spec: EmbeddingSpec) -> Iterator[memoryview]:
    return (np.ascontiguousarray(encode_rows(block, spec)).view(np.uint8).data for block in blocks)


def _write(path: Path, spec: EmbeddingSpec, blocks: Iterator[memoryview], progress: Progress | None) -> None:
    written = 0
    with path.open("wb") as file:
        for block in blocks:
            written += file.write(block)
            if progress is not None:
                progress(written, spec.bytes)
    assert written == spec.bytes, (written, spec)


# 3. Rows from float32 to what lies in the file.


def largest_value(dtype: str) -> float:
    """The largest magnitude that tables of this dtype hold."""
    half = float(np.finfo(np.float16).max)
    return {
        "float16": half,
        "int4": 7 * half,  # its scales are float16, and the largest value is at least 7 of them
        "int8": 2.0**127,  # a rounded scale times 127 must not pass float32
        "float32": float(np.finfo(np.float32).max),
    }[dtype]


def encode_rows(block: Floats, spec: EmbeddingSpec) -> NDArray[Any]:
    """float32 [n, width], finite and at most `largest_value`, as rows for the file: contiguous, [n, ...]."""
    if spec.dtype == "int8":
        return _encode_int8(block)
    if spec.dtype == "int4":
        step = max(1, _SEARCH_VALUES // spec.width)
        parts = [_encode_int4(block[at : at + step], spec.blocks) for at in range(0, len(block), step)]
        return np.concatenate(parts)
    return np.ascontiguousarray(block, np.dtype(spec.dtype).newbyteorder("<"))


def _encode_int8(block: Floats) -> NDArray[np.uint8]:
    scales = np.maximum(block.max(axis=1), -block.min(axis=1)) / np.float32(127)
    rows = np.empty((len(block), 4 + block.shape[1]), np.uint8)
    rows[:, :4] = scales.astype("<f4")[:, None].view(np.uint8)
    # A scale too small for float32 belongs to values that are nothing.
    quotients = block / np.where(scales > 0, scales, np.float32(np.inf))[:, None]
    np.rint(quotients, out=quotients)
    rows[:, 4:] = np.clip(quotients, -127, 127, out=quotients).astype(np.int8).view(np.uint8)
    return rows


def _encode_int4(block: Floats, blocks: int) -> NDArray[np.uint8]:
    padded = np.zeros((len(block), blocks * TABLE_BLOCK), np.float32)
    padded[:, : block.shape[1]] = block
    values = padded.reshape(-1, TABLE_BLOCK)
    scales, steps = _search(values)
    scales = scales.reshape(len(block), blocks)
    halves = (steps.reshape(len(block), blocks, TABLE_BLOCK // 2, 2).astype(np.int8) & 15).view(np.uint8)
    nibbles = halves[..., 0] | halves[..., 1] << 4
    return np.concatenate(
        [scales.astype("<f2").view(np.uint8), nibbles.reshape(len(block), -1)], axis=1, dtype=np.uint8
    )


def _search(values: Floats) -> tuple[NDArray[np.float16], Floats]:
    """The scale (float16 [n]) and steps (float32 [n, 32], whole, -8 .. 7) of least squared error."""
    peaks = values[np.arange(len(values)), np.abs(values).argmax(axis=1)]
    scales: NDArray[np.float16] = np.zeros(len(values), np.float16)
    steps = np.zeros_like(values)
    errors = np.full(len(values), np.inf, np.float32)
    for count in _STEPS:
        tried = _finite_half(peaks / np.float32(count))
        found, error = _round_to(values, tried)
        # The best scale for these steps, by least squares; its own rounding may be better still.
        squares, products = (np.einsum("nk,nk->n", other, found) for other in (found, values))
        refined = _finite_half(np.where(squares > 0, products / np.maximum(squares, np.float32(1)), tried))
        again, error_again = _round_to(values, refined)
        for candidate, rounded, missed in ((tried, found, error), (refined, again, error_again)):
            better = missed < errors
            scales[better], errors[better] = candidate[better], missed[better]
            np.copyto(steps, rounded, where=better[:, None])
    return scales, steps


def _round_to(values: Floats, scales: NDArray[np.float16]) -> tuple[Floats, Floats]:
    wide = scales.astype(np.float32)[:, None]
    divisors: Floats = np.where(wide == 0, np.float32(np.inf), wide)
    steps: Floats = values / divisors
    np.rint(steps, out=steps)
    np.clip(steps, -8, 7, out=steps)
    missed = values - steps * wide
    error: Floats = np.einsum("nk,nk->n", missed, missed)
    return steps, error


def _finite_half(scales: Floats) -> NDArray[np.float16]:
    most = np.float32(np.finfo(np.float16).max)
    return np.clip(scales, -most, most).astype(np.float16)
