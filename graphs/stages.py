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

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from ..runtime.backends.signatures import input_type
from ..runtime.manifest import Axis
from ..runtime.names import STAGES
from .config import ModelConfig, TransformerConfig
from .layers import MASKED, CacheInputs, Embedding, Linear, Pair, RMSNorm, TransformerStack

__all__ = [
    "OPSET",
    "PatchPooling",
    "axis_ranges",
    "build_stage",
    "patch_value_width",
    "stage_names",
    "stage_stack",
]

OPSET = 20
"""Standard ONNX operator set of every graph: the newest that needs no block-wise DequantizeLinear."""


class PatcherStage(nn.Module):
    """ids [B, S] -> entropy [B, S] in nats, logits [B, S, 260], new keys and values (BltPatcher).

    A small byte-level language model whose uncertainty decides the patches.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("patcher")
        stack, prefix = stage_stack(config, "patcher"), "model.patcher"
        self.embed_tokens = Embedding(config.vocab_size, stack.width, f"{prefix}.embed_tokens.weight")
        self.stack = TransformerStack(stack, prefix)
        self.norm = RMSNorm(stack.width, stack.norm_eps, f"{prefix}.norm.weight")
        self.lm_head = Linear(stack.width, config.vocab_size, f"{prefix}.lm_head.weight")

    def forward(self, op: Any, ids: ir.Value, cache: CacheInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
        hidden, new_kv = self.stack(op, self.embed_tokens(op, ids), cache)
        logits = self.lm_head(op, self.norm(op, hidden))
        log_probabilities = op.LogSoftmax(logits, axis=-1)
        weighted = op.Mul(op.Exp(log_probabilities), log_probabilities)
        return op.Neg(op.ReduceSum(weighted, [-1], keepdims=0)), logits, new_kv


class EncoderStage(nn.Module):
    """byte_embeds [B, S, D] -> byte_states [B, S, D], new keys and values (BltLocalEncoder's layers).

    The host has summed the rows of the hash tables into the embeddings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("encoder")
        self.stack = TransformerStack(config.encoder, "model.local_encoder")

    def forward(self, op: Any, embeds: ir.Value, cache: CacheInputs) -> Pair:
        return self.stack(op, embeds, cache)


class _PatchKeysValues(nn.Module):
    """Cross-attention keys and values from vectors of a patch."""

    def __init__(self, stack: TransformerConfig, k: int, cross: str) -> None:
        super().__init__()
        self.config, self.k = stack, k
        kv_width = stack.kv_heads * stack.head_dim
        self.k_norm = RMSNorm(stack.width, stack.norm_eps, f"{cross}.k_norm.weight")
        self.kv_proj = Linear(stack.width, 2 * kv_width, f"{cross}.k_proj.weight", f"{cross}.v_proj.weight")

    def keys_values(self, op: Any, vectors: ir.Value, count: int = 0) -> Pair:
        """[B, P, n, D] -> keys [B, P, Hkv, head_dim, n], values [B, P, Hkv, n, head_dim].

        count: n where it is fixed; 0 takes it from `vectors`.
        """
        key, value = op.Split(self.kv_proj(op, self.k_norm(op, vectors)), axis=-1, num_outputs=2, _outputs=2)
        by_head = [0, 0, count, self.config.kv_heads, self.config.head_dim]
        key = op.Transpose(op.Reshape(key, by_head), perm=[0, 1, 3, 4, 2])
        return key, op.Transpose(op.Reshape(value, by_head), perm=[0, 1, 3, 2, 4])


class PatchPooling(_PatchKeysValues):
    """patch_bytes [B, P, L, D], lengths [B, P] -> [B, P, k * D] (BltLocalEncoder's pooling).

    Maximum over a patch's byte states, projected to k vectors that attend to all of them. A patch of length 0
    is padding: its result is finite and means nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        stack, prefix, k = config.encoder, "model.local_encoder", config.cross_attn_k
        # In transformers each layer's pooling overwrites the one before, so only the last one counts.
        index = stack.layers - 1 if config.encoder_cross_all_layers else 0
        cross = f"{prefix}.cross_attn_layers.{index}"
        super().__init__(stack, k, cross)
        self.patch_embedding_projection = Linear(
            stack.width, stack.width * k, f"{prefix}.patch_embedding_projection.weight"
        )
        self.q_norm = RMSNorm(stack.width, stack.norm_eps, f"{cross}.q_norm.weight")
        self.q_proj = Linear(stack.width, stack.heads * stack.head_dim, f"{cross}.q_proj.weight")
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
        key, value = self.keys_values(op, patch_bytes)
        mask = op.Unsqueeze(op.Where(real, 0.0, MASKED), [2, 3])
        scores = op.Mul(op.MatMul(query, key), 1.0 / math.sqrt(stack.head_dim))
        mixed = op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), value)
        mixed = op.Reshape(mixed, [0, 0, stack.heads, k, stack.head_dim])
        mixed = op.Reshape(op.Transpose(mixed, perm=[0, 1, 3, 2, 4]), [0, 0, k, stack.heads * stack.head_dim])
        # 3. The residual counts twice in both reference implementations.
        patches = op.Add(patches, op.Add(self.o_proj(op, mixed), patches))
        return op.Reshape(patches, [0, 0, k * stack.width])


class PatchValues(_PatchKeysValues):
    """One decoder layer's cross-attention keys and values of patches [B, P, k, D], flat per patch.

    Keys come as [Hkv, head_dim, k], values as [Hkv, k, head_dim]: the decoder multiplies them as they are.
    """

    def forward(self, op: Any, patches: ir.Value) -> list[ir.Value]:
        flat = [0, 0, self.k * self.config.kv_heads * self.config.head_dim]
        return [op.Reshape(part, flat) for part in self.keys_values(op, patches, self.k)]


class LatentStage(nn.Module):
    """patch_bytes [B, P, L, D] -> patch_values [B, P, V] and the global transformer's new keys and values.

    All that is computed once per patch: pooling, the global transformer, and the keys and values that every
    decoder layer reads, so that a byte step repeats no work that belongs to a patch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("latent")
        stack, decoder, k = config.global_stack, config.decoder, config.cross_attn_k
        self.k, self.width, self.project = k, decoder.width, config.token_projection
        self.pooling = PatchPooling(config)
        prefix = "model.global_transformer"
        if self.project:
            name = f"{prefix}.token_embedding_projection.weight"
            self.token_embedding_projection = Linear(k * config.encoder.width, stack.width, name)
        self.stack = TransformerStack(stack, prefix)
        prefix = "model.local_decoder"
        self.patch_embedding_projection = Linear(
            stack.width, k * decoder.width, f"{prefix}.patch_embedding_projection.weight"
        )
        self.patch_values = nn.ModuleList(
            [
                PatchValues(decoder, k, f"{prefix}.cross_attn_layers.{index}")
                for index in range(_cross_layers(config))
            ]
        )

    def forward(self, op: Any, patch_bytes: ir.Value, lengths: ir.Value, cache: CacheInputs) -> Pair:
        hidden = self.pooling(op, patch_bytes, lengths)
        if self.project:
            hidden = self.token_embedding_projection(op, hidden)
        hidden, new_kv = self.stack(op, hidden, cache)
        patches = op.Reshape(self.patch_embedding_projection(op, hidden), [0, 0, self.k, self.width])
        values = [flat for layer in self.patch_values for flat in layer(op, patches)]
        return op.Concat(*values, axis=-1), new_kv


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
    """byte_states [B, S, D], patch_values [M, V], patch_index [B, S] -> logits [B, S, 260], new_kv.

    Each byte reads one patch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("decoder")
        stack, prefix = config.decoder, "model.local_decoder"
        self.cross_layers = _cross_layers(config)
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
        self, op: Any, states: ir.Value, patch_values: ir.Value, patch_index: ir.Value, cache: CacheInputs
    ) -> Pair:
        gathered = op.Gather(patch_values, patch_index, axis=0)
        parts = op.Split(gathered, axis=-1, num_outputs=2 * self.cross_layers, _outputs=2 * self.cross_layers)

        def read_patch(index: int, hidden: ir.Value) -> ir.Value:
            if index >= self.cross_layers:
                return hidden
            keys, values = parts[2 * index : 2 * index + 2]
            # The residual counts twice in both reference implementations.
            return op.Add(hidden, self.cross_attn_layers[index](op, hidden, keys, values))

        hidden, keys_values = self.stack.run(op, states, cache, read_patch)
        return self.lm_head(op, self.norm(op, hidden)), self.stack.join(op, keys_values)


_MODULES: dict[str, type[nn.Module]] = {
    "patcher": PatcherStage,
    "encoder": EncoderStage,
    "latent": LatentStage,
    "decoder": DecoderStage,
}


def stage_names(config: ModelConfig) -> tuple[str, ...]:
    """The stages that this model has: all four, or three when it has no entropy patcher."""
    return STAGES if config.patcher is not None else STAGES[1:]


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


def axis_ranges(config: ModelConfig) -> dict[str, Axis]:
    """The one table of dynamic axes that graphs, manifest and engine profiles share."""
    limit = config.encoder.max_positions
    chunk = min(1024, limit)
    return {
        "batch": Axis(1, 1, 8),
        "bytes": Axis(1, 1, chunk),
        "past": Axis(1, min(512, limit), limit + chunk),
        "patches": Axis(1, 1, chunk),
        "patch_length": Axis(1, min(8, limit), limit),
        "patch_slots": Axis(1, min(512, limit), limit + chunk),
    }


def _cross_layers(config: ModelConfig) -> int:
    """How many of the decoder's layers read the patches."""
    return config.decoder.layers if config.decoder_cross_all_layers else 1


def patch_value_width(config: ModelConfig) -> int:
    """Floats of one patch's cross-attention keys and values: [layers, 2, Hkv * head_dim * k]."""
    decoder = config.decoder
    return _cross_layers(config) * 2 * decoder.kv_heads * decoder.head_dim * config.cross_attn_k


_Axes = list[int | str]


def _signature(config: ModelConfig, stage: str) -> tuple[dict[str, _Axes], dict[str, _Axes]]:
    """Inputs and outputs of a stage, without its cache's, in the order its module takes and gives them."""
    new: _Axes = ["batch", "bytes"]
    states, logits = [*new, config.encoder.width], [*new, config.vocab_size]
    patches, values = ["batch", "patches"], patch_value_width(config)
    table: dict[str, tuple[dict[str, _Axes], dict[str, _Axes]]] = {
        "patcher": ({"byte_ids": new}, {"entropy": new, "logits": logits}),
        "encoder": ({"byte_embeds": states}, {"byte_states": states}),
        "latent": (
            {"patch_bytes": [*patches, "patch_length", config.encoder.width], "patch_lengths": [*patches]},
            {"patch_values": [*patches, values]},
        ),
        "decoder": (
            {"byte_states": states, "patch_values": ["patch_slots", values], "patch_index": new},
            {"logits": logits},
        ),
    }
    return table[stage]


def build_stage(config: ModelConfig, stage: str) -> ir.Model:
    """Build one stage's graph. Its weights are `Weight` initializers without values yet."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=stage)
    builder = GraphBuilder(graph)
    stack, axis = stage_stack(config, stage), "patches" if stage == "latent" else "bytes"
    inputs, outputs = _signature(config, stage)

    def take(name: str, axes: _Axes) -> ir.Value:
        return builder.input(name, ir.DataType.from_numpy(np.dtype(input_type(name))), axes)

    own = [take(name, axes) for name, axes in inputs.items()]
    positions, past_positions = take("positions", ["batch", axis]), take("past_positions", ["batch", "past"])
    cached: _Axes = ["batch", stack.kv_heads, "past", stack.head_dim]
    past = [
        (take(f"past.{layer}.key", cached), take(f"past.{layer}.value", cached))
        for layer in range(stack.layers)
    ]
    results = _MODULES[stage](config)(builder.op, *own, CacheInputs(positions, past_positions, past))
    outputs["new_kv"] = [2 * stack.layers, "batch", stack.kv_heads, axis, stack.head_dim]
    for (name, axes), value in zip(outputs.items(), results, strict=True):
        # A fresh Identity would cost a copy; the producing value itself takes the public name.
        value.shape, value.type = ir.Shape(axes), ir.TensorType(ir.DataType.FLOAT)
        builder.add_output(value, name)
    return ir.Model(graph, ir_version=10, producer_name="blt-edge")
