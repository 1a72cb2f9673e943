"""Meta's `args` and `params.json` as a Hugging Face config, with the meaning Meta's code gives them.

Fields of training, logging and kernels are ignored; those that would change what the model computes are
checked against the one value that the graphs implement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..graphs._fields import ConfigError, show

__all__ = ["huggingface_config", "needs_entropy_model"]

_ONLY: Mapping[str, Any] = {
    "use_rope": True,
    "non_linearity": "swiglu",
    "norm_type": "rmsnorm",
    "pre_norm": True,
    "norm_affine": True,
    "alpha_depth": "disabled",
    "cross_attn_encoder": True,
    "cross_attn_decoder": True,
    "cross_attn_init_by_pooling": True,
    "downsampling_by_pooling": "max",
    "encoder_enable_byte_ngrams": False,
    "tokenize_with_bpe_delimiter": False,
    "pm_size": 0,
}
_UNSET = (
    "cross_attn_window_encoder",
    "cross_attn_window_decoder",
    "global_local_decoder_residual_layer",
    "conv_kernel_size",
)
_PATCHER_WINDOW = 512
"""The window that Meta's loader gives every entropy model, whatever its params say."""


def needs_entropy_model(args: Mapping[str, Any]) -> bool:
    """Whether the main model's patches depend on entropies.

    The mode is that of the main model; an entropy model's own `patcher_args` tell how it was trained,
    "byte" in the released ones.
    """
    return (args.get("patching_mode") or "entropy") == "entropy"


