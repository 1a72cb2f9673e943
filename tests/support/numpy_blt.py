"""A whole BLT in plain numpy: what stands in for transformers where torch is not installed.

Float64, no cache, whole texts and whole masks, and boundaries by the plain rules of `reference_patching`.
It shares no code with graphs and runtime but the reading of a config and the rotary frequencies. That it
computes what transformers does is shown in test_parity, by golden files where transformers is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from blt_edge.export.checkpoint import open_checkpoint
from blt_edge.export.checkpoint_base import HASH_EMBEDDING, Checkpoint
from blt_edge.export.reference import (
    Floats,
    Reference,
    ReferenceTrace,
    byte_ids,
    causal_starts,
    reference_available,
)
from blt_edge.graphs.config import ModelConfig, TransformerConfig, parse_config
from blt_edge.tools.models.numpy_patcher import (
    Array,
    Weights,
    attention,
    entropies_of,
    layer,
    norm,
    split_heads,
    transformer,
)
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["NumpyReference", "load_reference"]

_PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899,
    9576890767, 3628273133, 2860486313, 5463458053, 3367900313,
)  # fmt: skip
_SUPPRESSED, _EOS, _OFFSET = [0, 1, 3], 2, 4


def load_reference(folder: Path) -> Reference:
    """The checkpoint in transformers where that is installed, else in numpy."""
    return Reference.load(folder) if reference_available() else NumpyReference(folder)


class NumpyReference(Reference):
    """A Hugging Face checkpoint folder, asked as `Reference` is."""

    def __init__(self, folder: Path) -> None:
        with open_checkpoint(folder) as checkpoint:
            self._weights = _KeptWeights(checkpoint)
            super().__init__(None, checkpoint.config, f"numpy {np.__version__}")
        self._parsed = parse_config(self._config)

    @property
    def max_positions(self) -> int:
        return min(self._parsed.encoder.max_positions, self._parsed.decoder.max_positions)

    @property
    def threshold(self) -> float | None:
        rule = self._parsed.patching
        alone = rule.mode == "entropy" and not (rule.monotonic or rule.threshold_add)
        return rule.threshold if alone else None

    def greedy(self, prompt: bytes, count: int) -> bytes:
        data = prompt
        for _ in range(count):
            last = self._run(data, None).logits[-1].copy()
            last[_SUPPRESSED] = -np.inf
            if last.argmax() == _EOS:
                break
            data += bytes([int(last.argmax()) - _OFFSET])
        return data[len(prompt) :]

    def linear_inputs(self, data: bytes) -> dict[str, Floats]:
        """What enters each linear layer in one pass over the text: by module name, [rows, inputs]."""
        self._weights.inputs = kept = {}
        try:
            self._run(data, None)
        finally:
            self._weights.inputs = None
        return kept

    def _run(self, data: bytes, lengths: Sequence[int] | None) -> ReferenceTrace:
        config, weights, ids = self._parsed, self._weights, np.array(byte_ids(data))
        patcher_logits = entropies = None
        if config.patcher is not None:
            patcher_logits = _patcher(config.patcher, weights, ids)
            entropies = entropies_of(patcher_logits)
        if lengths is None:
            rounded = None if entropies is None else entropies.astype(np.float32)
            starts = causal_starts(self._config, ids.tolist(), rounded)
            lengths = np.diff([*starts, len(ids) + 1]).tolist()
        if sum(lengths) != len(ids) + 1 or min(lengths) < 1:
            raise ValueError(f"patch lengths must be positive and sum to {len(ids) + 1}: {list(lengths)}")
        embedded = _embed(config, weights, ids)
        states = transformer(embedded, config.encoder, weights, "model.local_encoder")
        # The last patch is open, or not begun: nothing reads it.
        edges = [edge for edge in np.cumsum([0, *lengths]).tolist() if edge < len(ids)] + [len(ids)]
        latents = _latents(config, weights, states, edges)
        closed = len(lengths) - 1
        # The byte at i reads the last patch that is complete before byte i + 1.
        patch_of = np.repeat(np.arange(len(lengths)), lengths)[1:] - 1
        logits = _decode(config, weights, states, latents, patch_of)
        values = _patch_values(config, weights, latents)[:closed]
        arrays = (patcher_logits, entropies, states, latents[:closed], values, logits)
        trace = (None if array is None else array.astype(np.float32) for array in arrays)
        return ReferenceTrace(data, ids, tuple(lengths), *trace)  # type: ignore[arg-type]


class _KeptWeights(Weights):
    """Float64 weights, all in memory: a test's model is small and runs many times."""

    inputs: dict[str, Array] | None = None
    """What entered the linear layers, kept while it is no None."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        names = [name.removesuffix(".weight") for name in checkpoint.names()]
        read = Weights(checkpoint, np.float64)
        self._tensors = {name: read.of(name) for name in names}

    def of(self, module: str) -> Array:
        return self._tensors[module]

    def linear(self, module: str, x: Array) -> Array:
        if self.inputs is not None:
            self.inputs[module] = x.astype(np.float32)
        return super().linear(module, x)


def _patcher(stack: TransformerConfig, weights: Weights, ids: NDArray[np.int64]) -> Array:
    """ids [n] -> logits [n, 260]."""
    states = transformer(weights.of("model.patcher.embed_tokens")[ids], stack, weights, "model.patcher")
    return weights.linear(
        "model.patcher.lm_head", norm(states, weights.of("model.patcher.norm"), stack.norm_eps)
    )


def _embed(config: ModelConfig, weights: Weights, ids: NDArray[np.int64]) -> Array:
    """ids [n] -> the sum of byte and hash embeddings [n, width]."""
    result = weights.of("model.local_encoder.embed_tokens")[ids]
    tables, vocab, first = weights.of(HASH_EMBEDDING.removesuffix(".weight")), config.hash.vocab, 0
    for function in range(config.hash.functions):
        prime = _PRIMES[function % len(_PRIMES)]
        for size in config.hash.group_sizes:
            padded = np.concatenate([np.zeros(size - 1, np.uint64), ids.astype(np.uint64)])
            powers = np.array([pow(prime, j, 1 << 64) for j in range(size)], np.uint64)
            sums = (sliding_window_view(padded, size) * powers).sum(axis=1, dtype=np.uint64)
            # unsigned sums wrap around as signed ones do
            result = result + tables[first + sums.view(np.int64) % vocab]
            first += vocab
    return np.asarray(result)


def _cross(
    stack: TransformerConfig, weights: Weights, prefix: str, x: Array, read: Array, seen: NDArray[np.bool_]
) -> Array:
    """x [Q, width] over read [K, width] -> 2 x + attention: its own residual and the caller's."""
    query = norm(x, weights.of(f"{prefix}.q_norm"), stack.norm_eps)
    read = norm(read, weights.of(f"{prefix}.k_norm"), stack.norm_eps)
    mixed = attention(
        split_heads(weights.linear(f"{prefix}.q_proj", query), stack.heads),
        split_heads(weights.linear(f"{prefix}.k_proj", read), stack.kv_heads),
        split_heads(weights.linear(f"{prefix}.v_proj", read), stack.kv_heads),
        seen,
    )
    return np.asarray(2 * x + weights.linear(f"{prefix}.o_proj", mixed))


