"""Turn weights of one layout into the other's names, Hugging Face's and Meta's, for tests.

Nothing is computed: both store the same matrices, and both rotate interleaved pairs. Only the hash tables are
joined in one layout and apart in the other. The main model and the entropy model are separate files in
Meta's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from blt_edge.export.checkpoint_base import HASH_EMBEDDING
from numpy.typing import NDArray

__all__ = ["MetaWeights", "to_huggingface", "to_meta"]

Array = NDArray[Any]

_PAIRS = (
    ("self_attn", "attention"),
    ("mlp", "feed_forward"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("embed_tokens", "tok_embeddings"),
    ("q_norm", "cross_attn_norm_q"),
    ("k_norm", "cross_attn_norm_kv"),
    ("gate_proj", "w1"),
    ("up_proj", "w3"),
    ("down_proj", "w2"),
    ("q_proj", "wq"),
    ("k_proj", "wk"),
    ("v_proj", "wv"),
    ("o_proj", "wo"),
    ("lm_head", "output"),
)
_META = dict(_PAIRS)
_HUGGINGFACE = {meta: name for name, meta in _PAIRS}
_PATCHER = "model.patcher."
_TABLE = "encoder_hash_tok_embedding"


class MetaWeights(NamedTuple):
    """The two state dicts of Meta's layout."""

    main: dict[str, Array]
    entropy: dict[str, Array]


def to_meta(tensors: Mapping[str, Array], tables: int) -> MetaWeights:
    """Meta's names for a Hugging Face state dict; the fused hash table is cut into `tables` equal ones."""
    result = MetaWeights({}, {})
    for name, tensor in tensors.items():
        if name == HASH_EMBEDDING:
            for index, table in enumerate(np.split(tensor, tables)):
                result.main[f"{_TABLE}.{index}.weight"] = table
        elif name == "lm_head.weight":
            result.main["local_decoder.output.weight"] = tensor
        elif name.startswith(_PATCHER):
            result.entropy[_rename(name.removeprefix(_PATCHER), _META)] = tensor
        else:
            result.main[_rename(name.removeprefix("model."), _META)] = tensor
    return result


def to_huggingface(weights: MetaWeights) -> dict[str, Array]:
    """Hugging Face names for Meta's two state dicts, the hash tables joined in order."""
    result: dict[str, Array] = {}
    tables: dict[int, Array] = {}
    for name, tensor in weights.main.items():
        if name.startswith(f"{_TABLE}."):
            tables[int(name.split(".")[1])] = tensor
        elif name == "local_decoder.output.weight":
            result["lm_head.weight"] = tensor
        else:
            result[f"model.{_rename(name, _HUGGINGFACE)}"] = tensor
    for name, tensor in weights.entropy.items():
        result[_PATCHER + _rename(name, _HUGGINGFACE)] = tensor
    result[HASH_EMBEDDING] = np.concatenate([tables[index] for index in sorted(tables)])
    return result


def _rename(name: str, names: Mapping[str, str]) -> str:
    return ".".join(names.get(part, part) for part in name.split("."))