def huggingface_config(
    args: Mapping[str, Any], params: Mapping[str, Any] | None, gate_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The raw config, in the form of transformers' `config.json`, of a checkpoint in Meta's layout.

    `params` is the entropy model's `params.json`, None where there is none. `gate_shapes` maps the Hugging
    Face names of the feed-forward's gate projections to their shapes: their rows are the intermediate size,
    which Meta's fields imply only through several roundings. Raises `ConfigError` for a field that is
    missing or has a value that the graphs do not implement.
    """
    _check_supported(args)
    config: dict[str, Any] = {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": args.get("vocab_size", 260),
        "tie_word_embeddings": False,
        "cross_attn_k": _need(args, "cross_attn_k"),
        # a missing window means the released models' one; null is none, as in Meta's code
        "local_attention_window_len": args.get("local_attention_window_len", 512),
        "encoder_hash_byte_group_size": _group_sizes(args),
        "encoder_hash_byte_group_vocab": args.get("encoder_hash_byte_group_vocab", 30000),
        "encoder_hash_byte_group_nb_functions": args.get("encoder_hash_byte_group_nb_functions", 3),
        "encoder_config": _local(args, "encoder", gate_shapes),
        "decoder_config": _local(args, "decoder", gate_shapes),
        "global_config": _global(args, gate_shapes),
        **_patching(args, _section(_section(params or {}, "data"), "patcher_args")),
    }
    if params is not None:
        config["patcher_config"] = _patcher(_section(params, "entropy_model"), gate_shapes)
    return config


def _check_supported(args: Mapping[str, Any]) -> None:
    layers = args.get("n_layers_local_encoder")
    if args.get("cross_attn_all_layers_encoder") and layers != 1:
        raise ConfigError(
            f"args.cross_attn_all_layers_encoder: got true with {show(layers)} encoder layers, allowed: one, "
            "as Meta's code carries patch states from layer to layer"
        )
    for name, allowed in _ONLY.items():
        value = args.get(name)
        if value is not None and value != allowed:
            raise ConfigError(f"args.{name}: got {show(value)}, allowed: {allowed!r}")
    for name in _UNSET:
        if args.get(name) is not None:
            raise ConfigError(f"args.{name}: got {show(args[name])}, allowed: null")
    for side in ("encoder", "decoder"):
        heads = _need(args, f"n_heads_local_{side}")
        for name in ("cross_attn_nheads", "n_kv_heads"):
            if args.get(name) not in (None, heads):
                raise ConfigError(
                    f"args.{name}: got {show(args[name])}, allowed: n_heads_local_{side}, {show(heads)}, as "
                    "cross-attention shares its heads with self-attention here"
                )


def _local(args: Mapping[str, Any], side: str, gate_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "vocab_size": args.get("vocab_size", 260),
        "cross_attn_all_layers": bool(args.get(f"cross_attn_all_layers_{side}", False)),
        "cross_attn_k": _need(args, "cross_attn_k"),
        "hidden_size_global": _need(args, "dim_global"),
        "hidden_size": _need(args, f"dim_local_{side}"),
        "num_attention_heads": _need(args, f"n_heads_local_{side}"),
        "num_hidden_layers": _need(args, f"n_layers_local_{side}"),
        "max_position_embeddings": args.get("max_encoder_seq_length") or _need(args, "max_seqlen"),
        **_common(args, f"model.local_{side}", gate_shapes),
    }


def _global(args: Mapping[str, Any], gate_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "hidden_size": _need(args, "dim_global"),
        "num_attention_heads": _need(args, "n_heads_global"),
        "num_key_value_heads": args.get("n_kv_heads_global"),
        "num_hidden_layers": _need(args, "n_layers_global"),
        "max_position_embeddings": _need(args, "max_seqlen"),
        **_common(args, "model.global_transformer", gate_shapes),
    }


def _patcher(model: Mapping[str, Any], gate_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    window = model.get("sliding_window")
    return {
        "vocab_size": model.get("vocab_size", 260),
        "hidden_size": _need(model, "dim", "entropy_model"),
        "num_attention_heads": _need(model, "n_heads", "entropy_model"),
        "num_key_value_heads": model.get("n_kv_heads"),
        "num_hidden_layers": _need(model, "n_layers", "entropy_model"),
        "max_position_embeddings": _need(model, "max_seqlen", "entropy_model"),
        "sliding_window": _PATCHER_WINDOW if window is None else window,
        **_common(model, "model.patcher", gate_shapes),
    }


def _common(
    fields: Mapping[str, Any], prefix: str, gate_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """What every part has. `head_dim` is passed on so that one that differs from width / heads is refused."""
    common = {
        "rms_norm_eps": fields.get("norm_eps", 1e-5),
        "rope_theta": fields.get("rope_theta", 10000.0),
        "hidden_act": "silu",
    }
    if fields.get("head_dim") is not None:
        common["head_dim"] = fields["head_dim"]
    shape = gate_shapes.get(f"{prefix}.layers.0.mlp.gate_proj.weight")
    if shape:
        common["intermediate_size"] = shape[0]
    return common


def _patching(args: Mapping[str, Any], patcher_args: Mapping[str, Any]) -> dict[str, Any]:
    """The patching rule: mode and flags of the main model, its threshold or the one beside the entropy
    model.
    """
    threshold, beside = args.get("patching_threshold"), patcher_args.get("threshold")
    if threshold is not None and beside is not None and threshold != beside:
        raise ConfigError(
            f"args.patching_threshold: got {show(threshold)}, but entropy_model/params.json says "
            f"{show(beside)}; make them the same"
        )
    size = args.get("patch_size") or patcher_args.get("patch_size")
    mode = args.get("patching_mode") or "entropy"
    if mode != "static":
        size = None  # a mean or a leftover there, often a fraction
    elif isinstance(size, float) and size.is_integer():
        size = int(size)
    return {
        "patch_in_forward": True,
        "patching_mode": mode,
        "patching_threshold": beside if threshold is None else threshold,
        "patching_threshold_add": _either(args, "patching_threshold_add", patcher_args, "threshold_add"),
        "monotonicity": _either(args, "monotonicity", patcher_args, "monotonicity") or False,
        "max_patch_length": _either(args, "max_patch_length", patcher_args, "max_patch_length"),
        **({} if size is None else {"patch_size": size}),
    }


def _either(first: Mapping[str, Any], name: str, second: Mapping[str, Any], other: str) -> Any:
    value = first.get(name)
    return second.get(other) if value is None else value


def _group_sizes(args: Mapping[str, Any]) -> Any:
    """A list, or Meta's other spelling, "3,4,5"; a model without hash embeddings is refused."""
    sizes = args.get("encoder_hash_byte_group_size")
    if isinstance(sizes, str):
        try:
            sizes = [int(size) for size in sizes.split(",") if size.strip()]
        except ValueError as error:
            raise ConfigError(
                f"args.encoder_hash_byte_group_size: got {show(sizes)}, allowed: integers and commas"
            ) from error
    if not sizes:
        raise ConfigError("args.encoder_hash_byte_group_size: got none, allowed: at least one group size")
    return sizes


def _need(fields: Mapping[str, Any], name: str, where: str = "args") -> Any:
    if fields.get(name) is None:
        raise ConfigError(f"{where}.{name}: missing, and it has no default")
    return fields[name]


def _section(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"entropy_model/params.json: {name} is not a JSON object")
    return value
