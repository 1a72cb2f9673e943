"""The parts of a bundle's manifest, as data: where it comes from, its dimensions, tables, graphs, files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .hashing import HashSpec

__all__ = [
    "TABLE_BLOCK",
    "TABLE_PRECISIONS",
    "Axis",
    "CalibrationSpec",
    "EmbeddingSpec",
    "FileRecord",
    "ModelSpec",
    "QuantizationSpec",
    "Source",
    "StageSpec",
]

TABLE_PRECISIONS = {"float16": "fp16", "float32": "fp32", "int8": "int8", "int4": "int4"}
"""The embedding tables' dtypes and what a user calls them."""

TABLE_BLOCK = 32
"""Neighbouring values of a row that share a scale in int4 tables."""


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from."""

    name: str
    """Hub id, folder name or "demo"."""
    layout: str
    """"huggingface" or "meta"."""
    sha256: str
    """The checkpoint's own hash, 64 hexadecimal digits."""
    config: dict[str, Any]
    """The checkpoint's raw configuration."""


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions that belong to no single stage."""

    vocab_size: int
    """Byte ids, 260."""
    width: int
    """Width D of byte embeddings and byte states."""
    cross_attn_k: int
    """Vectors a patch is pooled to."""
    max_positions: int
    """Longest text in ids, BOS included."""
    trained_context: int
    """Ids the model was trained on at once; scoring windows have this length."""
    parameters: dict[str, int]
    """Parameters by stage, and of the embedding as "tables"."""


@dataclass(frozen=True)
class EmbeddingSpec:
    """The file of byte rows and hash rows, in this order, C order, little endian."""

    file: str
    """File name in the bundle."""
    dtype: str
    """One of `TABLE_PRECISIONS`; `table_rows` has the layout of a row in each."""
    width: int
    """Values in a row."""
    byte_rows: int
    """Rows of the byte embedding, 260."""
    group_sizes: tuple[int, ...]
    """Bytes per hash, one table each and per function."""
    functions: int
    """Hash functions."""
    hash_vocab: int
    """Rows of each hash table."""

    @property
    def hash(self) -> HashSpec:
        """How ids become rows of the hash tables."""
        return HashSpec(group_sizes=self.group_sizes, functions=self.functions, vocab=self.hash_vocab)

    @property
    def rows(self) -> int:
        """All rows of the file."""
        return self.byte_rows + len(self.group_sizes) * self.functions * self.hash_vocab

    @property
    def precision(self) -> str:
        """The dtype as a user calls it: "fp16", "fp32", "int8" or "int4"."""
        return TABLE_PRECISIONS[self.dtype]

    @property
    def blocks(self) -> int:
        """Blocks of `TABLE_BLOCK` values in a row, the last one maybe not full."""
        return -(-self.width // TABLE_BLOCK)

    @property
    def row_bytes(self) -> int:
        """Size of a row, its scales included."""
        sizes = {
            "float32": 4 * self.width,
            "float16": 2 * self.width,
            "int8": 4 + self.width,
            "int4": self.blocks * (2 + TABLE_BLOCK // 2),
        }
        return sizes[self.dtype]

    @property
    def bytes(self) -> int:
        """Exact size of the file."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class StageSpec:
    """One graph and the shape of the state it needs."""

    file: str
    """The graph's file name in the bundle."""
    data: str
    """The file name of its weights."""
    precision: str
    """"fp32", "fp16", "int8" (weights and activations), "int8w" (weights in blocks) or "int4" (the same)."""
    layers: int
    """Transformer layers, each with a key/value cache."""
    kv_heads: int
    """Key/value heads of a layer."""
    head_dim: int
    """Width of a head."""
    window: int | None
    """Keys a position sees, itself included; None = all."""
    max_positions: int
    """Positions the stage was made for: bytes, or patches in the latent stage."""
    parameters: int
    """Parameters in the graph."""
    patch_values: int | None = None
    """Values per patch that go from the latent stage to the decoder; None in the other two stages."""

    @property
    def fusable(self) -> bool:
        """Whether ONNX Runtime's fused attention takes heads of this width."""
        return self.head_dim % 16 == 0


@dataclass(frozen=True)
class CalibrationSpec:
    """Where the ranges of int8 activations come from."""

    method: str
    """How a range was read from what was seen, such as "minmax" or "mse"."""
    texts: tuple[str, ...]
    """Names of the texts; the package's own begin with "bundled:"."""
    windows: int
    """Windows that were read, each from BOS."""
    window_bytes: int
    """Bytes of a window."""
    seed: int
    """What chose them."""
    smooth: float | None = None
    """Strength with which activations' ranges were moved into weights before; None = not."""


@dataclass(frozen=True)
class QuantizationSpec:
    """How the integers in the graphs were found."""

    search: str
    """How weight scales were found: "mse" or "rtn"."""
    block_size: int
    """Inputs that share a weight scale in int8w and int4 stages."""
    calibration: CalibrationSpec | None
    """None when no stage has int8 activations."""


@dataclass(frozen=True)
class Axis:
    """Sizes of one dynamic axis of the graphs."""

    min: int
    """Smallest."""
    opt: int
    """The one to tune for."""
    max: int
    """Largest; beyond it a call is refused."""


@dataclass(frozen=True)
class FileRecord:
    """What a file of the bundle must be."""

    bytes: int
    """Exact size."""
    sha256: str
    """Hash of everything in it."""
    sample_sha256: str
    """Hash of 64 evenly spaced blocks (see `integrity.sample_hash`)."""
