"""The model's shape and rules as frozen dataclasses, parsed from a Hugging Face `config.json`.

The defaults and the meaning of every field are those of transformers' `BltConfig` (5.23) and its sub-configs;
what it reads but never uses is accepted, what would change the computation in a way the graphs don't know is
refused by name. Knows no files and no weights.

Two things go beyond transformers, which patches by entropy alone and makes every byte a patch otherwise:
`patching_mode` "space", "static" and "byte", and the fields `monotonicity` and `patching_threshold_add`, mean
Meta's rules (a false or zero value is off). `patch_in_forward: false` makes every byte a patch, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.hashing import HashSpec
from ..runtime.names import PATCHING_MODES
from ..runtime.patching import PatchingRule
from .fields import ConfigError, ConfigFields
from .rope import ROPE_TYPES, RopeConfig

__all__ = ["ACTIVATIONS", "ConfigError", "ModelConfig", "RopeConfig", "TransformerConfig", "parse_config"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that transformers reads or stores but that never change what a BLT computes. Anything else that is
# unknown and switched on is refused, since it may matter.
_IGNORED_ANYWHERE = _names(
    """
    architectures auto_map dtype torch_dtype transformers_version model_type base_model_type _name_or_path
    name_or_path _commit_hash id2label label2id num_labels problem_type finetuning_task tokenizer_class
    prefix task_specific_params keys_to_ignore_at_inference return_dict output_hidden_states
    output_attentions torchscript use_bfloat16 initializer_range dropout gradient_checkpointing use_cache
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    tie_last_hidden_states chunk_size_feed_forward pruned_heads attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id sliding_window
    rope_parameters rope_scaling rope_theta partial_rotary_factor
    """
    # transformers drops these from a config: they belong to generation_config.json
    """
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """
    # written by the converter from Meta's checkpoints; none is read by transformers' model
    "norm_eps attn_impl attn_bias_type realtime_patching patching_device patching_batch_size"
    # written by other converters and by tools for fine-tuning; nor are these
    " original_spec attention_dropout hidden_dropout activation_dropout classifier_dropout pretraining_tp"
    " unsloth_fixed unsloth_version transformers.js_config"
)
_IGNORED_AT_TOP = _IGNORED_ANYWHERE | {"max_position_embeddings"}
# Windows and ties come from the top level, the projection's size from the other widths.
_IGNORED_IN_PART = _IGNORED_ANYWHERE | _names(
    "vocab_size tie_word_embeddings encoder_cross_output_size original_max_position_embeddings"
)
# The encoder's copy of the global width is not used; the decoder's is.
_IGNORED_IN_ENCODER = _IGNORED_IN_PART | {"hidden_size_global"}
# Rope parameters of one type may stay behind in a config of another.
_IGNORED_IN_ROPE = _names(
    """
    factor original_max_position_embeddings low_freq_factor high_freq_factor attention_factor beta_fast
    beta_slow mscale mscale_all_dim truncate short_factor long_factor type
    """
)

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "linear",
}
"""`hidden_act` values that are accepted -> the function each names: silu x*sigmoid(x); gelu with erf;
gelu_tanh 0.5x(1 + tanh(sqrt(2/pi)(x + 0.044715x^3))); quick_gelu x*sigmoid(1.702x); relu; relu2 its square;
sigmoid; tanh; linear x."""

_VOCAB = 260
_MAX_WIDTH = 65536
_MAX_LAYERS = 1000
_MAX_TRAINED = 4096
_DEFAULT_GROUPS = (3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class TransformerConfig:
    """One stack of transformer layers: patcher, encoder, global or decoder."""

    width: int
    """Features of a state (`hidden_size`)."""
    layers: int
    heads: int
    """Query heads of self-attention and, in encoder and decoder, of cross-attention."""
    kv_heads: int
    """Key and value heads, a divisor of `heads`."""
    head_dim: int
    """Features of a head: width // heads, always even."""
    intermediate: int
    """Features between the feed-forward's projections."""
    norm_eps: float
    """Added to the mean square in every RMSNorm of this part."""
    activation: str
    """The feed-forward's gate function, one of the values of `ACTIVATIONS`."""
    rope: RopeConfig
    window: int | None
    """Keys a query sees, itself included. None: all earlier ones."""
    max_positions: int
    """Positions the part was made for: bytes, or patches in the global stack."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything the graphs, the tables and the patching rule need to know of a BLT."""

    vocab_size: int
    """Rows of the byte embedding and classes of both heads: always 260."""
    patcher: TransformerConfig | None
    """The entropy model. None where the patching rule needs no entropies."""
    encoder: TransformerConfig
    global_stack: TransformerConfig
    decoder: TransformerConfig
    cross_attn_k: int
    """Vectors a patch is pooled into, and that a byte reads in the decoder."""
    encoder_cross_all_layers: bool
    """One pooling cross-attention per encoder layer is stored (the last counts), instead of one in all."""
    decoder_cross_all_layers: bool
    """Cross-attention before every decoder layer, instead of before the first only."""
    token_projection: bool
    """k * encoder width differs from the global width, so a projection stands between."""
    hash: HashSpec
    patching: PatchingRule
    tie_word_embeddings: bool
    """The byte embedding is `lm_head.weight`, and is not stored under its own name."""
    trained_context: int
    """Bytes of text that the model saw at once in training; the windows of scoring."""


