"""The shape of a Llama, for peers with random weights: time depends on the shape, not on what is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["LLAMA_1B", "LlamaShape"]


@dataclass(frozen=True)
class LlamaShape:
    """A decoder-only transformer with grouped queries, gated feed-forward and tied embeddings."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    context: int = 8192
    rope_theta: float = 500_000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """Trained numbers; the output shares the embedding's."""
        return sum(rows * (columns or 1) for _, rows, columns in self.tensors())

    def tensors(self) -> Iterator[tuple[str, int, int | None]]:
        """Every tensor in GGUF's names as (name, rows, columns); columns None = a vector of `rows`."""
        kv_width = self.kv_heads * self.head_dim
        yield "token_embd.weight", self.vocabulary, self.width
        for layer in range(self.layers):
            stem = f"blk.{layer}."
            yield f"{stem}attn_norm.weight", self.width, None
            yield f"{stem}attn_q.weight", self.width, self.width
            yield f"{stem}attn_k.weight", kv_width, self.width
            yield f"{stem}attn_v.weight", kv_width, self.width
            yield f"{stem}attn_output.weight", self.width, self.width
            yield f"{stem}ffn_norm.weight", self.width, None
            yield f"{stem}ffn_gate.weight", self.ffn, self.width
            yield f"{stem}ffn_up.weight", self.ffn, self.width
            yield f"{stem}ffn_down.weight", self.width, self.ffn
        yield "output_norm.weight", self.width, None


LLAMA_1B = LlamaShape(layers=16, width=2048, heads=32, kv_heads=8, ffn=8192, vocabulary=49_152)
"""Llama-3.2-1B's layers with SmolLM2's vocabulary: 1.07B parameters, 49,152 output rows and not 128,256."""
