"""What a checkpoint's `generation_config.json` says of generating, in a bundle's words.

As in transformers, a checkpoint without that file is asked for the same fields in `config.json`. Every field
has an effect, is known to change no text, or is named in `GenerationSpec.left_out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..graphs.fields import as_whole
from ..runtime.errors import OptionError
from ..runtime.fields import is_whole, shown
from ..runtime.generation_spec import GenerationSpec
from ..runtime.options import GenerationOptions
from ..runtime.vocabulary import EOS, SUPPRESSED, VOCAB_SIZE
from .checkpoint_base import CheckpointError, one_line, read_json

__all__ = ["read_generation"]

_FILE = "generation_config.json"
# transformers' own default where a config samples and does not say.
_SAMPLED = {"temperature": 1.0, "top_k": 50}
_FILTERS = (*_SAMPLED, "top_p", "min_p")
# Values that change no text; None, False and empty lists never do.
_NEUTRAL: dict[str, Any] = {
    "bos_token_id": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "max_length": 20,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
}
_SELDOM = """
    bad_words_ids begin_suppress_tokens sequence_bias constraints force_words_ids watermarking_config
    forced_bos_token_id forced_eos_token_id max_time top_h dola_layers exponential_decay_length_penalty
    token_healing
"""
# What is about memory, speed, beams alone, or what a call returns beside the text.
_NO_EFFECT = """
    transformers_version _from_model_config _commit_hash pad_token_id decoder_start_token_id early_stopping
    length_penalty use_cache cache_implementation cache_config max_cache_len return_dict_in_generate
    output_attentions output_hidden_states output_scores output_logits return_legacy_cache low_memory
    renormalize_logits remove_invalid_values prefill_chunk_size compile_config disable_compile
    continuous_batching_config is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size speculation_type use_mtp
"""
_TAKEN = "eos_token_id do_sample max_new_tokens repetition_penalty stop_strings suppress_tokens"
_MOST_LEFT_OUT = 200
_SILENT = frozenset((*_NO_EFFECT.split(), *_TAKEN.split(), *_FILTERS))
_OF_CONFIG = frozenset((*_TAKEN.split(), *_SELDOM.split(), *_NEUTRAL))


def read_generation(folder: Path, config: Mapping[str, Any]) -> GenerationSpec:
    """Of the checkpoint in `folder`, whose `config.json` is `config`.

    Raises CheckpointError for ids outside the vocabulary, and for a value that is out of its range.
    """
    path = folder / _FILE
    if path.is_file():
        fields, where = read_json(path), str(path)
    else:
        fields = {key: config[key] for key in config if key in _OF_CONFIG}
        where = str(folder / "config.json")
    fields = {name: _as_whole(value) for name, value in fields.items()}
    # A list there may stand in either file; the one that generation reads wins.
    named = fields.get("eos_token_id")
    ends = _ids("eos_token_id", _as_whole(config.get("eos_token_id")) if named is None else named, where)
    try:
        options, unused = _options(fields)
        checked = GenerationOptions(**options)
    except OptionError as error:
        told = str(error).replace("max_new_bytes", "max_new_tokens")
        raise CheckpointError(f"{where}: {told}") from None
    left_out = [f"{name}={shown(fields[name])} (without do_sample)" for name in unused]
    if not set(_ids("suppress_tokens", fields.get("suppress_tokens"), where)) <= set(SUPPRESSED) - set(ends):
        left_out.append(f"suppress_tokens={shown(fields['suppress_tokens'])}")
    for name, value in fields.items():
        off = value is None or value is False or value == [] or value == _NEUTRAL.get(name)
        if not off and name not in _SILENT:
            left_out.append(f"{one_line(name)[:60]}={shown(value)}")
    if len(left_out) > _MOST_LEFT_OUT:
        raise CheckpointError(f"{where}: {len(left_out)} fields of it are unknown; is it of another kind?")
    # As a manifest gives them back: a temperature of 1 is 1.0.
    options = {name: one if name == "stop" else getattr(checked, name) for name, one in options.items()}
    return GenerationSpec(tuple(sorted({EOS, *ends})), options, tuple(map(one_line, left_out)))


def _as_whole(value: Any) -> Any:
    """`as_whole`, in lists too."""
    return list(map(_as_whole, value)) if isinstance(value, list) else as_whole(value)


def _ids(name: str, value: object, where: str) -> list[int]:
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    for one in ids:
        if not is_whole(one, 0, VOCAB_SIZE - 1):
            raise CheckpointError(
                f"{where}: {name}: {shown(one)} is no id; allowed are ids from 0 to {VOCAB_SIZE - 1}, "
                "a list of them, and null"
            )
    return ids


def _options(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of `GenerationOptions`, and the names of filters without effect because nothing is drawn."""
    given = {name: value for name, value in fields.items() if value is not None}
    options: dict[str, Any] = {}
    unused: list[str] = []
    if given.get("do_sample", False):
        options = {**_SAMPLED, **{name: given[name] for name in _FILTERS if name in given}}
    else:
        unused = [name for name in _FILTERS if name in given and given[name] != _NEUTRAL[name]]
    for name, ours in (("repetition_penalty", "repetition_penalty"), ("max_new_tokens", "max_new_bytes")):
        if name in given:
            options[ours] = given[name]
    stops = given.get("stop_strings") or []
    if stops:
        options["stop"] = [stops] if isinstance(stops, str) else stops
    # What is off anyway needs no word.
    neutral = GenerationOptions()
    return {key: value for key, value in options.items() if value != getattr(neutral, key)}, unused
