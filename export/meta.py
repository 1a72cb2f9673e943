"""A checkpoint in Meta's own layout, presented under Hugging Face names with a Hugging Face config.

    config.json                      {"args": {...}}, the fields of ByteLatentTransformerArgs
    model.safetensors | consolidated.pth
    entropy_model/params.json        {"entropy_model": {...}, "data": {"patcher_args": {...}}}
    entropy_model/consolidated.pth | entropy_model/model.safetensors

Weights are taken as they are: both layouts rotate interleaved pairs, so nothing is permuted. Each hash
table is a tensor of its own here; together, in order, they are Hugging Face's fused one. The name map is
that of transformers' `convert_blt_weights_to_hf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .checkpoint_base import Checkpoint, CheckpointError, Piece, TensorFile, one_line, read_json
from .huggingface import open_weights
from .meta_config import huggingface_config, needs_entropy_model
from .tensors import HASH_EMBEDDING
from .torch_file import TorchFile

__all__ = ["is_meta_config", "meta_name", "open_meta"]

_ENTROPY_FOLDER = "entropy_model"
_HASH_TABLES = "encoder_hash_tok_embedding."
_SEGMENTS = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
    "cross_attn_norm_q": "q_norm",
    "cross_attn_norm_kv": "k_norm",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "output": "lm_head",
}


def is_meta_config(config: Mapping[str, Any]) -> bool:
    """Whether a parsed `config.json` is of Meta's layout: everything under `args`, and no model_type."""
    return isinstance(config.get("args"), Mapping) and "model_type" not in config


def meta_name(name: str, *, entropy_model: bool = False) -> str:
    """The Hugging Face name of a tensor of Meta's main checkpoint or, with `entropy_model`, of its entropy
    model.
    """
    if name == "local_decoder.output.weight" and not entropy_model:
        return "lm_head.weight"
    mapped = ".".join(_SEGMENTS.get(segment, segment) for segment in name.split("."))
    return f"model.patcher.{mapped}" if entropy_model else f"model.{mapped}"


def open_meta(folder: Path, name: str, raw: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in `folder`, whose `config.json` is `raw`.

    Raises `CheckpointError` for files that are missing or damaged, and `ConfigError` for what the graphs
    can't compute, cross-attention in several encoder layers first of all.
    """
    args = raw["args"]
    with ExitStack() as stack:
        main = _open_weights(folder, stack)
        tensors: dict[str, tuple[Piece, ...]] = {
            meta_name(key): (piece,) for key, piece in main.items() if not _is_left_out(key)
        }
        tensors.update(_hash_tables(main, folder))
        params: dict[str, Any] | None = None
        if needs_entropy_model(args):
            entropy_folder = folder / _ENTROPY_FOLDER
            if not entropy_folder.is_dir():
                raise CheckpointError(
                    f"{entropy_folder}: missing; entropy patching needs the entropy model's params.json and "
                    "consolidated.pth there"
                )
            params = read_json(entropy_folder / "params.json")
            entropy = _open_weights(entropy_folder, stack)
            for key, piece in entropy.items():
                if not _is_left_out(key):
                    tensors[meta_name(key, entropy_model=True)] = (piece,)
        shapes = {key: _shape(pieces) for key, pieces in tensors.items() if key.endswith("gate_proj.weight")}
        config = huggingface_config(args, params, shapes)
        checkpoint = Checkpoint(name, "meta", config, tensors)
        stack.pop_all()
    return checkpoint


def _open_weights(folder: Path, stack: ExitStack) -> dict[str, Piece]:
    path = folder / "consolidated.pth"
    safetensors = any(folder.glob("model.safetensors*"))
    if not safetensors and not path.is_file():
        pickles = sorted(folder.glob("*.pth"))
        if len(pickles) != 1:
            found = f"{len(pickles)} .pth files" if pickles else "no weights"
            raise CheckpointError(f"{folder}: has {found}; expected model.safetensors or consolidated.pth")
        path = pickles[0]
    if safetensors:
        return open_weights(folder, stack)
    file = TorchFile(path)
    stack.callback(file.close)
    return {key: Piece(file, key) for key in file.names()}


def _is_left_out(name: str) -> bool:
    """Hash tables, which are joined, and rotary tables, which are computed."""
    return name.startswith(_HASH_TABLES) or name.split(".")[-1] == "freqs_cis"


def _hash_tables(main: Mapping[str, Piece], folder: Path) -> dict[str, tuple[Piece, ...]]:
    numbered: dict[int, Piece] = {}
    for key, piece in main.items():
        if key.startswith(_HASH_TABLES):
            number = key.removeprefix(_HASH_TABLES).removesuffix(".weight")
            if not number.isascii() or not number.isdigit() or len(number) > 4:
                raise CheckpointError(f"{folder}: tensor {one_line(key)} is not a numbered hash table")
            numbered[int(number)] = piece
    for index in range(len(numbered)):
        if index not in numbered:
            raise CheckpointError(f"{folder}: tensor {_HASH_TABLES}{index}.weight is missing")
    return {HASH_EMBEDDING: tuple(numbered[i] for i in range(len(numbered)))} if numbered else {}


def _shape(pieces: Sequence[Piece]) -> tuple[int, ...]:
    file: TensorFile = pieces[0].file
    shape = file.shape(pieces[0].name)
    return shape if math.prod(shape) else ()
