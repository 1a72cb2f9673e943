"""A whole BLT in plain numpy: judge of graphs and runtime, and transformers where torch is missing.

Float64, no cache, whole texts and whole masks, and boundaries by the plain rules of `export.reference`. It
shares no code with graphs and runtime but the reading of a config and the rotary frequencies. That it
computes what transformers does is shown in test_parity, by golden files where transformers is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from blt_edge.export.checkpoint import open_checkpoint
from blt_edge.export.checkpoint_base import HASH_EMBEDDING
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

__all__ = ["NumpyBlt", "NumpyReference", "WholeText", "load_reference"]

_PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899,
    9576890767, 3628273133, 2860486313, 5463458053, 3367900313,
)  # fmt: skip
_SUPPRESSED, _EOS, _OFFSET = [0, 1, 3], 2, 4

Ids = NDArray[np.int64]


@dataclass(frozen=True, repr=False)
class WholeText:
    """What the model makes of a text of n ids, P of whose patches are complete."""

    entropies: Array | None
    """[n] in nats; None without a patcher, as `patcher_logits`."""
    patcher_logits: Array | None
    """[n, 260]."""
    starts: list[int]
    """Of patches, up to n if a patch starts after the last id."""
    states: Array
    """[n, D] of the encoder."""
    latents: Array
    """[P, global width] of the global transformer."""
    values: Array
    """[P, V]: what the decoder reads of each patch, as `ReferenceTrace.patch_values`."""
    logits: Array
    """[n, 260]."""


class NumpyBlt:
    """The model's parts, each over a whole text; tensors have the names and layout of a checkpoint."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.config = config
        self.weights = _KeptWeights(tensors)

    def whole(self, ids: Ids, starts: Sequence[int] | Callable[[Array | None], Sequence[int]]) -> WholeText:
        """A text from ids to logits. `starts` of patches, 0 first, or what decides them by the entropies."""
        patcher_logits = entropies = None
        if self.config.patcher is not None:
            entropies, patcher_logits = self.patcher(ids)
        if callable(starts):
            starts = starts(entropies)
        states, closed = self.encoder(self.embed(ids)), len(starts) - 1
        # The last patch is open, or not begun: nothing reads it.
        edges = [*starts, len(ids)] if starts[-1] < len(ids) else starts
        latents = self.latents(states, edges)
        # The byte at i reads the last patch that is complete before byte i + 1.
        patch_of = np.searchsorted(starts, np.arange(1, len(ids) + 1), side="right") - 2
        logits = self.decoder(states, latents, patch_of)
        values = self.patch_values(latents)[:closed]
        return WholeText(entropies, patcher_logits, list(starts), states, latents[:closed], values, logits)

    def patcher(self, ids: Ids) -> tuple[Array, Array]:
        """ids [n] -> entropies [n] in nats and logits [n, 260]."""
        stack, weights = self.config.patcher, self.weights
        assert stack is not None
        states = transformer(weights.of("model.patcher.embed_tokens")[ids], stack, weights, "model.patcher")
        normed = norm(states, weights.of("model.patcher.norm"), stack.norm_eps)
        logits = weights.linear("model.patcher.lm_head", normed)
        return entropies_of(logits), logits

    def embed(self, ids: Ids) -> Array:
        """ids [n] -> the sum of byte and hash embeddings [n, D]."""
        spec, first = self.config.hash, 0
        result = self.weights.of("model.local_encoder.embed_tokens")[ids]
        tables = self.weights.of(HASH_EMBEDDING.removesuffix(".weight"))
        for function in range(spec.functions):
            prime = _PRIMES[function % len(_PRIMES)]
            for size in spec.group_sizes:
                padded = np.concatenate([np.zeros(size - 1, np.uint64), ids.astype(np.uint64)])
                powers = np.array([pow(prime, j, 1 << 64) for j in range(size)], np.uint64)
                sums = (sliding_window_view(padded, size) * powers).sum(axis=1, dtype=np.uint64)
                # unsigned sums wrap around as signed ones do
                result = result + tables[first + sums.view(np.int64) % spec.vocab]
                first += spec.vocab
        return np.asarray(result)

    def encoder(self, embeds: Array) -> Array:
        """Byte embeddings [n, D] -> byte states [n, D]."""
        return transformer(embeds, self.config.encoder, self.weights, "model.local_encoder")

    def latents(self, states: Array, edges: Sequence[int]) -> Array:
        """Byte states [n, D] and the edges of P patches -> global states [P, global width]."""
        config, weights, encoder = self.config, self.weights, self.config.encoder
        maxima = np.stack([states[start:end].max(axis=0) for start, end in pairwise(edges)])
        vectors = weights.linear("model.local_encoder.patch_embedding_projection", maxima)
        patch_of = np.repeat(np.arange(len(maxima)), np.diff(edges))
        own = np.repeat(np.arange(len(maxima)), config.cross_attn_k)[:, None] == patch_of
        last = encoder.layers - 1 if config.encoder_cross_all_layers else 0
        pooling = f"model.local_encoder.cross_attn_layers.{last}"
        pooled = self._cross(encoder, pooling, vectors.reshape(-1, encoder.width), states, own)
        pooled = pooled.reshape(len(maxima), -1)
        if config.token_projection:
            pooled = weights.linear("model.global_transformer.token_embedding_projection", pooled)
        return transformer(pooled, config.global_stack, weights, "model.global_transformer")

    def patch_values(self, latents: Array) -> Array:
        """[P, global width] -> what `ReferenceTrace.patch_values` holds of each patch."""
        config, decoder, count = self.config, self.config.decoder, len(latents)
        vectors, flat = self._patch_vectors(latents), []
        for index in range(decoder.layers if config.decoder_cross_all_layers else 1):
            prefix = f"model.local_decoder.cross_attn_layers.{index}"
            normed = norm(vectors, self.weights.of(f"{prefix}.k_norm"), decoder.norm_eps)
            for name, axes in (("k_proj", (0, 2, 3, 1)), ("v_proj", (0, 2, 1, 3))):
                rows = normed @ self.weights.of(f"{prefix}.{name}").T
                by_head = rows.reshape(count, config.cross_attn_k, decoder.kv_heads, -1).transpose(axes)
                flat.append(by_head.reshape(count, -1))
        return np.concatenate(flat, axis=1)

    def decoder(self, states: Array, latents: Array, patch_of: NDArray[np.integer[Any]]) -> Array:
        """Byte states [n, D], latents [P, ...] and the patch that each byte reads [n] -> logits [n, 260]."""
        config, decoder, prefix = self.config, self.config.decoder, "model.local_decoder"
        vectors = self._patch_vectors(latents)
        seen = patch_of[:, None] == np.repeat(np.arange(len(latents)), config.cross_attn_k)
        for index in range(decoder.layers):
            if index == 0 or config.decoder_cross_all_layers:
                states = self._cross(decoder, f"{prefix}.cross_attn_layers.{index}", states, vectors, seen)
            states = layer(states, decoder, self.weights, f"{prefix}.layers.{index}")
        normed = norm(states, self.weights.of(f"{prefix}.norm"), decoder.norm_eps)
        return self.weights.linear("lm_head", normed)

    def _patch_vectors(self, latents: Array) -> Array:
        """[P, global width] -> [P * k, D]."""
        vectors = self.weights.linear("model.local_decoder.patch_embedding_projection", latents)
        return np.asarray(vectors.reshape(-1, self.config.decoder.width))

    def _cross(
        self, stack: TransformerConfig, prefix: str, x: Array, read: Array, seen: NDArray[np.bool_]
    ) -> Array:
        """x [Q, D] over read [K, D] -> 2 x + attention: its own residual and the caller's."""
        weights = self.weights
        query = norm(x, weights.of(f"{prefix}.q_norm"), stack.norm_eps)
        read = norm(read, weights.of(f"{prefix}.k_norm"), stack.norm_eps)
        mixed = attention(
            split_heads(weights.linear(f"{prefix}.q_proj", query), stack.heads),
            split_heads(weights.linear(f"{prefix}.k_proj", read), stack.kv_heads),
            split_heads(weights.linear(f"{prefix}.v_proj", read), stack.kv_heads),
            seen,
        )
        return np.asarray(2 * x + weights.linear(f"{prefix}.o_proj", mixed))


