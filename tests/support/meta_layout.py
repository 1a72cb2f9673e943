"""A checkpoint in Meta's layout made from one in Hugging Face's, its fields as Meta's code spells them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blt_edge.export.checkpoint import open_checkpoint
from blt_edge.export.checkpoint_base import HASH_EMBEDDING
from blt_edge.graphs.config import ModelConfig, parse_config
from numpy.typing import NDArray
from safetensors.numpy import save_file

from .torch_only import torch_or_skip

Array = NDArray[Any]

_META = {
    "self_attn": "attention",
    "mlp": "feed_forward",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "q_norm": "cross_attn_norm_q",
    "k_norm": "cross_attn_norm_kv",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "lm_head": "output",
}


def to_meta(tensors: Mapping[str, Array], tables: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Meta's two state dicts, of the main and of the entropy model, for a Hugging Face one.

    The matrices are the same; the fused hash table is cut into `tables`.
    """
    main: dict[str, Array] = {}
    entropy: dict[str, Array] = {}
    for name, tensor in tensors.items():
        of_patcher = name.startswith("model.patcher.")
        rest = name.removeprefix("model.patcher." if of_patcher else "model.")
        if name == HASH_EMBEDDING:
            for index, table in enumerate(np.split(tensor, tables)):
                main[f"encoder_hash_tok_embedding.{index}.weight"] = np.ascontiguousarray(table)
        elif name == "lm_head.weight":
            main["local_decoder.output.weight"] = tensor
        else:
            renamed = ".".join(_META.get(part, part) for part in rest.split("."))
            (entropy if of_patcher else main)[renamed] = tensor
    return main, entropy


def meta_args(config: ModelConfig) -> dict[str, Any]:
    """`args` of the main model: what matters, and a few training fields that must not."""
    encoder, decoder, latent = config.encoder, config.decoder, config.global_stack
    return {
        "seed": 777,
        "vocab_size": 260,
        "dim": 512,
        "n_layers": 8,
        "n_heads": 8,
        "weight_tying": False,
        "patch_in_forward": False,
        "dim_token": None,
        "dim_global": latent.width,
        "dim_local_encoder": encoder.width,
        "dim_local_decoder": decoder.width,
        "n_layers_global": latent.layers,
        "n_layers_local_encoder": encoder.layers,
        "n_layers_local_decoder": decoder.layers,
        "n_heads_global": latent.heads,
        "n_heads_local_encoder": encoder.heads,
        "n_heads_local_decoder": decoder.heads,
        "n_kv_heads": None,
        "n_kv_heads_global": latent.kv_heads,
        "patch_size": 4.5,
        "patching_mode": "entropy",
        "patching_threshold": config.patching.threshold,
        "patching_threshold_add": None,
        "monotonicity": False,
        "max_patch_length": None,
        "max_encoder_seq_length": encoder.max_positions,
        "max_seqlen": latent.max_positions,
        "local_attention_window_len": encoder.window,
        "cross_attn_encoder": True,
        "cross_attn_decoder": True,
        "cross_attn_k": config.cross_attn_k,
        "cross_attn_nheads": encoder.heads,
        "cross_attn_all_layers_decoder": config.decoder_cross_all_layers,
        "cross_attn_all_layers_encoder": config.encoder_cross_all_layers,
        "cross_attn_init_by_pooling": True,
        "cross_attn_window_encoder": None,
        "downsampling_by_pooling": "max",
        "encoder_hash_byte_group_size": ",".join(map(str, config.hash.group_sizes)),
        "encoder_hash_byte_group_vocab": config.hash.vocab,
        "encoder_hash_byte_group_nb_functions": config.hash.functions,
        "use_rope": True,
        "non_linearity": "swiglu",
        "rope_theta": encoder.rope.theta,
        "norm_eps": encoder.norm_eps,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.0,
        "pm_size": 0,
    }


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """`params.json` of the entropy model. Its own patching mode is that of its training, as in the released
    one.
    """
    patcher = config.patcher
    assert patcher is not None
    return {
        "name": "entropy",
        "entropy_model": {
            "vocab_size": 260,
            "dim": patcher.width,
            "n_layers": patcher.layers,
            "n_heads": patcher.heads,
            "n_kv_heads": patcher.kv_heads,
            "max_seqlen": patcher.max_positions,
            "sliding_window": patcher.window,
            "ffn_dim_multiplier": 1.0,
            "rope_theta": patcher.rope.theta,
            "norm_eps": patcher.norm_eps,
        },
        "data": {"patcher_args": {"patching_mode": "byte", "threshold": config.patching.threshold}},
    }


def write_meta(
    source: Path, folder: Path, *, pickled: bool = True, pickled_main: bool = False, layout: str = "hub"
) -> Path:
    """Write the Hugging Face checkpoint `source` as Meta does; the folder of the main model.

    layout: "hub", as in facebook/blt-1b; "download", as the download script leaves it in hf-weights;
    "converted", as `convert_to_transformers` writes it. The main weights go to a safetensors file. As in the
    released model, the entropy model's go to a pickle unless `pickled` says that no file is one;
    `pickled_main` makes a pickle of both. Pickles need torch.
    """
    with open_checkpoint(source) as checkpoint:
        config = parse_config(checkpoint.config)
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    main, entropy = to_meta(tensors, config.hash.tables)
    args, params = meta_args(config), meta_params(config)
    trained = {
        "train_entropy_model": False,
        "model": args,
        "entropy_model": None,
        "data": {"patcher_args": {"patching_mode": "entropy", "threshold": config.patching.threshold}},
    }
    entropy_folder = {
        "hub": folder / "entropy_model",
        "download": folder.parent / "entropy_model",
        "converted": folder.parent / "entropy",
    }[layout]
    for made in (folder, entropy_folder):
        made.mkdir(parents=True)
    if layout == "download":
        _write_json(folder / "params.json", trained)
    else:
        _write_json(folder / "config.json", {"args": args})
    if layout == "converted":
        _write_json(folder / "train_args.json", trained)
        _write_json(entropy_folder / "config.json", {"args": params["entropy_model"]})
    else:
        # As in the released one, the fields of a main model are there, with their defaults.
        _write_json(
            entropy_folder / "params.json", {**params, "train_entropy_model": True, "model": {"dim": 512}}
        )
    name = "consolidated.safetensors" if layout == "download" else "model.safetensors"
    if pickled:
        torch_or_skip().save({"model": _tensors(entropy), "step": 3}, entropy_folder / "consolidated.pth")
    else:
        save_file(entropy, entropy_folder / name)
    if pickled_main:
        torch_or_skip().save(_tensors(main), folder / "consolidated.pth")
    else:
        save_file(main, folder / name)
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Any]:
    torch = torch_or_skip()
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
