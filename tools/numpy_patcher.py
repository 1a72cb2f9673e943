"""The patcher's entropies in plain numpy, one layer's weights in memory at a time.

For choosing a threshold for a checkpoint just written, without torch and without loading it. Independent of
the graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from blt_edge.export.checkpoint import Checkpoint
from blt_edge.graphs.config import TransformerConfig
from blt_edge.graphs.rope import inverse_frequencies
from blt_edge.runtime.vocabulary import encode
from numpy.typing import NDArray

__all__ = ["patcher_entropies"]

Array = NDArray[np.float32]


def patcher_entropies(checkpoint: Checkpoint, patcher: TransformerConfig, data: bytes) -> Array:
    """Entropies float32 [1 + len(data)], nats: row i follows BOS and the first i bytes.

    Raises ValueError for another activation than silu.
    """
    if patcher.activation != "silu":
        raise ValueError(f"activation {patcher.activation}: only silu is implemented here")

    def weight(name: str) -> Array:
        return checkpoint.tensor(f"model.patcher.{name}.weight")

    x = weight("embed_tokens")[encode(data)]
    cos, sin, mask = _positions(patcher, len(x))
    for layer in range(patcher.layers):

        def part(name: str, layer: int = layer) -> Array:
            return weight(f"layers.{layer}.{name}")

        normed = _norm(x, part("input_layernorm"), patcher.norm_eps)
        x = x + _attention(normed, part, patcher, cos, sin, mask)
        normed = _norm(x, part("post_attention_layernorm"), patcher.norm_eps)
        gate = normed @ part("mlp.gate_proj").T
        gate = gate / (1 + np.exp(-gate)) * (normed @ part("mlp.up_proj").T)
        x = x + gate @ part("mlp.down_proj").T
    logits = _norm(x, weight("norm"), patcher.norm_eps) @ weight("lm_head").T
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(-(np.exp(log_probabilities) * log_probabilities).sum(axis=-1), dtype=np.float32)


def _positions(stack: TransformerConfig, count: int) -> tuple[Array, Array, Array]:
    """cos and sin [count, head_dim / 2], and the additive mask [count, count] of a causal window."""
    frequencies, scale = inverse_frequencies(stack.rope, stack.head_dim, stack.max_positions)
    angles = np.arange(count, dtype=np.float32)[:, None] * frequencies
    distance = np.arange(count)[:, None] - np.arange(count)
    seen = (distance >= 0) & (distance < (stack.window or count))
    mask = np.where(seen, 0, -np.inf).astype(np.float32)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32), mask


def _norm(x: Array, weight: Array, eps: float) -> Array:
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    return np.asarray(weight * (x / root), dtype=np.float32)


def _attention(
    x: Array, part: Callable[[str], Array], stack: TransformerConfig, cos: Array, sin: Array, mask: Array
) -> Array:
    def heads(name: str, count: int) -> Array:
        rows = x @ part(f"self_attn.{name}_proj").T
        return np.asarray(rows.reshape(len(x), count, stack.head_dim).swapaxes(0, 1), dtype=np.float32)

    groups = stack.heads // stack.kv_heads
    query = _rotate(heads("q", stack.heads), cos, sin)
    key = np.repeat(_rotate(heads("k", stack.kv_heads), cos, sin), groups, axis=0)
    value = np.repeat(heads("v", stack.kv_heads), groups, axis=0)
    scores = query @ key.swapaxes(1, 2) / np.float32(stack.head_dim**0.5) + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ value
    return np.asarray(mixed.swapaxes(0, 1).reshape(len(x), -1) @ part("self_attn.o_proj").T, dtype=np.float32)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs (0, 1), (2, 3), ... of [heads, count, head_dim] by their angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    result = np.empty_like(x)
    result[..., 0::2] = even * cos - odd * sin
    result[..., 1::2] = odd * cos + even * sin
    return result
