"""What a byte must read from memory, and how fast that lets this machine decode at best.

Decoding is bound by memory: each run of a stage reads all of its weights and the cached keys and values that
its window still sees. What a byte costs is that, times how often the stage runs for a byte: once, the latent
stage once a patch, drafted bytes less often. Sizes are those of the bundle's own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...graphs.config import ConfigError, parse_config
from ...runtime.manifest import EmbeddingSpec, Manifest, StageSpec

__all__ = ["CostCard", "StageCost", "cost_card", "embedding_bytes"]

# Caches, patch values and the patcher's embedding are float32 at every precision.
_FLOAT = 4


@dataclass(frozen=True)
class StageCost:
    """What one run of a stage reads. Bytes."""

    stage: str
    """Its name."""
    precision: str
    """Its weights' precision."""
    weights: int
    """Its weights' file, without `left_out`."""
    left_out: int
    """Part of that file of which a run reads next to nothing: the patcher's byte embedding."""
    cache: int
    """Keys and values of the positions that its window sees, and the decoder's of one patch."""
    calls_per_byte: float
    """Runs for one byte of text, as measured."""

    @property
    def per_byte(self) -> float:
        """Bytes read for one byte of text."""
        return self.calls_per_byte * (self.weights + self.cache)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "per_byte": self.per_byte}


@dataclass(frozen=True)
class CostCard:
    """What a byte of text reads at one place in a text. Bytes, unless it says otherwise."""

    positions: int
    """Where: bytes read before, BOS included."""
    bytes_per_patch: float | None
    """Measured; None when no patch ended."""
    stages: tuple[StageCost, ...]
    """Stages that ran."""
    table_rows: int
    """Rows of the embedding tables that a byte reads: its own, and one of each hash table."""
    row_bytes: int
    """Size of a row."""
    state_bytes: int
    """Memory of caches and recent states, measured at the end of a generation."""
    bandwidth: float
    """Read bandwidth in bytes a second."""

    @property
    def tables(self) -> int:
        """Bytes of the tables for one byte of text."""
        return self.table_rows * self.row_bytes

    @property
    def weights_per_byte(self) -> float:
        """Weights read for one byte of text."""
        return sum(stage.calls_per_byte * stage.weights for stage in self.stages)

    @property
    def cache_per_byte(self) -> float:
        """Cached keys and values read for one byte of text."""
        return sum(stage.calls_per_byte * stage.cache for stage in self.stages)

    @property
    def per_byte(self) -> float:
        """All that is read for one byte of text."""
        return self.weights_per_byte + self.cache_per_byte + self.tables

    @property
    def ceiling(self) -> float:
        """Bytes of text a second, if memory were never idle and nothing else took time."""
        return self.bandwidth / self.per_byte

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "positions": self.positions,
            "bytes_per_patch": self.bytes_per_patch,
            "stages": {stage.stage: stage.to_dict() for stage in self.stages},
            "table_rows": self.table_rows,
            "row_bytes": self.row_bytes,
            "weights_per_byte": self.weights_per_byte,
            "cache_per_byte": self.cache_per_byte,
            "tables_per_byte": self.tables,
            "read_per_byte": self.per_byte,
            "state_bytes": self.state_bytes,
            "bandwidth_bytes_per_second": self.bandwidth,
            "ceiling_bytes_per_second": self.ceiling,
        }


def cost_card(
    manifest: Manifest,
    *,
    positions: int,
    bytes_per_patch: float | None,
    calls_per_byte: Mapping[str, float],
    state_bytes: int,
    bandwidth: float,
) -> CostCard:
    """The card of a bundle. calls_per_byte: measured runs of each stage; those not in it never run."""
    patches = positions / bytes_per_patch if bytes_per_patch else 0.0
    left_out = {"patcher": embedding_bytes(manifest)}
    stages = [
        StageCost(
            stage=name,
            precision=spec.precision,
            weights=manifest.files[spec.data].bytes - left_out.get(name, 0),
            left_out=left_out.get(name, 0),
            cache=_cache(name, spec, patches if name == "latent" else positions),
            calls_per_byte=calls_per_byte[name],
        )
        for name, spec in manifest.stages.items()
        if name in calls_per_byte
    ]
    return CostCard(
        positions=positions,
        bytes_per_patch=bytes_per_patch,
        stages=tuple(stages),
        table_rows=_table_rows(manifest.embedding),
        row_bytes=manifest.embedding.row_bytes,
        state_bytes=state_bytes,
        bandwidth=bandwidth,
    )


def embedding_bytes(manifest: Manifest) -> int:
    """Size of the byte embedding inside the patcher's weights: float32 at every precision, a byte reads one
    row of it. 0 when there is no patcher, or the source's config no longer says how wide it is.
    """
    if "patcher" not in manifest.stages:
        return 0
    try:
        patcher = parse_config(manifest.source.config).patcher
    except ConfigError:
        return 0
    size = _FLOAT * manifest.model.vocab_size * patcher.width if patcher else 0
    return size if size < manifest.files[manifest.stages["patcher"].data].bytes else 0


def _cache(name: str, spec: StageSpec, context: float) -> int:
    seen = context if spec.window is None else min(context, spec.window)
    # A byte in the decoder also reads the keys and values of its patch, in every layer.
    patch = _FLOAT * (spec.patch_values or 0) if name == "decoder" else 0
    return round(_FLOAT * 2 * spec.layers * spec.kv_heads * spec.head_dim * seen) + patch


def _table_rows(table: EmbeddingSpec) -> int:
    return table.hash.tables + 1