def _latents(config: ModelConfig, weights: Weights, states: Array, edges: Sequence[int]) -> Array:
    """Byte states [n, width] and the edges of P patches -> global states [P, global width]."""
    k, encoder = config.cross_attn_k, config.encoder
    maxima = np.stack([states[start:end].max(axis=0) for start, end in pairwise(edges)])
    vectors = weights.linear("model.local_encoder.patch_embedding_projection", maxima)
    patch_of = np.repeat(np.arange(len(maxima)), np.diff(edges))
    own = np.repeat(np.arange(len(maxima)), k)[:, None] == patch_of
    last = encoder.layers - 1 if config.encoder_cross_all_layers else 0
    pooling = f"model.local_encoder.cross_attn_layers.{last}"
    pooled = _cross(encoder, weights, pooling, vectors.reshape(-1, encoder.width), states, own)
    pooled = pooled.reshape(len(maxima), -1)
    if config.token_projection:
        pooled = weights.linear("model.global_transformer.token_embedding_projection", pooled)
    return transformer(pooled, config.global_stack, weights, "model.global_transformer")


def _patch_vectors(config: ModelConfig, weights: Weights, latents: Array) -> Array:
    """[P, global width] -> [P * k, width]."""
    vectors = weights.linear("model.local_decoder.patch_embedding_projection", latents)
    return np.asarray(vectors.reshape(-1, config.decoder.width))


def _decode(
    config: ModelConfig, weights: Weights, states: Array, latents: Array, patch_of: NDArray[np.int64]
) -> Array:
    """Byte states [n, width], global states [P, ...] and the patch each byte reads [n] -> logits [n, 260]."""
    decoder, prefix = config.decoder, "model.local_decoder"
    vectors = _patch_vectors(config, weights, latents)
    seen = patch_of[:, None] == np.repeat(np.arange(len(latents)), config.cross_attn_k)
    for index in range(decoder.layers):
        if index == 0 or config.decoder_cross_all_layers:
            states = _cross(decoder, weights, f"{prefix}.cross_attn_layers.{index}", states, vectors, seen)
        states = layer(states, decoder, weights, f"{prefix}.layers.{index}")
    return weights.linear("lm_head", norm(states, weights.of(f"{prefix}.norm"), decoder.norm_eps))


def _patch_values(config: ModelConfig, weights: Weights, latents: Array) -> Array:
    """[P, global width] -> what `ReferenceTrace.patch_values` holds of each patch."""
    decoder, count = config.decoder, len(latents)
    vectors, flat = _patch_vectors(config, weights, latents), []
    for index in range(decoder.layers if config.decoder_cross_all_layers else 1):
        prefix = f"model.local_decoder.cross_attn_layers.{index}"
        normed = norm(vectors, weights.of(f"{prefix}.k_norm"), decoder.norm_eps)
        for name, axes in (("k_proj", (0, 2, 3, 1)), ("v_proj", (0, 2, 1, 3))):
            rows = normed @ weights.of(f"{prefix}.{name}").T
            by_head = rows.reshape(count, config.cross_attn_k, decoder.kv_heads, -1).transpose(axes)
            flat.append(by_head.reshape(count, -1))
    return np.concatenate(flat, axis=1)
