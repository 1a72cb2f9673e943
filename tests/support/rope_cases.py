"""Rotary embeddings of every type, spelled in every way, and where transformers' tables of them are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blt_edge.graphs.config import ModelConfig, TransformerConfig

from .goldens import FOLDER

__all__ = ["EXAMPLES", "PARTS", "raw_config", "read_tables", "stack_of", "write_tables"]

PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")
"""The sections of a `config.json`."""

_FILE = FOLDER / "rope.json"
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}

EXAMPLES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "defaults": ("patcher_config", 64, {}),
    "defaults of a local part": ("encoder_config", 64, {}),
    "theta beside": ("decoder_config", 32, {"rope_theta": 700.0}),
    "linear": (
        "global_config",
        128,
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 12345.6}},
    ),
    "llama3": (
        "encoder_config",
        128,
        {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8192, **_LLAMA3}},
    ),
    "llama3, own positions": (
        "global_config",
        64,
        {"max_position_embeddings": 2000, "rope_parameters": {"rope_type": "llama3", **_LLAMA3}},
    ),
    "yarn": ("decoder_config", 64, {"rope_scaling": _YARN, "rope_theta": 1e6}),
    "yarn, factor from positions": (
        "global_config",
        128,
        {"max_position_embeddings": 40000, "rope_parameters": {**_YARN, "factor": None}},
    ),
    "yarn, all its fields": (
        "patcher_config",
        64,
        {
            "rope_scaling": {
                **_YARN,
                "beta_fast": 20.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 0.9,
            }
        },
    ),
    "yarn, not truncated": (
        "encoder_config",
        6,
        {"rope_parameters": {**_YARN, "truncate": False, "attention_factor": 0.5}},
    ),
}
"""By name: a part of the model, the size of its heads, and what its config says of positions."""


def stack_of(config: ModelConfig, section: str) -> TransformerConfig | None:
    """What a section of a `config.json` became."""
    stacks = (config.patcher, config.encoder, config.decoder, config.global_stack)
    return dict(zip(PARTS, stacks, strict=True))[section]


def raw_config(section: str, head_dim: int, part: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` whose part `section` has two heads of this size, and these fields."""
    raw: dict[str, Any] = {"model_type": "blt", "patcher_config": {}, "global_config": {}}
    two_heads = {"hidden_size": 2 * head_dim, "num_attention_heads": 2}
    raw["encoder_config"], raw["decoder_config"] = dict(two_heads), dict(two_heads)
    raw[section] = {**two_heads, **part}
    raw["decoder_config"]["hidden_size_global"] = raw["global_config"].get("hidden_size", 2048)
    return raw


def write_tables() -> Path:
    """Write transformers' inverse frequencies and factor of each example."""
    import transformers
    from transformers.models.blt.modeling_blt import BltRotaryEmbedding

    tables = {}
    for name, (section, head_dim, part) in EXAMPLES.items():
        # through JSON, as a file is: transformers changes rope dicts in place
        config = transformers.BltConfig(**json.loads(json.dumps(raw_config(section, head_dim, part))))
        theirs = BltRotaryEmbedding(getattr(config, section))
        tables[name] = {
            "inverse_frequencies": theirs.inv_freq.tolist(),
            "scale": float(theirs.attention_scaling),
        }
    _FILE.write_text(json.dumps(tables) + "\n")
    return _FILE


def read_tables() -> dict[str, dict[str, Any]]:
    """By example: "inverse_frequencies" and "scale"."""
    tables: dict[str, dict[str, Any]] = json.loads(_FILE.read_text())
    return tables
