"""The decoder stage: byte states and the one patch that each byte may read, to next-byte logits."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from .config import ModelConfig, TransformerConfig
from .latent import cross_layers
from .layers import Linear, RMSNorm, TransformerStack

__all__ = ["DecoderStage"]


class PatchCrossAttention(nn.Module):
    """x [B, S, D] attends to its patch's k vectors; returns attention output + x (BltCrossAttention).

    keys [B, S, Hkv * head_dim * k] hold [Hkv, head_dim, k], values [Hkv, k, head_dim], one patch per byte:
    the [S, P * k] mask of the reference is never built.
    """

    def __init__(self, config: TransformerConfig, k: int, prefix: str) -> None:
        super().__init__()
        self.config, self.k = config, k
        self.q_norm = RMSNorm(config.width, config.norm_eps, f"{prefix}.q_norm.weight")
        self.q_proj = Linear(config.width, config.heads * config.head_dim, f"{prefix}.q_proj.weight")
        self.o_proj = Linear(config.heads * config.head_dim, config.width, f"{prefix}.o_proj.weight")

    def forward(self, op: Any, x: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        config = self.config
        kv_heads, groups, head_dim = config.kv_heads, config.heads // config.kv_heads, config.head_dim
        query = op.Reshape(self.q_proj(op, self.q_norm(op, x)), [0, 0, kv_heads, groups, head_dim])
        keys = op.Reshape(keys, [0, 0, kv_heads, head_dim, self.k])
        values = op.Reshape(values, [0, 0, kv_heads, self.k, head_dim])
        scores = op.Mul(op.MatMul(query, keys), 1.0 / math.sqrt(head_dim))
        mixed = op.MatMul(op.Softmax(scores, axis=-1), values)
        return op.Add(self.o_proj(op, op.Reshape(mixed, [0, 0, config.heads * head_dim])), x)


class DecoderStage(nn.Module):
    """byte_states [B, S, D], patch_values [M, V], patch_index [B, S] -> logits [B, S, 260], new_kv."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("decoder")
        stack, prefix = config.decoder, "model.local_decoder"
        self.cross_layers = cross_layers(config)
        self.stack = TransformerStack(stack, prefix)
        self.cross_attn_layers = nn.ModuleList(
            [
                PatchCrossAttention(stack, config.cross_attn_k, f"{prefix}.cross_attn_layers.{index}")
                for index in range(self.cross_layers)
            ]
        )
        self.norm = RMSNorm(stack.width, stack.norm_eps, f"{prefix}.norm.weight")
        self.lm_head = Linear(stack.width, config.vocab_size, "lm_head.weight")

    def forward(
        self,
        op: Any,
        states: ir.Value,
        patch_values: ir.Value,
        patch_index: ir.Value,
        positions: ir.Value,
        past_positions: ir.Value,
        past: list[ir.Value],
    ) -> tuple[ir.Value, ir.Value]:
        gathered = op.Gather(patch_values, patch_index, axis=0)
        parts = op.Split(gathered, axis=-1, num_outputs=2 * self.cross_layers, _outputs=2 * self.cross_layers)
        rotary, mask = self.stack.prepare(op, positions, past_positions)
        hidden, keys_values = states, []
        for index, layer in enumerate(self.stack.layers):
            if index < self.cross_layers:
                cross = self.cross_attn_layers[index]
                # The residual counts twice in both reference implementations.
                hidden = op.Add(hidden, cross(op, hidden, parts[2 * index], parts[2 * index + 1]))
            hidden, key, value = layer(op, hidden, rotary, mask, (past[2 * index], past[2 * index + 1]))
            keys_values += [key, value]
        return self.lm_head(op, self.norm(op, hidden)), self.stack.join(op, keys_values)
