"""The encoder stage: byte embeddings (hash rows summed in by the host) to one state per byte.

The patcher stage: a small byte-level language model whose uncertainty decides the patches.

The latent stage: everything that is computed once per patch.

Pooling of a patch's byte states (maximum, projection to k vectors, cross-attention of these over the
patch's own bytes), the global transformer over patches, and the decoder's cross-attention keys and
values of the patch for every decoder layer, so that a byte step repeats no work that belongs to a patch.

The decoder stage: byte states and the one patch that each byte may read, to next-byte logits.

The four stage graphs of a BLT: inputs, outputs and dynamic axes, and how to build each.

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

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from ..runtime.manifest import Axis
from .config import ModelConfig, TransformerConfig
from .layers import MASKED, Embedding, Linear, RMSNorm, TransformerStack

__all__ = [
    "OPSET",
    "STAGE_NAMES",
    "DecoderStage",
    "EncoderStage",
    "LatentStage",
    "PatcherStage",
    "axis_ranges",
    "build_stage",
    "cross_layers",
    "patch_value_width",
    "stage_names",
    "stage_stack",
]


class EncoderStage(nn.Module):
    """byte_embeds [B, S, D] -> byte_states [B, S, D] and new keys and values (BltLocalEncoder's layers)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("encoder")
        self.stack = TransformerStack(config.encoder, "model.local_encoder")

    def forward(
        self, op: Any, embeds: ir.Value, positions: ir.Value, past_positions: ir.Value, past: list[ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        return self.stack(op, embeds, positions, past_positions, past)


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


OPSET = 20
"""Standard ONNX operator set of every graph: the newest that needs no block-wise DequantizeLinear."""

STAGE_NAMES = ("patcher", "encoder", "latent", "decoder")


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
