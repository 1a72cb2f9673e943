"""The four stage graphs of a BLT: inputs, outputs and dynamic axes, and how to build each.

| stage   | in                                                        | out                              |
|---------|-----------------------------------------------------------|----------------------------------|
| patcher | byte_ids [B,S], positions, past                           | entropy [B,S], logits, new_kv    |
| encoder | byte_embeds [B,S,D], positions, past                      | byte_states [B,S,D], new_kv      |
| latent  | patch_bytes [B,P,L,D], patch_lengths [B,P], positions, past | patch_values [B,P,V], new_kv   |
| decoder | byte_states [B,S,D], patch_values [M,V], patch_index [B,S], positions, past | logits, new_kv |

`past` stands for past_positions int64 [B,C] and past.N.key / past.N.value float32 [B,Hkv,C,head_dim] for
every layer N; a slot's position is -1 when it holds nothing. new_kv is [2*layers, B, Hkv, S, head_dim].
A stage is a pure function: the caller owns every cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from .config import ModelConfig, TransformerConfig
from .decoder import DecoderStage
from .encoder import EncoderStage
from .latent import LatentStage, patch_value_width
from .patcher import PatcherStage

__all__ = ["OPSET", "STAGE_NAMES", "AxisRange", "axis_ranges", "build_stage", "stage_names", "stage_stack"]

OPSET = 20
"""Standard ONNX operator set of every graph: the newest that needs no block-wise DequantizeLinear."""

STAGE_NAMES = ("patcher", "encoder", "latent", "decoder")


@dataclass(frozen=True)
class AxisRange:
    """Smallest, typical and largest size of one dynamic axis."""

    min: int
    opt: int
    max: int


def axis_ranges(config: ModelConfig) -> dict[str, AxisRange]:
    """The one table of dynamic axes that graphs, manifest and engine profiles share."""
    limit = config.encoder.max_positions
    chunk = min(1024, limit)
    return {
        "batch": AxisRange(1, 1, 8),
        "bytes": AxisRange(1, 1, chunk),
        "past": AxisRange(1, min(512, limit), limit + chunk),
        "patches": AxisRange(1, 1, chunk),
        "patch_length": AxisRange(1, min(8, limit), limit),
        "patch_slots": AxisRange(1, min(512, limit), limit + chunk),
    }


def stage_names(config: ModelConfig) -> tuple[str, ...]:
    """The stages that this model has: all four, or three when it has no entropy patcher."""
    return STAGE_NAMES if config.patcher is not None else STAGE_NAMES[1:]


def stage_stack(config: ModelConfig, stage: str) -> TransformerConfig:
    """The transformer whose keys and values the stage caches."""
    stack = {
        "patcher": config.patcher,
        "encoder": config.encoder,
        "latent": config.global_stack,
        "decoder": config.decoder,
    }[stage]
    assert stack is not None, "the model has no patcher"
    return stack


def build_stage(config: ModelConfig, stage: str) -> ir.Model:
    """Build one stage's graph. Its weights are `Weight` initializers without values yet."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=stage)
    builder = GraphBuilder(graph)
    stack = stage_stack(config, stage)
    if stage == "patcher":
        _build_patcher(builder, config, stack)
    elif stage == "encoder":
        _build_encoder(builder, config, stack)
    elif stage == "latent":
        _build_latent(builder, config, stack)
    else:
        _build_decoder(builder, config, stack)
    return ir.Model(graph, ir_version=10, producer_name="blt-edge")


def _build_patcher(builder: GraphBuilder, config: ModelConfig, stack: TransformerConfig) -> None:
    ids = builder.input("byte_ids", ir.DataType.INT64, ["batch", "bytes"])
    positions, past_positions, past = _state_inputs(builder, stack, "bytes")
    entropy, logits, new_kv = PatcherStage(config)(builder.op, ids, positions, past_positions, past)
    _output(builder, "entropy", entropy, ["batch", "bytes"])
    _output(builder, "logits", logits, ["batch", "bytes", config.vocab_size])
    _output_state(builder, stack, new_kv, "bytes")


def _build_encoder(builder: GraphBuilder, config: ModelConfig, stack: TransformerConfig) -> None:
    shape = ["batch", "bytes", stack.width]
    embeds = builder.input("byte_embeds", ir.DataType.FLOAT, shape)
    positions, past_positions, past = _state_inputs(builder, stack, "bytes")
    states, new_kv = EncoderStage(config)(builder.op, embeds, positions, past_positions, past)
    _output(builder, "byte_states", states, shape)
    _output_state(builder, stack, new_kv, "bytes")


def _build_latent(builder: GraphBuilder, config: ModelConfig, stack: TransformerConfig) -> None:
    width = config.encoder.width
    patch_bytes = builder.input("patch_bytes", ir.DataType.FLOAT, ["batch", "patches", "patch_length", width])
    lengths = builder.input("patch_lengths", ir.DataType.INT64, ["batch", "patches"])
    positions, past_positions, past = _state_inputs(builder, stack, "patches")
    stage = LatentStage(config)
    values, new_kv = stage(builder.op, patch_bytes, lengths, positions, past_positions, past)
    _output(builder, "patch_values", values, ["batch", "patches", patch_value_width(config)])
    _output_state(builder, stack, new_kv, "patches")


def _build_decoder(builder: GraphBuilder, config: ModelConfig, stack: TransformerConfig) -> None:
    states = builder.input("byte_states", ir.DataType.FLOAT, ["batch", "bytes", stack.width])
    values = builder.input("patch_values", ir.DataType.FLOAT, ["patch_slots", patch_value_width(config)])
    index = builder.input("patch_index", ir.DataType.INT64, ["batch", "bytes"])
    positions, past_positions, past = _state_inputs(builder, stack, "bytes")
    stage = DecoderStage(config)
    logits, new_kv = stage(builder.op, states, values, index, positions, past_positions, past)
    _output(builder, "logits", logits, ["batch", "bytes", config.vocab_size])
    _output_state(builder, stack, new_kv, "bytes")


def _state_inputs(
    builder: GraphBuilder, stack: TransformerConfig, axis: str
) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
    positions = builder.input("positions", ir.DataType.INT64, ["batch", axis])
    past_positions = builder.input("past_positions", ir.DataType.INT64, ["batch", "past"])
    shape = ["batch", stack.kv_heads, "past", stack.head_dim]
    past = [
        builder.input(f"past.{layer}.{kind}", ir.DataType.FLOAT, shape)
        for layer in range(stack.layers)
        for kind in ("key", "value")
    ]
    return positions, past_positions, past


def _output(builder: GraphBuilder, name: str, value: ir.Value, shape: list[Any]) -> None:
    # A fresh Identity would cost a copy; the producing value itself takes the public name.
    value.shape = ir.Shape(shape)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    builder.add_output(value, name)


def _output_state(builder: GraphBuilder, stack: TransformerConfig, new_kv: ir.Value, axis: str) -> None:
    _output(builder, "new_kv", new_kv, [2 * stack.layers, "batch", stack.kv_heads, axis, stack.head_dim])
