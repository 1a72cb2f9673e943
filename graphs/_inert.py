"""Config fields that transformers reads or stores but that never change what a BLT computes.

Anything else that is unknown and switched on is refused, since it may matter.
"""

from __future__ import annotations

__all__ = ["INERT", "INERT_ENCODER", "INERT_PART", "INERT_ROPE"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BOOKKEEPING = _names(
    """
    architectures auto_map dtype torch_dtype transformers_version model_type base_model_type _name_or_path
    name_or_path _commit_hash id2label label2id num_labels problem_type finetuning_task tokenizer_class
    prefix task_specific_params keys_to_ignore_at_inference return_dict output_hidden_states
    output_attentions torchscript use_bfloat16 initializer_range dropout gradient_checkpointing use_cache
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    tie_last_hidden_states chunk_size_feed_forward pruned_heads attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    """
)
# transformers drops these from a config: they belong to generation_config.json
_GENERATION = _names(
    """
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """
)
# written by the converter from Meta's checkpoints; none is read by transformers' model
_CONVERTED = _names("norm_eps attn_impl attn_bias_type realtime_patching patching_device patching_batch_size")
_ROPE = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"})

INERT = _BOOKKEEPING | _GENERATION | _CONVERTED | _ROPE | {"max_position_embeddings", "sliding_window"}
"""Top level. The rope fields there belong to no part."""

INERT_PART = (
    _BOOKKEEPING
    | _GENERATION
    | _CONVERTED
    | _ROPE
    | {
        "vocab_size",
        "sliding_window",
        "tie_word_embeddings",
        "encoder_cross_output_size",
        "original_max_position_embeddings",
    }
)
"""Any sub-config: windows and ties come from the top level, the projection's size from the other widths."""

INERT_ENCODER = INERT_PART | {"hidden_size_global"}
"""The encoder's copy of the global width is not used; the decoder's is."""

INERT_ROPE = _names(
    """
    factor original_max_position_embeddings low_freq_factor high_freq_factor attention_factor beta_fast
    beta_slow mscale mscale_all_dim truncate short_factor long_factor type
    """
)
"""Rope parameters of one type may stay behind in a config of another."""
