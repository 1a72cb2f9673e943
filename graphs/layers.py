"""The transformer blocks that all four stages share, as ONNX-building modules.

They mirror transformers' Blt modules (BltRMSNorm, BltMLP, BltSelfAttention, BltTransformerLayer) in
standard ONNX operators only, so that the same graph runs on ONNX Runtime and builds in TensorRT.
Shapes: B rows, S new positions, C cache slots, T = C + S. All floats are float32.

A graph keeps a checkpoint's tensor names but not always its shapes: projections that read the same
input are one product, weights are stored [in, out] as MatMul wants them, and the rows of queries
and keys are reordered so that interleaved RoPE becomes the half-split kind (attention scores do
not change when queries and keys are permuted alike). `WeightSource` says how to get from one to
the other; whoever reads checkpoints calls `assemble`.

What they do not know: files, weights' values, and which slot of a cache holds which position;
the caller passes the positions of all slots, and -1 marks a slot (or a padded row) to ignore.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import nn

from .config import TransformerConfig
from .rope import inverse_frequencies

__all__ = [
    "MASKED",
    "CacheInputs",
    "Embedding",
    "Linear",
    "Pair",
    "RMSNorm",
    "TransformerStack",
    "Weight",
    "WeightPart",
    "WeightSource",
    "activation",
]

FloatArray = npt.NDArray[np.float32]
Pair = tuple[ir.Value, ir.Value]

MASKED = -1e30
"""Added to a masked score. Finite, so that a row with nothing to attend to stays finite too; large enough
that exp() of it is exactly 0 beside any real score."""

_ROWS = 16


@dataclass(frozen=True)
class WeightPart:
    """One checkpoint tensor inside a graph's weight."""

    name: str
    """Checkpoint name, Hugging Face spelling."""
    rope_head_dim: int | None = None
    """Reorder the rows of each head of this many rows from interleaved pairs to two halves; None: leave."""


