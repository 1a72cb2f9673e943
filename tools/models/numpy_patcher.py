"""The transformer layers of a BLT in plain numpy, without cache, and the patcher's entropies by them.

For choosing a threshold for a checkpoint just written, without torch and with one layer's weights in memory
at a time, and for tests. Whole texts and whole masks, computed in whichever float type the states have:
float32 where memory counts, float64 where a result is to be compared with. Independent of the graphs: what it
shares with the export is how a config is read and the inverse frequencies of rotary positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...export.checkpoint import Checkpoint
from ...graphs.config import TransformerConfig
from ...graphs.rope import inverse_frequencies
from ...runtime.vocabulary import encode

Array = NDArray[Any]


def _sigmoid(x: Array) -> Array:
    # exp of minus the size never overflows
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, small) / (1 + small), x.dtype)


def _gelu(x: Array) -> Array:
    # numpy has no error function, so one value at a time
    erf = np.fromiter(map(math.erf, (x / math.sqrt(2)).ravel().tolist()), x.dtype, x.size)
    return np.asarray(0.5 * x * (1 + erf.reshape(x.shape)), x.dtype)


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), x.dtype)


GATES: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "linear": lambda x: x,
}
"""The feed-forward's gate by its name in a `TransformerConfig`."""


class Weights:
    """A checkpoint's weights by the name of their module, such as "model.patcher.lm_head"."""

    def __init__(self, checkpoint: Checkpoint, dtype: type[np.floating[Any]] = np.float32) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype

    def of(self, module: str) -> Array:
        """The module's weight, read anew at each call, so that one layer's are in memory at a time."""
        return self._checkpoint.tensor(f"{module}.weight").astype(self._dtype, copy=False)

    def linear(self, module: str, x: Array) -> Array:
        """[..., inputs] -> [..., outputs]."""
        return np.asarray(x @ self.of(module).T)


def norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm over the last axis."""
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))
    return np.asarray(weight * (x / root))


def causal_mask(count: int, window: int | None) -> NDArray[np.bool_]:
    """[count, count]: whether a query (row) sees a key; a window counts the query's own position."""
    distance = np.arange(count)[:, None] - np.arange(count)
    return (distance >= 0) & (distance < (window or count))


def attention(query: Array, key: Array, value: Array, seen: NDArray[np.bool_]) -> Array:
    """[heads, Q, head_dim], two of [kv_heads, K, head_dim] and [Q, K] -> [Q, heads * head_dim].

    Each key and value head serves heads / kv_heads query heads next to each other.
    """
    heads, count, head_dim = query.shape
    key, value = (np.repeat(x, heads // len(x), axis=0) for x in (key, value))
    scores = query @ key.swapaxes(1, 2) / query.dtype.type(math.sqrt(head_dim))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ value
    return np.asarray(mixed.swapaxes(0, 1).reshape(count, -1))


def split_heads(x: Array, heads: int) -> Array:
    """[count, heads * head_dim] -> [heads, count, head_dim]."""
    return np.asarray(x.reshape(len(x), heads, -1).swapaxes(0, 1))


def transformer(x: Array, stack: TransformerConfig, weights: Weights, prefix: str) -> Array:
    """All layers of a stack over one text's states [count, width]; no final norm."""
    for index in range(stack.layers):
        x = layer(x, stack, weights, f"{prefix}.layers.{index}")
    return x


def layer(x: Array, stack: TransformerConfig, weights: Weights, prefix: str) -> Array:
    """One pre-norm layer: self-attention with rotary positions 0, 1, ..., then the gated feed-forward."""
    normed = norm(x, weights.of(f"{prefix}.input_layernorm"), stack.norm_eps)
    cos, sin = _rotations(stack, len(x), x.dtype)

    def heads(name: str, count: int) -> Array:
        return split_heads(weights.linear(f"{prefix}.self_attn.{name}_proj", normed), count)

    query = _rotate(heads("q", stack.heads), cos, sin)
    key, value = _rotate(heads("k", stack.kv_heads), cos, sin), heads("v", stack.kv_heads)
    mixed = attention(query, key, value, causal_mask(len(x), stack.window))
    x = x + weights.linear(f"{prefix}.self_attn.o_proj", mixed)
    normed = norm(x, weights.of(f"{prefix}.post_attention_layernorm"), stack.norm_eps)
    gate = GATES[stack.activation](weights.linear(f"{prefix}.mlp.gate_proj", normed))
    up = weights.linear(f"{prefix}.mlp.up_proj", normed)
    return np.asarray(x + weights.linear(f"{prefix}.mlp.down_proj", gate * up))


def entropies_of(logits: Array) -> Array:
    """[..., classes] -> [...], nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(-(np.exp(log_probabilities) * log_probabilities).sum(axis=-1))


def _rotations(stack: TransformerConfig, count: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """cos and sin [count, head_dim / 2]. Angles are products in float32, as in the reference: at position
    1000 a float64 product would differ by 1e-4.
    """
    frequencies, scale = inverse_frequencies(stack.rope, stack.head_dim, stack.max_positions)
    angles = (np.arange(count, dtype=np.float32)[:, None] * frequencies).astype(dtype)
    return np.cos(angles) * dtype.type(scale), np.sin(angles) * dtype.type(scale)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs (0, 1), (2, 3), ... of [heads, count, head_dim] by their angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    result = np.empty_like(x)
    result[..., 0::2] = even * cos - odd * sin
    result[..., 1::2] = odd * cos + even * sin
    return result


def patcher_entropies(checkpoint: Checkpoint, patcher: TransformerConfig, data: bytes) -> NDArray[np.float32]:
    """Entropies float32 [1 + len(data)], nats: row i follows BOS and the first i bytes."""
    weights = Weights(checkpoint)
    states = weights.of("model.patcher.embed_tokens")[encode(data)]
    states = transformer(states, patcher, weights, "model.patcher")
    states = norm(states, weights.of("model.patcher.norm"), patcher.norm_eps)
    return entropies_of(weights.linear("model.patcher.lm_head", states)).astype(np.float32)
