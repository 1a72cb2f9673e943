"""The patcher stage: a small byte-level language model whose uncertainty decides the patches."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from .config import ModelConfig
from .layers import Embedding, Linear, RMSNorm, TransformerStack

__all__ = ["PatcherStage"]


class PatcherStage(nn.Module):
    """ids [B, S] -> entropy [B, S] in nats, logits [B, S, 260], new keys and values (BltPatcher)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("patcher")
        stack, prefix = config.patcher, "model.patcher"
        assert stack is not None, "the model has no patcher"
        self.embed_tokens = Embedding(config.vocab_size, stack.width, f"{prefix}.embed_tokens.weight")
        self.stack = TransformerStack(stack, prefix)
        self.norm = RMSNorm(stack.width, stack.norm_eps, f"{prefix}.norm.weight")
        self.lm_head = Linear(stack.width, config.vocab_size, f"{prefix}.lm_head.weight")

    def forward(
        self, op: Any, ids: ir.Value, positions: ir.Value, past_positions: ir.Value, past: list[ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        hidden, new_kv = self.stack(op, self.embed_tokens(op, ids), positions, past_positions, past)
        logits = self.lm_head(op, self.norm(op, hidden))
        log_probabilities = op.LogSoftmax(logits, axis=-1)
        weighted = op.Mul(op.Exp(log_probabilities), log_probabilities)
        entropy = op.Neg(op.ReduceSum(weighted, [-1], keepdims=0))
        return entropy, logits, new_kv