class _KeptWeights(Weights):
    """Float64 weights, all in memory: a test's model is small and runs many times."""

    inputs: dict[str, Array] | None = None
    """What entered the linear layers, kept while it is no None."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._tensors = {name.removesuffix(".weight"): x.astype(np.float64) for name, x in tensors.items()}

    def of(self, module: str) -> Array:
        return self._tensors[module]

    def linear(self, module: str, x: Array) -> Array:
        if self.inputs is not None:
            self.inputs[module] = x.astype(np.float32)
        return super().linear(module, x)


def load_reference(folder: Path) -> Reference:
    """The checkpoint in transformers where that is installed, else in numpy."""
    return Reference.load(folder) if reference_available() else NumpyReference(folder)


class NumpyReference(Reference):
    """A Hugging Face checkpoint folder, asked as `Reference` is."""

    def __init__(self, folder: Path) -> None:
        with open_checkpoint(folder) as checkpoint:
            tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
            super().__init__(None, checkpoint.config, f"numpy {np.__version__}")
        self._blt = NumpyBlt(parse_config(self._config), tensors)

    @property
    def max_positions(self) -> int:
        config = self._blt.config
        return min(config.encoder.max_positions, config.decoder.max_positions)

    @property
    def threshold(self) -> float | None:
        rule = self._blt.config.patching
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
        self._blt.weights.inputs = kept = {}
        try:
            self._run(data, None)
        finally:
            self._blt.weights.inputs = None
        return kept

    def _run(self, data: bytes, lengths: Sequence[int] | None) -> ReferenceTrace:
        ids = np.array(byte_ids(data))

        def decided(entropies: Array | None) -> Sequence[int]:
            if lengths is not None:
                return np.cumsum([0, *lengths[:-1]]).tolist()
            rounded = None if entropies is None else entropies.astype(np.float32)
            return causal_starts(self._config, ids.tolist(), rounded)

        if lengths is not None and (sum(lengths) != len(ids) + 1 or min(lengths) < 1):
            raise ValueError(f"patch lengths must be positive and sum to {len(ids) + 1}: {list(lengths)}")
        text = self._blt.whole(ids, decided)
        arrays = (text.patcher_logits, text.entropies, text.states, text.latents, text.values, text.logits)
        trace = (None if array is None else array.astype(np.float32) for array in arrays)
        taken = tuple(np.diff([*text.starts, len(ids) + 1]).tolist())
        return ReferenceTrace(data, ids, taken, *trace)  # type: ignore[arg-type]
