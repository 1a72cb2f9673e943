"""The random checkpoints that parity is shown on, each named after what it is there for.

`CASES` are compared with transformers as it patches by itself; `RULE_CASES` have a patching rule that it
lacks, so the lengths are given to it.
"""

from __future__ import annotations

from typing import Any

from .random_models import RandomModel, base_config

__all__ = ["CASES", "GREEDY_BYTES", "RULE_CASES", "RULE_GREEDY_BYTES"]

GREEDY_BYTES, RULE_GREEDY_BYTES = 256, 64
"""Lengths of the greedy texts of `CASES` and of `RULE_CASES`."""

_GQA = {"num_key_value_heads": 2}
_MQA = {"num_key_value_heads": 1}


def _linear(**more: Any) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": 2.0, **more}


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 8000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}


def _without(config: dict[str, Any], *paths: str) -> dict[str, Any]:
    """The config without these fields, each "field" or "section.field"."""
    for path in paths:
        *section, name = path.split(".")
        (config[section[0]] if section else config).pop(name)
    return config


CASES = (
    RandomModel("plain", base_config()),
    RandomModel(
        "gqa_everywhere_windows_16",
        base_config(
            patcher={**_GQA, "sliding_window": 16},
            encoder=_GQA,
            decoder=_GQA,
            global_stack=_GQA,
            local_attention_window_len=16,
        ),
        share=0.4,
        seed=1,
    ),
    RandomModel(
        "gqa_patcher_no_local_window",
        base_config(k=1, patcher=_MQA, global_width=48, local_attention_window_len=None),
        seed=2,
    ),
    RandomModel(
        "gqa_encoder_no_patcher_window",
        base_config(
            k=4,
            global_width=48,
            encoder=_GQA,
            patcher={"sliding_window": None},
            local_attention_window_len=16,
        ),
        seed=3,
    ),
    RandomModel(
        "gqa_global_encoder_3_layers_all_cross",
        base_config(
            k=1,
            encoder={"num_hidden_layers": 3, "cross_attn_all_layers": True},
            global_stack=_MQA,
            patcher={"sliding_window": 16},
        ),
        seed=4,
    ),
    RandomModel(
        "gqa_decoder_encoder_3_layers_one_cross",
        base_config(
            k=4,
            encoder={"num_hidden_layers": 3, "cross_attn_all_layers": False},
            decoder={**_MQA, "num_hidden_layers": 3, "cross_attn_all_layers": False},
        ),
        seed=100,
    ),
    RandomModel(
        "two_hash_functions",
        base_config(
            encoder_hash_byte_group_nb_functions=2,
            encoder_hash_byte_group_size=[2, 7],
            encoder_hash_byte_group_vocab=20011,
        ),
        seed=6,
    ),
    RandomModel(
        "long_hash_groups",
        base_config(encoder_hash_byte_group_size=[1, 13, 4], encoder_hash_byte_group_vocab=997),
        seed=7,
    ),
    RandomModel("every_byte_a_patch", base_config(global_stack=_GQA), share=1.0, seed=8),
    RandomModel("one_long_patch", base_config(k=4, decoder=_GQA), share=0.0, seed=9),
    RandomModel("few_patches", base_config(k=1, local_attention_window_len=16), share=0.03, seed=10),
    RandomModel(
        "rope_theta_beside",
        base_config(
            patcher={"rope_theta": 700.0},
            encoder={"rope_theta": 3000.0},
            decoder={"rope_theta": 90000.0},
            global_stack={"rope_theta": 50.0},
        ),
        seed=11,
    ),
    RandomModel(
        "rope_parameters",
        base_config(
            patcher={"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
            encoder={"rope_parameters": _linear(rope_theta=3000.0)},
            decoder={"rope_parameters": _LLAMA3},
            global_stack={"rope_parameters": {**_YARN, "beta_fast": 20.0, "beta_slow": 2.0}},
        ),
        seed=12,
    ),
    RandomModel(
        "rope_scaling",
        base_config(
            patcher={"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
            encoder={"rope_scaling": _YARN},
            decoder={"rope_scaling": {"rope_type": "default"}, "rope_theta": 900.0},
            global_stack={"rope_scaling": _LLAMA3, "rope_theta": 12.0},
        ),
        seed=53,
    ),
    RandomModel("tied_embeddings", base_config(tie_word_embeddings=True), seed=74),
    RandomModel(
        "other_activations",
        base_config(
            patcher={"hidden_act": "gelu", "rms_norm_eps": 1e-3},
            encoder={"hidden_act": "relu", "rms_norm_eps": 1e-2},
            decoder={"hidden_act": "gelu_pytorch_tanh"},
            global_stack={"hidden_act": "quick_gelu", "rms_norm_eps": 1e-6},
        ),
        seed=15,
    ),
    RandomModel(
        "fields_missing_bfloat16",
        _without(
            base_config(),
            "local_attention_window_len",
            "cross_attn_k",
            "encoder_hash_byte_group_nb_functions",
            "patcher_config.sliding_window",
            "encoder_config.intermediate_size",
        ),
        seed=16,
        dtype="bfloat16",
        prompt_bytes=300,
    ),
    RandomModel("no_patcher", base_config(patch_in_forward=False, global_stack=_GQA), share=None, seed=17),
)

RULE_CASES = (
    RandomModel("max_patch_length", base_config(max_patch_length=6), share=0.1, seed=20),
    RandomModel("max_patch_length_alone", base_config(max_patch_length=5), share=0.0, seed=21),
    RandomModel("monotonic", base_config(monotonicity=True), share=0.3, seed=22),
    RandomModel("threshold_add", base_config(patching_threshold_add=0.3), share=0.6, seed=23),
    RandomModel("space", base_config(patching_mode="space"), share=None, seed=24),
    RandomModel(
        "static_float16",
        base_config(patching_mode="static", patch_size=5),
        share=None,
        seed=25,
        dtype="float16",
    ),
)
