"""The latent stage: everything that is computed once per patch.

Pooling of a patch's byte states (maximum, projection to k vectors, cross-attention of these over the
patch's own bytes), the global transformer over patches, and the decoder's cross-attention keys and
values of the patch for every decoder layer, so that a byte step repeats no work that belongs to a patch.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from .config import ModelConfig, TransformerConfig
from .layers import MASKED, Linear, RMSNorm, TransformerStack

__all__ = ["LatentStage", "cross_layers", "patch_value_width"]


def cross_layers(config: ModelConfig) -> int:
    """How many of the decoder's layers read the patches."""
    return config.decoder.layers if config.decoder_cross_all_layers else 1


def patch_value_width(config: ModelConfig) -> int:
    """Floats of one patch's cross-attention keys and values: [layers, 2, Hkv * head_dim * k]."""
    decoder = config.decoder
    return cross_layers(config) * 2 * decoder.kv_heads * decoder.head_dim * config.cross_attn_k


class PatchPooling(nn.Module):
    """patch_bytes [B, P, L, D], lengths [B, P] -> [B, P, k * D] (BltLocalEncoder's pooling).

    A patch of length 0 is padding: its result is finite and means nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stack, prefix = config.encoder, "model.local_encoder"
        # In transformers each layer's pooling overwrites the one before, so only the last one counts.
        index = stack.layers - 1 if config.encoder_cross_all_layers else 0
        cross = f"{prefix}.cross_attn_layers.{index}"
        self.config, self.k = stack, config.cross_attn_k
        kv_width = stack.kv_heads * stack.head_dim
        self.patch_embedding_projection = Linear(
            stack.width, stack.width * self.k, f"{prefix}.patch_embedding_projection.weight"
        )
        self.q_norm = RMSNorm(stack.width, stack.norm_eps, f"{cross}.q_norm.weight")
        self.k_norm = RMSNorm(stack.width, stack.norm_eps, f"{cross}.k_norm.weight")
        self.q_proj = Linear(stack.width, stack.heads * stack.head_dim, f"{cross}.q_proj.weight")
        self.kv_proj = Linear(stack.width, 2 * kv_width, f"{cross}.k_proj.weight", f"{cross}.v_proj.weight")
        self.o_proj = Linear(stack.heads * stack.head_dim, stack.width, f"{cross}.o_proj.weight")

    def forward(self, op: Any, patch_bytes: ir.Value, lengths: ir.Value) -> ir.Value:
        stack, k = self.config, self.k
        groups = stack.heads // stack.kv_heads
        # 1. Maximum over the real bytes; a padded patch pools to zeros.
        slots = op.Range(0, op.Squeeze(op.Shape(patch_bytes, start=2, end=3), [0]), 1)
        real = op.Less(slots, op.Unsqueeze(lengths, [2]))
        pooled = op.ReduceMax(op.Where(op.Unsqueeze(real, [3]), patch_bytes, MASKED), [2], keepdims=0)
        pooled = op.Where(op.Greater(op.Unsqueeze(lengths, [2]), 0), pooled, 0.0)
        patches = op.Reshape(self.patch_embedding_projection(op, pooled), [0, 0, k, stack.width])
        # 2. The k vectors of a patch attend to that patch's own bytes.
        query = op.Reshape(
            self.q_proj(op, self.q_norm(op, patches)), [0, 0, k, stack.kv_heads, groups, stack.head_dim]
        )
        query = op.Reshape(
            op.Transpose(query, perm=[0, 1, 3, 4, 2, 5]), [0, 0, stack.kv_heads, groups * k, stack.head_dim]
        )
        key, value = op.Split(
            self.kv_proj(op, self.k_norm(op, patch_bytes)), axis=-1, num_outputs=2, _outputs=2
        )
        by_head = [0, 0, 0, stack.kv_heads, stack.head_dim]
        key = op.Transpose(op.Reshape(key, by_head), perm=[0, 1, 3, 4, 2])
        value = op.Transpose(op.Reshape(value, by_head), perm=[0, 1, 3, 2, 4])
        mask = op.Unsqueeze(op.Where(real, 0.0, MASKED), [2, 3])
        scores = op.Mul(op.MatMul(query, key), 1.0 / math.sqrt(stack.head_dim))
        mixed = op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), value)
        mixed = op.Reshape(mixed, [0, 0, stack.heads, k, stack.head_dim])
        mixed = op.Reshape(op.Transpose(mixed, perm=[0, 1, 3, 2, 4]), [0, 0, k, stack.heads * stack.head_dim])
        # 3. The residual counts twice in both reference implementations.
        patches = op.Add(patches, op.Add(self.o_proj(op, mixed), patches))
        return op.Reshape(patches, [0, 0, k * stack.width])


class PatchValues(nn.Module):
    """One decoder layer's cross-attention keys and values of patches [B, P, k, D], flat per patch.

    Keys come as [Hkv, head_dim, k], values as [Hkv, k, head_dim]: the decoder multiplies them as they are.
    """

    def __init__(self, stack: TransformerConfig, k: int, cross: str) -> None:
        super().__init__()
        self.config, self.k = stack, k
        kv_width = stack.kv_heads * stack.head_dim
        self.k_norm = RMSNorm(stack.width, stack.norm_eps, f"{cross}.k_norm.weight")
        self.kv_proj = Linear(stack.width, 2 * kv_width, f"{cross}.k_proj.weight", f"{cross}.v_proj.weight")

    def forward(self, op: Any, patches: ir.Value) -> list[ir.Value]:
        stack, k = self.config, self.k
        key, value = op.Split(self.kv_proj(op, self.k_norm(op, patches)), axis=-1, num_outputs=2, _outputs=2)
        by_head = [0, 0, k, stack.kv_heads, stack.head_dim]
        key = op.Transpose(op.Reshape(key, by_head), perm=[0, 1, 3, 4, 2])
        value = op.Transpose(op.Reshape(value, by_head), perm=[0, 1, 3, 2, 4])
        flat = [0, 0, k * stack.kv_heads * stack.head_dim]
        return [op.Reshape(key, flat), op.Reshape(value, flat)]


class LatentStage(nn.Module):
    """patch_bytes [B, P, L, D] -> patch_values [B, P, V] and the global transformer's new keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("latent")
        stack, decoder, k = config.global_stack, config.decoder, config.cross_attn_k
        self.k, self.width, self.project = k, decoder.width, config.token_projection
        self.pooling = PatchPooling(config)
        if self.project:
            self.token_embedding_projection = Linear(
                k * config.encoder.width,
                stack.width,
                "model.global_transformer.token_embedding_projection.weight",
            )
        self.stack = TransformerStack(stack, "model.global_transformer")
        self.patch_embedding_projection = Linear(
            stack.width, k * decoder.width, "model.local_decoder.patch_embedding_projection.weight"
        )
        prefix = "model.local_decoder.cross_attn_layers"
        self.patch_values = nn.ModuleList(
            [PatchValues(decoder, k, f"{prefix}.{index}") for index in range(cross_layers(config))]
        )

    def forward(
        self,
        op: Any,
        patch_bytes: ir.Value,
        lengths: ir.Value,
        positions: ir.Value,
        past_positions: ir.Value,
        past: list[ir.Value],
    ) -> tuple[ir.Value, ir.Value]:
        hidden = self.pooling(op, patch_bytes, lengths)
        if self.project:
            hidden = self.token_embedding_projection(op, hidden)
        hidden, new_kv = self.stack(op, hidden, positions, past_positions, past)
        patches = op.Reshape(self.patch_embedding_projection(op, hidden), [0, 0, self.k, self.width])
        values = [flat for layer in self.patch_values for flat in layer(op, patches)]
        return op.Concat(*values, axis=-1), new_kv
