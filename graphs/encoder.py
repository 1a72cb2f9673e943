"""The encoder stage: byte embeddings (hash rows summed in by the host) to one state per byte."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from .config import ModelConfig
from .layers import TransformerStack

__all__ = ["EncoderStage"]


class EncoderStage(nn.Module):
    """byte_embeds [B, S, D] -> byte_states [B, S, D] and new keys and values (BltLocalEncoder's layers)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("encoder")
        self.stack = TransformerStack(config.encoder, "model.local_encoder")

    def forward(
        self, op: Any, embeds: ir.Value, positions: ir.Value, past_positions: ir.Value, past: list[ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        return self.stack(op, embeds, positions, past_positions, past)
