"""Configs of the released models' shapes, and smaller ones of the same form.

Sizes are those of the released checkpoints: 1B has 4.63 billion parameters, 66 % of them hash tables.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

__all__ = ["SHAPES", "scaled_config"]

_THRESHOLD = 1.335442066192627
_HEAD = 64
_GLOBAL_HEAD = 128


def _part(layers: int, heads: int, head_dim: int, intermediate: int, positions: int) -> dict[str, Any]:
    return {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }


def _config(
    patcher: dict[str, Any],
    encoder: dict[str, Any],
    latent: dict[str, Any],
    decoder: dict[str, Any],
    *,
    k: int,
    window: int,
    hash_vocab: int,
) -> dict[str, Any]:
    shared = {"cross_attn_k": k, "hidden_size_global": latent["hidden_size"], "vocab_size": 260}
    wide = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    narrow = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": 260,
        "max_position_embeddings": latent["max_position_embeddings"],
        "cross_attn_k": k,
        "local_attention_window_len": window,
        "encoder_hash_byte_group_size": [3, 4, 5, 6, 7, 8],
        "encoder_hash_byte_group_vocab": hash_vocab,
        "encoder_hash_byte_group_nb_functions": 1,
        "patch_in_forward": True,
        "patching_mode": "entropy",
        "patch_size": 4,
        "patching_threshold": _THRESHOLD,
        "tie_word_embeddings": False,
        "patcher_config": {**patcher, **narrow, "sliding_window": window, "vocab_size": 260},
        "encoder_config": {**encoder, **shared, **wide, "cross_attn_all_layers": False},
        "decoder_config": {**decoder, **shared, **wide, "cross_attn_all_layers": True},
        "global_config": {**latent, **wide},
    }


SHAPES: Mapping[str, dict[str, Any]] = {
    "blt-1b": _config(
        patcher=_part(14, 12, _HEAD, 2048, 8192),
        encoder=_part(1, 16, _HEAD, 2816, 24576),
        latent=_part(25, 16, _GLOBAL_HEAD, 5632, 4096),
        decoder=_part(9, 16, _HEAD, 2816, 24576),
        k=2,
        window=512,
        hash_vocab=500002,
    ),
    "blt-7b": _config(
        patcher=_part(14, 12, _HEAD, 2048, 8192),
        encoder=_part(1, 20, _HEAD, 3584, 24576),
        latent=_part(32, 32, _GLOBAL_HEAD, 11008, 4096),
        decoder=_part(6, 20, _HEAD, 3584, 24576),
        k=4,
        window=512,
        hash_vocab=500002,
    ),
    "tiny": _config(
        patcher=_part(2, 4, 16, 96, 8192),
        encoder=_part(1, 4, 16, 96, 24576),
        latent=_part(2, 4, 32, 192, 4096),
        decoder=_part(2, 4, 16, 96, 24576),
        k=2,
        window=64,
        hash_vocab=1009,
    ),
}
"""Raw Hugging Face configs by name: the released models and a toy of their form."""

_INTERMEDIATE_STEP = 32


def scaled_config(
    shape: str, *, layers_scale: float = 1.0, width_scale: float = 1.0, hash_vocab: int | None = None
) -> dict[str, Any]:
    """A config of one of `SHAPES` with fewer (or more) layers and heads in every part, and other hash tables.

    Heads keep their size, so widths follow; nothing falls below one layer or one head. Raises ValueError
    for an unknown shape or a factor that is not positive.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r}: allowed are {', '.join(SHAPES)}")
    if not (0 < layers_scale < 1000 and 0 < width_scale < 1000):
        raise ValueError(f"scales must be above 0 and below 1000, got {layers_scale} and {width_scale}")
    config = copy.deepcopy(SHAPES[shape])
    for name in ("patcher_config", "encoder_config", "decoder_config", "global_config"):
        part = config[name]
        head_dim = part["hidden_size"] // part["num_attention_heads"]
        heads = max(1, round(part["num_attention_heads"] * width_scale))
        steps = max(1, round(part["intermediate_size"] * width_scale / _INTERMEDIATE_STEP))
        part["num_hidden_layers"] = max(1, round(part["num_hidden_layers"] * layers_scale))
        part["num_attention_heads"] = part["num_key_value_heads"] = heads
        part["hidden_size"] = heads * head_dim
        part["intermediate_size"] = steps * _INTERMEDIATE_STEP
    for name in ("encoder_config", "decoder_config"):
        config[name]["hidden_size_global"] = config["global_config"]["hidden_size"]
    if hash_vocab is not None:
        config["encoder_hash_byte_group_vocab"] = hash_vocab
    return config
