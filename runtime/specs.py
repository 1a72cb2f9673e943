"""The parts of a bundle's manifest, as data: where it comes from, its dimensions, tables, graphs, files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .hashing import HashSpec

__all__ = ["TABLE_ITEMSIZE", "Axis", "EmbeddingSpec", "FileRecord", "ModelSpec", "Source", "StageSpec"]

TABLE_ITEMSIZE = {"float16": 2, "float32": 4}
"""Bytes of a value in the embedding tables, by dtype."""


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
    """"float16" or "float32"."""
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
    def bytes(self) -> int:
        """Exact size of the file."""
        return self.rows * self.width * TABLE_ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class StageSpec:
    """One graph and the shape of the state it needs."""

    file: str
    """The graph's file name in the bundle."""
    data: str
    """The file name of its weights."""
    precision: str
    """"fp32", "fp16", "int8" or "int4"."""
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