@dataclass(frozen=True)
class WeightSource:
    """A graph weight as checkpoint tensors, joined along their output rows.

    A matrix is assembled as float32 [in, out] (the transpose of the checkpoint's [out, in]);
    with `table`, or for a vector, the tensor is taken as it is.
    """

    parts: tuple[WeightPart, ...]
    table: bool = False

    def assemble(self, read: Callable[[str], FloatArray], shape: tuple[int, ...]) -> FloatArray:
        """The weight, of `shape`; its parts are read one by one, `read(name) -> float32 [out, in] or [n]`."""
        if self.table or len(shape) == 1:
            return read(self.parts[0].name)
        joined = np.empty(shape, np.float32)
        column = 0
        for part in self.parts:
            rows = read(part.name)
            if part.rope_head_dim is not None:
                heads = rows.reshape(-1, part.rope_head_dim // 2, 2, rows.shape[-1])
                rows = heads.transpose(0, 2, 1, 3).reshape(rows.shape)
            # A few rows at a time stay in the cache: six times as fast as one strided copy of a large matrix.
            for start in range(0, len(rows), _ROWS):
                block = rows[start : start + _ROWS].T
                joined[:, column + start : column + start + block.shape[1]] = block
            column += len(rows)
        assert column == shape[1], f"{self.parts[0].name}: {column} of {shape[1]} outputs"
        return joined


class Weight(nn.Parameter):
    """A float32 graph parameter that knows which checkpoint tensors it is made of."""

    def __init__(self, shape: tuple[int, ...], source: WeightSource, name: str = "weight") -> None:
        super().__init__(shape, dtype=ir.DataType.FLOAT, name=name)
        self.source = source


class Linear(nn.Module):
    """y = x W for one or several checkpoint projections of the same input, side by side.

    x is [..., K]; y is [..., N]. The weight is stored [K, N], the layout that ONNX Runtime and TensorRT
    quantize by blocks along K.
    """

    def __init__(self, inputs: int, outputs: int, *parts: WeightPart | str) -> None:
        super().__init__()
        named = tuple(WeightPart(part) if isinstance(part, str) else part for part in parts)
        self.weight = Weight((inputs, outputs), WeightSource(named))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.MatMul(x, self.weight)


class Embedding(nn.Module):
    """Row lookup: int64 ids [B, S] -> [B, S, D]."""

    def __init__(self, rows: int, width: int, name: str) -> None:
        super().__init__()
        self.weight = Weight((rows, width), WeightSource((WeightPart(name),), table=True))

    def forward(self, op: Any, ids: ir.Value) -> ir.Value:
        return op.Gather(self.weight, ids, axis=0)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (BltRMSNorm).

    Written in the shape that ONNX Runtime fuses to SimplifiedLayerNormalization.
    """

    def __init__(self, width: int, eps: float, name: str) -> None:
        super().__init__()
        self.weight = Weight((width,), WeightSource((WeightPart(name),)))
        self.eps = eps

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        mean_square = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
        return op.Mul(op.Div(x, op.Sqrt(op.Add(mean_square, self.eps))), self.weight)


def activation(op: Any, name: str, x: ir.Value) -> ir.Value:
    """The activation `name`, one of the values of `config.ACTIVATIONS`, in standard operators."""
    simple = {"relu": op.Relu, "sigmoid": op.Sigmoid, "tanh": op.Tanh, "linear": op.Identity}
    if name in simple:
        return simple[name](x)
    if name == "silu":
        return op.Mul(x, op.Sigmoid(x))
    if name == "quick_gelu":
        return op.Mul(x, op.Sigmoid(op.Mul(x, 1.702)))
    if name == "gelu":
        return op.Gelu(x, approximate="none")
    if name == "gelu_tanh":
        return op.Gelu(x, approximate="tanh")
    assert name == "relu2", name
    return op.Pow(op.Relu(x), 2.0)


class MLP(nn.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x)) (BltMLP); gate and up are one product."""

    def __init__(self, config: TransformerConfig, prefix: str) -> None:
        super().__init__()
        self.act = config.activation
        gate, up = f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"
        self.gate_up_proj = Linear(config.width, 2 * config.intermediate, gate, up)
        self.down_proj = Linear(config.intermediate, config.width, f"{prefix}.down_proj.weight")

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        gate, up = op.Split(self.gate_up_proj(op, x), axis=-1, num_outputs=2, _outputs=2)
        return self.down_proj(op, op.Mul(activation(op, self.act, gate), up))


class RotaryEmbedding(nn.Module):
    """cos and sin [B, 1, S, head_dim/2] of int64 positions [B, S]; frequencies are baked in."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        frequencies, self.scale = inverse_frequencies(config.rope, config.head_dim, config.max_positions)
        self.frequencies = nn.Parameter(
            frequencies.shape, name="inv_freq", data=ir.tensor(frequencies.astype(np.float32))
        )

    def forward(self, op: Any, positions: ir.Value) -> Pair:
        columns = op.Cast(op.Unsqueeze(positions, [1, 3]), to=ir.DataType.FLOAT)
        angles = op.Mul(columns, self.frequencies)
        cos, sin = op.Cos(angles), op.Sin(angles)
        if self.scale != 1.0:
            cos, sin = op.Mul(cos, self.scale), op.Mul(sin, self.scale)
        return cos, sin


class AttentionMask(nn.Module):
    """Additive causal mask [B, 1, G*S, T] over [cache | new], for G query heads per key head.

    A key is visible when its position is in (query - window, query] and not negative. Rows are
    ordered as the grouped queries are: all S positions of a group's first head, then its second.
    """

    def __init__(self, window: int | None, groups: int) -> None:
        super().__init__()
        self.window = window
        self.groups = groups

    def forward(self, op: Any, positions: ir.Value, past_positions: ir.Value) -> ir.Value:
        keys = op.Unsqueeze(op.Concat(past_positions, positions, axis=1), [1, 2])
        queries = op.Unsqueeze(positions, [1, 3])
        visible = op.And(op.LessOrEqual(keys, queries), op.GreaterOrEqual(keys, 0))
        if self.window is not None:
            visible = op.And(visible, op.Greater(keys, op.Sub(queries, self.window)))
        mask = op.Where(visible, 0.0, MASKED)
        return op.Tile(mask, [1, 1, self.groups, 1]) if self.groups > 1 else mask


class SelfAttention(nn.Module):
    """Causal grouped-query attention over [cache | new] that never joins the two (BltSelfAttention).

    Returns the output [B, S, D] and the new keys and values [B, Hkv, S, head_dim] (keys rotated).
    """

    def __init__(self, config: TransformerConfig, prefix: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        joined = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv_proj = Linear(
            config.width,
            joined,
            WeightPart(f"{prefix}.q_proj.weight", config.head_dim),
            WeightPart(f"{prefix}.k_proj.weight", config.head_dim),
            f"{prefix}.v_proj.weight",
        )
        self.o_proj = Linear(config.heads * config.head_dim, config.width, f"{prefix}.o_proj.weight")

    def forward(
        self, op: Any, x: ir.Value, rotary: Pair, mask: ir.Value, past: Pair
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        heads, kv_heads, head_dim = self.heads, self.kv_heads, self.head_dim
        # 1. Project, split into heads, rotate queries and keys together.
        joined = op.Reshape(self.qkv_proj(op, x), [0, 0, heads + 2 * kv_heads, head_dim])
        by_head = op.Transpose(joined, perm=[0, 2, 1, 3])
        rotated, value = op.Split(by_head, [heads + kv_heads, kv_heads], axis=1, _outputs=2)
        query, key = op.Split(_rotate(op, rotated, rotary), [heads, kv_heads], axis=1, _outputs=2)
        # 2. Query heads that share a key head become rows of one product.
        query = op.Mul(op.Reshape(query, [0, kv_heads, -1, head_dim]), 1.0 / math.sqrt(head_dim))
        # 3. One softmax over [past scores | new scores]; the cache itself is only read.
        past_key, past_value = past
        past_scores = op.MatMul(query, op.Transpose(past_key, perm=[0, 1, 3, 2]))
        new_scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
        weights = op.Softmax(op.Add(op.Concat(past_scores, new_scores, axis=-1), mask), axis=-1)
        slots = op.Shape(past_key, start=2, end=3)
        past_weights = op.Slice(weights, [0], slots, [3])
        new_weights = op.Slice(weights, slots, [np.iinfo(np.int64).max], [3])
        mixed = op.Add(op.MatMul(past_weights, past_value), op.MatMul(new_weights, value))
        # 4. Back to [B, S, H * head_dim]; S from x, as -1 cannot split the grouped rows, which are H/Hkv * S.
        rows, count = op.Shape(x, start=0, end=1), op.Shape(x, start=1, end=2)
        by_head = op.Reshape(mixed, op.Concat(rows, [heads], count, [head_dim], axis=0))
        mixed = op.Transpose(by_head, perm=[0, 2, 1, 3])
        return self.o_proj(op, op.Reshape(mixed, [0, 0, heads * head_dim])), key, value


def _rotate(op: Any, x: ir.Value, rotary: Pair) -> ir.Value:
    cos, sin = rotary
    first, second = op.Split(x, axis=-1, num_outputs=2, _outputs=2)
    return op.Concat(
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
        op.Add(op.Mul(second, cos), op.Mul(first, sin)),
        axis=-1,
    )


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals (BltTransformerLayer)."""

    def __init__(self, config: TransformerConfig, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps, f"{prefix}.input_layernorm.weight")
        self.self_attn = SelfAttention(config, f"{prefix}.self_attn")
        norm = f"{prefix}.post_attention_layernorm.weight"
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps, norm)
        self.mlp = MLP(config, f"{prefix}.mlp")

    def forward(
        self, op: Any, x: ir.Value, rotary: Pair, mask: ir.Value, past: Pair
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        attended, key, value = self.self_attn(op, self.input_layernorm(op, x), rotary, mask, past)
        x = op.Add(x, attended)
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x))), key, value


