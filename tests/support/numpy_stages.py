"""Plain numpy versions of the four stages over whole texts: no cache, no chunks, no fused products.

Weights are taken by their names and in the layout of a Hugging Face checkpoint; everything is in float64, one
head, one byte or one patch at a time where that is plainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from blt_edge.graphs.config import ModelConfig, TransformerConfig
from blt_edge.graphs.rope import inverse_frequencies
from blt_edge.runtime.hashing import PRIMES
from blt_edge.tools.models.numpy_patcher import GATES
from numpy.typing import NDArray

__all__ = ["NumpyBlt", "WholeText", "random_tensors"]

Array = NDArray[np.float64]
Floats = NDArray[np.float32]


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Floats]:
    """Every tensor of the four stages, in the shapes that a checkpoint has."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layers(prefix: str, stack: TransformerConfig) -> None:
        width, kv = stack.width, stack.kv_heads * stack.head_dim
        for index in range(stack.layers):
            layer = f"{prefix}.layers.{index}"
            for name, rows in (("q_proj", width), ("k_proj", kv), ("v_proj", kv), ("o_proj", width)):
                shapes[f"{layer}.self_attn.{name}"] = (rows, width)
            for name in ("gate_proj", "up_proj"):
                shapes[f"{layer}.mlp.{name}"] = (stack.intermediate, width)
            shapes[f"{layer}.mlp.down_proj"] = (width, stack.intermediate)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{name}"] = (width,)

    def cross(prefix: str, stack: TransformerConfig, count: int) -> None:
        width, kv = stack.width, stack.kv_heads * stack.head_dim
        for index in range(count):
            for name, rows in (("q_proj", width), ("k_proj", kv), ("v_proj", kv), ("o_proj", width)):
                shapes[f"{prefix}.cross_attn_layers.{index}.{name}"] = (rows, width)
            for name in ("q_norm", "k_norm"):
                shapes[f"{prefix}.cross_attn_layers.{index}.{name}"] = (width,)

    k, width, wide = config.cross_attn_k, config.encoder.width, config.global_stack.width
    if config.patcher is not None:
        layers("model.patcher", config.patcher)
        shapes["model.patcher.embed_tokens"] = shapes["model.patcher.lm_head"] = (260, config.patcher.width)
        shapes["model.patcher.norm"] = (config.patcher.width,)
    layers("model.local_encoder", config.encoder)
    cross(
        "model.local_encoder", config.encoder, config.encoder.layers if config.encoder_cross_all_layers else 1
    )
    shapes["model.local_encoder.patch_embedding_projection"] = (k * width, width)
    layers("model.global_transformer", config.global_stack)
    if config.token_projection:
        shapes["model.global_transformer.token_embedding_projection"] = (wide, k * width)
    layers("model.local_decoder", config.decoder)
    cross(
        "model.local_decoder", config.decoder, config.decoder.layers if config.decoder_cross_all_layers else 1
    )
    shapes["model.local_decoder.patch_embedding_projection"] = (k * width, wide)
    shapes["model.local_decoder.norm"] = (width,)
    shapes["lm_head"] = (260, width)
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = 1.6 if name.endswith(("q_proj", "k_proj")) else 1.0
        weight = random.normal(0, scale / math.sqrt(shape[-1]), shape)
        tensors[f"{name}.weight"] = (random.uniform(0.5, 1.5, shape) if len(shape) == 1 else weight).astype(
            np.float32
        )
    return tensors


@dataclass(frozen=True, repr=False)
class WholeText:
    """What the model makes of a text of n ids."""

    entropies: Array
    """[n] in nats."""
    starts: list[int]
    """Of patches, up to n if a patch starts after the last id."""
    states: Array
    """[n, D] of the encoder."""
    values: list[list[tuple[Array, Array]]]
    """See `NumpyBlt.latent`, for the patches that are complete."""
    logits: Array
    """[n, 260]."""

    def flat_values(self) -> Array:
        """`values` as the latent stage hands them out: [P, V]."""
        return np.array(
            [
                np.concatenate(
                    [
                        np.concatenate([k.transpose(1, 2, 0).ravel(), v.transpose(1, 0, 2).ravel()])
                        for k, v in row
                    ]
                )
                for row in self.values
            ]
        )


