"""A checkpoint in the Hugging Face layout: `config.json` and `model.safetensors`, or shards and an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .checkpoint_base import Checkpoint, CheckpointError, Piece, TensorFile, one_line, read_json
from .safetensors_file import SafetensorsFile

__all__ = ["open_huggingface", "open_weights"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TIED = ("lm_head.weight", "model.local_encoder.embed_tokens.weight")


def open_huggingface(folder: Path, name: str, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint in `folder`, whose `config.json` is already read. Raises `CheckpointError`."""
    if config.get("model_type") != "blt":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {one_line(repr(config.get('model_type')))}, "
            "only 'blt' (BltForCausalLM) can be exported"
        )
    with ExitStack() as stack:
        tensors = {key: (piece,) for key, piece in open_weights(folder, stack).items()}
        if config.get("tie_word_embeddings") is True:
            _tie(tensors)
        checkpoint = Checkpoint(name, "huggingface", config, tensors)
        stack.pop_all()
    return checkpoint


def open_weights(folder: Path, stack: ExitStack) -> dict[str, Piece]:
    """All stored tensors by name; the files are closed with `stack`.

    A single file wins over an index, as in transformers.
    """
    if (folder / _SINGLE).is_file():
        file = _open(folder / _SINGLE, stack)
        return {key: Piece(file, key) for key in file.names()}
    if (folder / _INDEX).is_file():
        return _open_shards(folder, stack)
    raise CheckpointError(_nothing_to_read(folder))


def _open_shards(folder: Path, stack: ExitStack) -> dict[str, Piece]:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map, so it names no shards")
    shards: dict[str, TensorFile] = {}
    for shard in sorted({_shard_name(value, index) for value in weight_map.values()}):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: missing, but the index names it; fetch it again")
        shards[shard] = _open(folder / shard, stack)
    held = {shard: set(file.names()) for shard, file in shards.items()}
    for key, shard in weight_map.items():
        if key not in held[shard]:
            raise CheckpointError(f"{folder / shard}: has no tensor {one_line(key)}, but the index says so")
    return {key: Piece(shards[shard], key) for key, shard in weight_map.items()}


def _shard_name(value: Any, index: Path) -> str:
    plain = isinstance(value, str) and value.endswith(".safetensors") and not value.startswith(".")
    if not plain or any(mark in value for mark in ("/", "\\", "\0", ":")):
        raise CheckpointError(
            f"{index}: shard {one_line(repr(value))} is not the plain name of a .safetensors file"
        )
    return str(value)


def _open(path: Path, stack: ExitStack) -> SafetensorsFile:
    file = SafetensorsFile(path)
    stack.callback(file.close)
    return file


def _tie(tensors: dict[str, tuple[Piece]]) -> None:
    """Present the one stored matrix under both names.

    Where both are stored, both are kept, as in transformers.
    """
    head, embedding = _TIED
    if head in tensors:
        tensors.setdefault(embedding, tensors[head])
    elif embedding in tensors:
        tensors[head] = tensors[embedding]


def _nothing_to_read(folder: Path) -> str:
    def any_of(patterns: Sequence[str]) -> bool:
        return any(True for pattern in patterns for _ in folder.glob(pattern))

    if any_of(("*.bin", "*.pt", "*.pth", "*.bin.index.json")):
        return (
            f"{folder}: holds PyTorch pickles only; load it with transformers and save_pretrained() it "
            "to get model.safetensors"
        )
    if any_of(("*.safetensors",)):
        return f"{folder}: has neither {_SINGLE} nor {_INDEX}; its .safetensors files can't be put together"
    return f"{folder}: has no weights ({_SINGLE}, or {_INDEX} and its shards)"