@dataclass(frozen=True)
class CacheInputs:
    """A stage's inputs that say where its new positions stand and what came before them."""

    positions: ir.Value
    """int64 [B, S]."""
    past_positions: ir.Value
    """int64 [B, C], of every cache slot."""
    past: list[Pair]
    """Each layer's cached keys and values, [B, Hkv, C, head_dim]."""


class TransformerStack(nn.Module):
    """The layers of one part, with RoPE and mask computed once for all of them.

    New keys and values are joined to one output [2 * layers, B, Hkv, S, head_dim] (key and value of layer 0,
    of layer 1, ...), so that a cache is updated by one write.
    """

    def __init__(self, config: TransformerConfig, prefix: str) -> None:
        super().__init__()
        self.rotary_emb = RotaryEmbedding(config)
        self.attention_mask = AttentionMask(config.window, config.heads // config.kv_heads)
        self.layers = nn.ModuleList(
            [TransformerLayer(config, f"{prefix}.layers.{index}") for index in range(config.layers)]
        )

    def forward(self, op: Any, x: ir.Value, cache: CacheInputs) -> Pair:
        """x [B, S, D] -> the last layer's output and new_kv."""
        x, keys_values = self.run(op, x, cache)
        return x, self.join(op, keys_values)

    def run(
        self,
        op: Any,
        x: ir.Value,
        cache: CacheInputs,
        before_layer: Callable[[int, ir.Value], ir.Value] = lambda _index, x: x,
    ) -> tuple[ir.Value, list[ir.Value]]:
        """The last layer's output and all new keys and values; `before_layer(index, x)` may change what a
        layer reads."""
        rotary = self.rotary_emb(op, cache.positions)
        mask = self.attention_mask(op, cache.positions, cache.past_positions)
        keys_values: list[ir.Value] = []
        for index, (layer, past) in enumerate(zip(self.layers, cache.past, strict=True)):
            x, key, value = layer(op, before_layer(index, x), rotary, mask, past)
            keys_values += [key, value]
        return x, keys_values

    def join(self, op: Any, keys_values: list[ir.Value]) -> ir.Value:
        """new_kv of keys and values, each [B, Hkv, S, head_dim]."""
        return op.Concat(*[op.Unsqueeze(value, [0]) for value in keys_values], axis=0)