@dataclass(frozen=True)
class _Defaults:
    width: int
    layers: int
    heads: int
    intermediate: int | None
    theta: float
    positions: int


_PATCHER_DEFAULTS = _Defaults(768, 14, 12, 2048, 10000.0, 8192)
_ENCODER_DEFAULTS = _Defaults(1024, 1, 16, None, 500000.0, 24576)
_GLOBAL_DEFAULTS = _Defaults(2048, 25, 16, 5632, 500000.0, 4096)
_DECODER_DEFAULTS = _Defaults(1024, 9, 16, 2816, 500000.0, 24576)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`.

    Raises `ConfigError`, with the field's path, for another model type, a malformed, contradictory or
    unsupported value, and an unknown field that is switched on.
    """
    top = ConfigFields(raw)
    if top.raw("model_type") != "blt":
        raise top.refuse("model_type", "blt, the type of transformers' BltForCausalLM")
    _check_vocabulary(top)
    if top.raw("quantization_config"):
        raise top.refuse("quantization_config", "none; export the model that this one was quantized from")
    window = top.optional_integer("local_attention_window_len", 512)
    k = top.integer("cross_attn_k", 2, maximum=64)
    rule = _patching(top)
    # 1. The parts. The patcher's activation counts too, though transformers declares it silu.
    encoder_fields, decoder_fields = top.section("encoder_config"), top.section("decoder_config")
    encoder = _part(encoder_fields, _ENCODER_DEFAULTS, window)
    decoder = _part(decoder_fields, _DECODER_DEFAULTS, window)
    global_fields, patcher_fields = top.section("global_config"), top.section("patcher_config")
    global_stack = _part(global_fields, _GLOBAL_DEFAULTS, None)
    _check_vocabulary(patcher_fields)
    patcher = _part(patcher_fields, _PATCHER_DEFAULTS, patcher_fields.optional_integer("sliding_window", 512))
    patcher_fields.refuse_unknown(_IGNORED_IN_PART)
    # 2. The whole.
    used = [encoder, decoder, patcher] if rule.needs_entropy else [encoder, decoder]
    longest = min(part.max_positions for part in used)
    config = ModelConfig(
        vocab_size=_VOCAB,
        patcher=patcher if rule.needs_entropy else None,
        encoder=encoder,
        global_stack=global_stack,
        decoder=decoder,
        cross_attn_k=k,
        encoder_cross_all_layers=encoder_fields.boolean("cross_attn_all_layers", False),
        decoder_cross_all_layers=decoder_fields.boolean("cross_attn_all_layers", True),
        token_projection=k * encoder.width != global_stack.width,
        hash=_hashing(top),
        patching=rule,
        tie_word_embeddings=top.boolean("tie_word_embeddings", False),
        # A field of ours; without it the shortest of the parts that see bytes, and 4096 at most.
        trained_context=top.optional_integer("trained_context", maximum=longest)
        or min(_MAX_TRAINED, longest),
    )
    # 3. What contradicts each other, or is not known.
    for part in (encoder_fields, decoder_fields):
        if part.integer("cross_attn_k", 2) != k:
            raise part.refuse("cross_attn_k", f"the top-level cross_attn_k, {k}")
    _check_vocabulary(encoder_fields)
    if decoder.width != encoder.width:
        raise decoder_fields.refuse("hidden_size", f"encoder_config.hidden_size, {encoder.width}")
    if decoder_fields.integer("hidden_size_global", 2048) != global_stack.width:
        raise decoder_fields.refuse("hidden_size_global", f"global_config.hidden_size, {global_stack.width}")
    top.refuse_unknown(_IGNORED_AT_TOP)
    encoder_fields.refuse_unknown(_IGNORED_IN_ENCODER)
    for fields in (decoder_fields, global_fields):
        fields.refuse_unknown(_IGNORED_IN_PART)
    return config


def _check_vocabulary(fields: ConfigFields) -> None:
    fields.integer("vocab_size", _VOCAB, minimum=_VOCAB, maximum=_VOCAB)


def _part(part: ConfigFields, defaults: _Defaults, window: int | None) -> TransformerConfig:
    width = part.integer("hidden_size", defaults.width, maximum=_MAX_WIDTH)
    heads = part.integer("num_attention_heads", defaults.heads, maximum=_MAX_WIDTH)
    head_dim = width // heads
    if width % heads or head_dim % 2:
        allowed = f"divisors of hidden_size {width} that leave an even head size"
        raise part.refuse("num_attention_heads", allowed)
    if part.has("head_dim") and part.integer("head_dim") != head_dim:
        raise part.refuse("head_dim", f"only hidden_size // num_attention_heads = {head_dim}")
    # 0 means "not given" for these two, as in transformers
    kv_heads = part.optional_integer("num_key_value_heads", minimum=0, maximum=_MAX_WIDTH) or heads
    if heads % kv_heads:
        raise part.refuse("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    intermediate = part.optional_integer(
        "intermediate_size", defaults.intermediate, minimum=0, maximum=16 * _MAX_WIDTH
    )
    return TransformerConfig(
        width=width,
        layers=part.integer("num_hidden_layers", defaults.layers, maximum=_MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate or int(8 * width / 3),
        norm_eps=part.number("rms_norm_eps", 1e-5, above=0.0, below=1.0),
        activation=ACTIVATIONS[part.choice("hidden_act", ACTIVATIONS, "silu")],
        rope=_rope(part, defaults.theta),
        window=window,
        max_positions=part.integer("max_position_embeddings", defaults.positions),
    )


def _rope(part: ConfigFields, default_theta: float) -> RopeConfig:
    """Rotary embedding in either spelling: `rope_scaling`, unless empty, replaces `rope_parameters` whole."""
    parameters, scaling = part.section("rope_parameters"), part.section("rope_scaling")
    source = scaling if part.raw("rope_scaling") else parameters
    beside = part.optional_number("rope_theta", above=1.0) or default_theta
    spelling = "type" if source.has("type") and not source.has("rope_type") else "rope_type"
    rope_type = source.choice(spelling, ROPE_TYPES, "default")
    theta = source.optional_number("rope_theta", above=1.0) or beside
    for holder in (source, part):
        share = holder.optional_number("partial_rotary_factor", above=0.0)
        if rope_type != "default" and share not in (None, 1.0):
            raise holder.refuse("partial_rotary_factor", f"1.0 with rope type {rope_type}")
    source.refuse_unknown(_IGNORED_IN_ROPE)
    if rope_type == "default":
        return RopeConfig(rope_type, theta)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, source.number("factor", above=0.0))
    # transformers lets a field beside the rope parameters win over the one inside
    holder = part if part.has("original_max_position_embeddings") else source
    original = holder.optional_integer("original_max_position_embeddings")
    if rope_type == "llama3":
        low = source.number("low_freq_factor", above=0.0)
        high = source.number("high_freq_factor", above=low)
        factor = source.number("factor", above=0.0)
        return RopeConfig(rope_type, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    if "factor" not in source:
        raise ConfigError(f"{source.path('factor')}: missing, rope type {rope_type} needs it")
    positive = ("factor", "attention_factor", "beta_fast", "beta_slow")
    return RopeConfig(
        rope_type,
        theta,
        original_max_positions=original,
        **{name: source.optional_number(name, above=0.0) for name in positive},
        **{name: source.optional_number(name) for name in ("mscale", "mscale_all_dim")},
        truncate=source.boolean("truncate", True),
    )


def _hashing(top: ConfigFields) -> HashSpec:
    sizes = top.integers("encoder_hash_byte_group_size", minimum=1, maximum=64, longest=64)
    return HashSpec(
        group_sizes=sizes or _DEFAULT_GROUPS,
        functions=top.integer("encoder_hash_byte_group_nb_functions", 1, maximum=64),
        vocab=top.integer("encoder_hash_byte_group_vocab", 500002),
    )


def _patching(top: ConfigFields) -> PatchingRule:
    mode = top.choice("patching_mode", PATCHING_MODES, "entropy")
    if not top.boolean("patch_in_forward", True):
        mode = "byte"
    threshold = top.optional_number("patching_threshold", 1.335442066192627)
    threshold_add = top.optional_number("patching_threshold_add") or None
    monotonic = top.boolean("monotonicity", False)
    longest = top.optional_integer("max_patch_length")
    size = top.optional_integer("patch_size", 4)
    if mode == "entropy" and threshold is None:
        raise top.refuse("patching_threshold", "a number; without one, boundaries depend on later bytes")
    if mode in ("entropy", "static") and size is None:
        raise top.refuse("patch_size", "a positive integer; null is non-causal patching")
    entropy = mode == "entropy"
    return PatchingRule(
        mode=mode,
        threshold=threshold if entropy else None,
        threshold_add=threshold_add if entropy and not monotonic else None,
        monotonic=monotonic and entropy,
        max_patch_length=longest if mode != "byte" else None,
        patch_size=size if mode == "static" else None,
    )
