"""Which tensors a model must have, by Hugging Face name, and how many parameters each part of it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..graphs.config import ModelConfig, TransformerConfig
from .checkpoint_base import Checkpoint, CheckpointError, one_line

__all__ = ["EMBEDDING", "HASH_EMBEDDING", "PARTS", "check_tensors", "expected_tensors", "parameter_counts"]

PARTS = ("patcher", "encoder", "latent", "decoder", "tables")
"""The parts of a bundle that hold weights: the four stages, and the byte and hash embedding tables."""

EMBEDDING = "model.local_encoder.embed_tokens.weight"
"""The byte embedding, [260, encoder width]."""
HASH_EMBEDDING = "model.encoder_hash_tok_embedding.weight"
"""The fused hash tables, [tables * hash vocab, encoder width]."""

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this config has -> its shape.

    Linear weights are [out, in]. A tied byte embedding is listed under both names.
    """
    k, vocab = config.cross_attn_k, config.vocab_size
    encoder, decoder, global_stack = config.encoder, config.decoder, config.global_stack
    result: dict[str, Shape] = {
        EMBEDDING: (vocab, encoder.width),
        HASH_EMBEDDING: (config.hash.tables * config.hash.vocab, encoder.width),
    }
    if config.patcher is not None:
        width = config.patcher.width
        result["model.patcher.embed_tokens.weight"] = (vocab, width)
        result.update(_stack("model.patcher", config.patcher))
        result["model.patcher.norm.weight"] = (width,)
        result["model.patcher.lm_head.weight"] = (vocab, width)
    result.update(_stack("model.local_encoder", encoder))
    result["model.local_encoder.patch_embedding_projection.weight"] = (k * encoder.width, encoder.width)
    pooling_layers = encoder.layers if config.encoder_cross_all_layers else 1
    result.update(_cross_attention("model.local_encoder", encoder, pooling_layers))
    if config.token_projection:
        result["model.global_transformer.token_embedding_projection.weight"] = (
            global_stack.width,
            k * encoder.width,
        )
    result.update(_stack("model.global_transformer", global_stack))
    result["model.local_decoder.patch_embedding_projection.weight"] = (k * decoder.width, global_stack.width)
    reading_layers = decoder.layers if config.decoder_cross_all_layers else 1
    result.update(_cross_attention("model.local_decoder", decoder, reading_layers))
    result.update(_stack("model.local_decoder", decoder))
    result["model.local_decoder.norm.weight"] = (decoder.width,)
    result["lm_head.weight"] = (vocab, decoder.width)
    return result


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters of each of `PARTS`; a model without a patcher has none there.

    The pooling and what the decoder computes once per patch (its projection of the patch, keys and values)
    count as latent. Pooling layers that are stored but never count in the result are left out.
    """
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in expected_tensors(config).items():
        part = _part(name, config)
        if part is not None:
            counts[part] += math.prod(shape)
    return counts


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compare names, shapes and types with the config before anything is written.

    Raises `CheckpointError` naming the first tensor that is missing, misshapen, of another type than float16,
    bfloat16 and float32, or unknown (a weight that the graphs would silently leave out).
    """
    expected = expected_tensors(config)
    found = set(checkpoint.names())
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.name}: tensor {missing[0]} is missing{more}; its config asks for it"
        )
    for name, shape in expected.items():
        got = checkpoint.shape(name)
        if got != shape:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name} has shape {list(got)}, its config asks for {list(shape)}"
            )
        checkpoint.dtype(name)
    for name in sorted(found - expected.keys()):
        if not _may_stay_behind(name, config):
            raise CheckpointError(
                f"{checkpoint.name}: tensor {one_line(name)} is not part of the BLT that its config describes"
            )


def _stack(prefix: str, stack: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    width, kv_width = stack.width, stack.kv_heads * stack.head_dim
    for layer in range(stack.layers):
        base = f"{prefix}.layers.{layer}"
        yield f"{base}.input_layernorm.weight", (width,)
        for projection, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
            yield f"{base}.self_attn.{projection}_proj.weight", (rows, width)
        yield f"{base}.post_attention_layernorm.weight", (width,)
        yield f"{base}.mlp.gate_proj.weight", (stack.intermediate, width)
        yield f"{base}.mlp.up_proj.weight", (stack.intermediate, width)
        yield f"{base}.mlp.down_proj.weight", (width, stack.intermediate)


def _cross_attention(prefix: str, stack: TransformerConfig, layers: int) -> Iterator[tuple[str, Shape]]:
    width, kv_width = stack.width, stack.kv_heads * stack.head_dim
    for layer in range(layers):
        base = f"{prefix}.cross_attn_layers.{layer}"
        for projection, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
            yield f"{base}.{projection}_proj.weight", (rows, width)
        yield f"{base}.q_norm.weight", (width,)
        yield f"{base}.k_norm.weight", (width,)


_PER_PATCH = ("patch_embedding_projection.weight", "k_norm.weight", "k_proj.weight", "v_proj.weight")


def _part(name: str, config: ModelConfig) -> str | None:
    """The part of a bundle that a tensor goes to; None for one that does not affect the output."""
    if name in (EMBEDDING, HASH_EMBEDDING):
        return "tables"
    if name.startswith("model.patcher."):
        return "patcher"
    if name.startswith("model.local_encoder.cross_attn_layers."):
        last = config.encoder.layers - 1 if config.encoder_cross_all_layers else 0
        return "latent" if name.split(".")[3] == str(last) else None
    if name == "model.local_encoder.patch_embedding_projection.weight":
        return "latent"
    if name.startswith("model.local_encoder."):
        return "encoder"
    if name.startswith("model.global_transformer."):
        return "latent"
    crossing = "cross_attn_layers" in name or "patch_embedding_projection" in name
    return "latent" if crossing and name.endswith(_PER_PATCH) else "decoder"


def _may_stay_behind(name: str, config: ModelConfig) -> bool:
    """What no reference implementation reads either: rotary buffers and a decoder's embedding, which old
    versions stored, and a patcher that the patching rule does not ask.
    """
    if name.endswith(".rotary_emb.inv_freq") or name == "model.local_decoder.embed_tokens.weight":
        return True
    return config.patcher is None and name.startswith("model.patcher.")