class NumpyBlt:
    """The model's parts, each over a whole text."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Floats]) -> None:
        self.config = config
        self._tensors = tensors

    def weight(self, name: str) -> Array:
        """A tensor in float64."""
        return self._tensors[f"{name}.weight"].astype(np.float64)

    def whole(self, ids: NDArray[np.int64], starts: list[int] | None = None) -> WholeText:
        """A text from ids to logits; without `starts` of patches, the entropy threshold decides them."""
        entropies, _ = self.patcher(ids)
        if starts is None:
            rule = self.config.patching
            others = (rule.monotonic, rule.threshold_add, rule.max_patch_length)
            assert (rule.mode, *others) == ("entropy", False, None, None)
            assert rule.threshold is not None
            starts = [0, 1]
            starts += [i + 1 for i in range(1, len(ids)) if entropies[i] > rule.threshold]
        states = self.encoder(self.embed(ids))
        values = self.latent([states[first:last] for first, last in pairwise(starts)])
        index = [sum(start <= i + 1 for start in starts) - 2 for i in range(len(ids))]
        return WholeText(entropies, starts, states, values, self.decoder(states, values, index))

    def embed(self, ids: NDArray[np.int64]) -> Array:
        """Byte embeddings [n, D]: the byte's own and one for each n-gram hash that ends with it."""
        spec = self.config.hash
        bytes_, hashed = (
            self.weight("model.local_encoder.embed_tokens"),
            self.weight("model.encoder_hash_tok_embedding"),
        )
        rows = bytes_[ids]
        for i in range(len(ids)):
            for table in range(spec.functions * len(spec.group_sizes)):
                size = spec.group_sizes[table % len(spec.group_sizes)]
                window = ([0] * size + ids[: i + 1].tolist())[-size:]
                prime = PRIMES[table // len(spec.group_sizes) % len(PRIMES)]
                total = sum(value * prime**j for j, value in enumerate(window))
                signed = (total + 2**63) % 2**64 - 2**63
                rows[i] += hashed[table * spec.vocab + signed % spec.vocab]
        return rows

    def patcher(self, ids: NDArray[np.int64]) -> tuple[Array, Array]:
        """Entropies [n] in nats and logits [n, 260]."""
        stack = self.config.patcher
        assert stack is not None
        hidden = self._stack("model.patcher", stack, self.weight("model.patcher.embed_tokens")[ids])
        logits = self._norm("model.patcher.norm", stack, hidden) @ self.weight("model.patcher.lm_head").T
        chances = _softmax(logits)
        return -(chances * np.log(chances)).sum(axis=-1), logits

    def encoder(self, embeds: Array) -> Array:
        """Byte states [n, D] of byte embeddings [n, D]."""
        return self._stack("model.local_encoder", self.config.encoder, embeds)

    def latent(self, patches: list[Array]) -> list[list[tuple[Array, Array]]]:
        """By patch and decoder layer, the keys [k, Hkv, head_dim] and values that a byte reads."""
        config, decoder = self.config, self.config.decoder
        k, width = config.cross_attn_k, config.encoder.width
        hidden = np.stack([self._pool(states).reshape(k * width) for states in patches])
        if config.token_projection:
            hidden = hidden @ self.weight("model.global_transformer.token_embedding_projection").T
        hidden = self._stack("model.global_transformer", config.global_stack, hidden)
        projected = hidden @ self.weight("model.local_decoder.patch_embedding_projection").T
        result = []
        for vectors in projected.reshape(len(patches), k, width):
            layers = []
            for index in range(decoder.layers if config.decoder_cross_all_layers else 1):
                cross = f"model.local_decoder.cross_attn_layers.{index}"
                normed = self._norm(f"{cross}.k_norm", decoder, vectors)
                shape = (k, decoder.kv_heads, decoder.head_dim)
                key, value = (normed @ self.weight(f"{cross}.{name}").T for name in ("k_proj", "v_proj"))
                layers.append((key.reshape(shape), value.reshape(shape)))
            result.append(layers)
        return result

    def decoder(
        self, states: Array, patch_values: list[list[tuple[Array, Array]]], index: list[int]
    ) -> Array:
        """Logits [n, 260]; byte i reads patch index[i]."""
        stack, prefix = self.config.decoder, "model.local_decoder"
        hidden = states
        for layer in range(stack.layers):
            if layer == 0 or self.config.decoder_cross_all_layers:
                cross = f"{prefix}.cross_attn_layers.{layer}"
                read = [patch_values[patch][layer] for patch in index]
                rows = [
                    self._cross(cross, stack, row[None], key, value)[0]
                    for row, (key, value) in zip(hidden, read, strict=True)
                ]
                hidden = hidden + np.stack(rows)
            hidden = self._layer(f"{prefix}.layers.{layer}", stack, hidden)
        return self._norm(f"{prefix}.norm", stack, hidden) @ self.weight("lm_head").T

    def _pool(self, states: Array) -> Array:
        """One patch's k vectors [k, D] from its bytes' states."""
        stack, prefix = self.config.encoder, "model.local_encoder"
        last = stack.layers - 1 if self.config.encoder_cross_all_layers else 0
        cross = f"{prefix}.cross_attn_layers.{last}"
        vectors = (states.max(axis=0) @ self.weight(f"{prefix}.patch_embedding_projection").T).reshape(
            self.config.cross_attn_k, stack.width
        )
        normed = self._norm(f"{cross}.k_norm", stack, states)
        shape = (len(states), stack.kv_heads, stack.head_dim)
        key, value = (
            (normed @ self.weight(f"{cross}.{name}").T).reshape(shape) for name in ("k_proj", "v_proj")
        )
        return vectors + self._cross(cross, stack, vectors, key, value)

    def _cross(self, cross: str, stack: TransformerConfig, x: Array, key: Array, value: Array) -> Array:
        """Attention of x [q, D] to all of key and value [n, Hkv, head_dim], plus x."""
        query = self._norm(f"{cross}.q_norm", stack, x) @ self.weight(f"{cross}.q_proj").T
        query = query.reshape(len(x), stack.heads, stack.head_dim)
        mixed = _attend(query, key, value, np.ones((len(x), len(key)), bool))
        return x + mixed @ self.weight(f"{cross}.o_proj").T

    def _stack(self, prefix: str, stack: TransformerConfig, x: Array) -> Array:
        for index in range(stack.layers):
            x = self._layer(f"{prefix}.layers.{index}", stack, x)
        return x

    def _layer(self, layer: str, stack: TransformerConfig, x: Array) -> Array:
        normed = self._norm(f"{layer}.input_layernorm", stack, x)
        query, key, value = (
            (normed @ self.weight(f"{layer}.self_attn.{name}_proj").T).reshape(len(x), -1, stack.head_dim)
            for name in "qkv"
        )
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (distance >= 0) & (distance < (len(x) if stack.window is None else stack.window))
        mixed = _attend(_rotate(query, stack), _rotate(key, stack), value, seen)
        x = x + mixed @ self.weight(f"{layer}.self_attn.o_proj").T
        normed = self._norm(f"{layer}.post_attention_layernorm", stack, x)
        gate = GATES[stack.activation](normed @ self.weight(f"{layer}.mlp.gate_proj").T)
        up = normed @ self.weight(f"{layer}.mlp.up_proj").T
        return np.asarray(x + (gate * up) @ self.weight(f"{layer}.mlp.down_proj").T)

    def _norm(self, name: str, stack: TransformerConfig, x: Array) -> Array:
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + stack.norm_eps)
        return np.asarray(x / scale * self.weight(name))


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _rotate(x: Array, stack: TransformerConfig) -> Array:
    """Interleaved RoPE: pairs (0, 1), (2, 3), ... of x [n, H, head_dim] at positions 0, 1, ..."""
    frequencies, scale = inverse_frequencies(stack.rope, stack.head_dim, stack.max_positions)
    angles = np.arange(len(x))[:, None, None] * frequencies.astype(np.float64)
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def _attend(query: Array, key: Array, value: Array, seen: NDArray[np.bool_]) -> Array:
    """query [q, H, d], key and value [n, Hkv, d], seen [q, n] -> [q, H * d]."""
    heads, head_dim = query.shape[1:]
    groups = heads // key.shape[1]
    mixed = []
    for head in range(heads):
        scores = query[:, head] @ key[:, head // groups].T / math.sqrt(head_dim)
        mixed.append(_softmax(np.where(seen, scores, -np.inf)) @ value[:, head // groups])
    return np.concatenate(mixed, axis=1)
