"""Write a GGUF file of a random Llama in Q4_0, tensor by tensor: a peer of any size without a download.

Theory: decoding speed of a dense model depends on shapes and formats only. Q4_0 holds 32 weights as one
float16 scale and 32 four-bit integers, 18 bytes; here the integers are random and every scale is the one
that gives the weights a standard deviation of 0.02. llama.cpp loads no model without a vocabulary, so that is
copied from a GGUF file that has one. Memory stays at one tensor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import need
from .llama_shape import LlamaShape

__all__ = ["BLOCK", "BLOCK_BYTES", "gguf_parameters", "q4_0_rows", "write_random_llama"]

BLOCK = 32
"""Weights in a block of Q4_0."""
BLOCK_BYTES = 18
"""Bytes of such a block: a float16 scale and 32 halves of a byte."""

_DEVIATION = 0.02
_UNIFORM_DEVIATION = float(np.std(np.arange(-8, 8)))
_FILE_TYPE_Q4_0 = 2


def write_random_llama(path: Path, shape: LlamaShape, vocabulary: Path, seed: int = 0) -> Path:
    """Write `path` for `shape` with the tokenizer of the GGUF file `vocabulary`; returns `path`.

    The vocabulary must have `shape.vocabulary` tokens; widths are multiples of 32. Written to a temporary
    sibling and renamed at the end: a failure leaves no `path`. Raises BenchError without the gguf package.
    """
    gguf = need("gguf")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    try:
        _describe(writer, shape)
        _copy_tokenizer(writer, gguf.GGUFReader(vocabulary))
        q4_0 = gguf.GGMLQuantizationType.Q4_0
        for name, rows, columns in shape.tensors():
            if columns is None:
                writer.add_tensor_info(name, (rows,), np.dtype(np.float32), 4 * rows)
            else:
                size = (rows, columns // BLOCK * BLOCK_BYTES)
                writer.add_tensor_info(name, size, np.dtype(np.uint8), size[0] * size[1], q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        random = np.random.default_rng(seed)
        for _, rows, columns in shape.tensors():
            ones = columns is None
            writer.write_tensor_data(
                np.ones(rows, np.float32) if ones else q4_0_rows(random, rows, columns or 0)
            )
        writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def q4_0_rows(random: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Random Q4_0 weights, uint8 [rows, columns / 32 * 18]; `columns` is a multiple of 32."""
    blocks = rows * columns // BLOCK
    data = np.empty((blocks, BLOCK_BYTES), np.uint8)
    data[:, :2] = np.frombuffer(np.float16(_DEVIATION / _UNIFORM_DEVIATION).tobytes(), np.uint8)
    data[:, 2:] = np.frombuffer(random.bytes(blocks * (BLOCK_BYTES - 2)), np.uint8).reshape(blocks, -1)
    return data.reshape(rows, -1)


def gguf_parameters(path: Path) -> int:
    """Trained numbers in a GGUF file, from its header. Raises BenchError without the gguf package."""
    return sum(int(tensor.n_elements) for tensor in need("gguf").GGUFReader(path).tensors)


def _describe(writer: Any, shape: LlamaShape) -> None:
    writer.add_name("random llama")
    writer.add_file_type(_FILE_TYPE_Q4_0)
    writer.add_quantization_version(2)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)


def _copy_tokenizer(writer: Any, source: Any) -> None:
    for name, field in source.fields.items():
        if name.startswith("tokenizer.") and "chat_template" not in name:
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
