"""A checkpoint in the Hugging Face layout: `config.json` and `model.safetensors`, or shards and an index.

safetensors files are read strictly and by rows, bfloat16 included, with numpy alone: the safetensors package
gives bfloat16 rows only through torch or jax, which an export must not need. The format is small: 8 bytes of
header length, a JSON header, and the tensors' bytes one after another. Every number in the header is checked
against the file before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..runtime.fields import MAX_JSON_BYTES, parse_json
from .checkpoint_base import (
    EMBEDDING,
    Checkpoint,
    CheckpointError,
    StoredTensor,
    one_line,
    read_json,
    sample_blocks,
)

# bfloat16 is the upper half of a float32.
_TYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F32": ("float32", np.dtype("<f4")),
}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_MAX_AXES = 8
_LONGEST_NAME = 255
_CHUNK_BYTES = 16 << 20
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Bytes from the file's beginning."""
    end: int


class SafetensorsFile:
    """One open file. Raises `CheckpointError`, naming it, when it is truncated or its header is not sound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
        try:
            self._header, self._entries = _read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._type(name)[0]

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as a new float32 array; beside it, at most 16 MiB are in memory at a time."""
        entry, stored = self._entries[name], self._type(name)[1]
        row = entry.shape[1:]
        result = np.empty((stop - start, *row) if entry.shape else (), np.float32)
        self._file.seek(entry.start + start * math.prod(row) * stored.itemsize)
        flat, step = result.reshape(-1), _CHUNK_BYTES // stored.itemsize
        for begin in range(0, flat.size, step):
            target = flat[begin : begin + step]
            part = np.fromfile(self._file, stored, target.size)
            if part.size < target.size:
                raise CheckpointError(f"{self.path}: ended while reading; was it changed meanwhile?")
            if stored.kind == "u":
                bits = target.view(np.uint32)
                bits[:] = part
                bits <<= 16
            else:
                target[:] = part
        return result

    def fingerprint(self, digest: Any) -> None:
        digest.update(self._header)
        sample_blocks(self.path, digest)

    def close(self) -> None:
        self._file.close()

    def _type(self, name: str) -> tuple[str, np.dtype[Any]]:
        stored = self._entries[name].dtype
        if stored not in _TYPES:
            raise CheckpointError(
                f"{self.path}: tensor {one_line(name)} has type {one_line(stored)}, "
                f"allowed: {', '.join(_TYPES)}; export a quantized model from its original weights"
            )
        return _TYPES[stored]


def header_length(file: BinaryIO, path: Path) -> int:
    """Bytes of a safetensors file's header, which follows its first 8. Raises `CheckpointError` where it
    can't be one: the format allows 100 MB, which would take gigabytes when parsed.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(
            f"{path}: {size} bytes, too short for its header; is it cut short? Fetch it again"
        )
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: its header claims {length} bytes, allowed: {MAX_JSON_BYTES}, more than any BLT needs; "
            "is it safetensors?"
        )
    return length


def _read_header(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, _Entry]]:
    length = header_length(file, path)
    header = file.read(length)
    try:
        raw = parse_json(header, _unique)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}); not safetensors") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; not safetensors")
    raw.pop("__metadata__", None)
    base = 8 + length
    entries = {name: _entry(name, value, base, path) for name, value in raw.items()}
    # The tensors must lie one after another, without overlap or gap, and end where the file ends.
    position, size = base, file.seek(0, 2)
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise CheckpointError(f"{path}: its tensors overlap or leave gaps; not safetensors")
        position = entry.end
    if position > size:
        raise CheckpointError(
            f"{path}: truncated, {size} of {position} bytes are there; fetch the file again"
        )
    if position < size:
        raise CheckpointError(f"{path}: {size - position} bytes follow its last tensor; not safetensors")
    return header, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(name: str, value: Any, base: int, path: Path) -> _Entry:
    """A checked header entry; all that follows relies on its numbers."""
    broken = CheckpointError(
        f"{path}: the header entry of tensor {one_line(name)} is malformed; not safetensors"
    )
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise broken
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not _whole_numbers(shape) or not _whole_numbers(offsets):
        raise broken
    if len(shape) > _MAX_AXES or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken
    expected = math.prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if dtype in _ITEM_BYTES and expected != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{path}: tensor {one_line(name)} of shape {shape} and type {dtype} needs {expected} bytes, "
            f"its header says {offsets[1] - offsets[0]}"
        )
    return _Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**60 for item in value)


def open_huggingface(folder: Path, name: str, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint in `folder`, whose `config.json` is already read. Raises `CheckpointError`."""
    if config.get("model_type") != "blt":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {one_line(repr(config.get('model_type')))}, "
            "only 'blt' (BltForCausalLM) can be exported"
        )
    with ExitStack() as stack:
        stored = open_weights(folder, stack)
        if config.get("tie_word_embeddings") is True:
            # One matrix under both names; where both are stored, both are kept, as in transformers.
            tied = stored.get(_HEAD) or stored.get(EMBEDDING)
            if tied is not None:
                stored = {_HEAD: tied, EMBEDDING: tied} | stored
        checkpoint = Checkpoint(name, "huggingface", config, {key: (part,) for key, part in stored.items()})
        stack.pop_all()
    return checkpoint


def open_weights(folder: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    """All stored tensors by name; the files are closed with `stack`.

    A single file wins over an index, as in transformers.
    """
    if (folder / _SINGLE).is_file():
        file = _open(folder / _SINGLE, stack)
        return {key: StoredTensor(file, key) for key in file.names()}
    if (folder / _INDEX).is_file():
        return _open_shards(folder, stack)
    pickles = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")
    if any(any(folder.glob(pattern)) for pattern in pickles):
        found = (
            "holds PyTorch pickles only; load it with transformers and save_pretrained() it to get "
            "model.safetensors"
        )
    elif any(folder.glob("*.safetensors")):
        found = f"has neither {_SINGLE} nor {_INDEX}; its .safetensors files can't be put together"
    else:
        found = f"has no weights ({_SINGLE}, or {_INDEX} and its shards)"
    raise CheckpointError(f"{folder}: {found}")


def _open_shards(folder: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map, so it names no shards")
    shards: dict[str, SafetensorsFile] = {}
    for shard in sorted({_shard_name(value, index) for value in weight_map.values()}):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: missing, but the index names it; fetch it again")
        shards[shard] = _open(folder / shard, stack)
    held = {shard: set(file.names()) for shard, file in shards.items()}
    for key, shard in weight_map.items():
        if key not in held[shard]:
            raise CheckpointError(f"{folder / shard}: has no tensor {one_line(key)}, but the index says so")
    return {key: StoredTensor(shards[shard], key) for key, shard in weight_map.items()}


def _shard_name(value: Any, index: Path) -> str:
    plain = isinstance(value, str) and value.endswith(".safetensors") and not value.startswith(".")
    # Names that no file system has, or that a terminal would obey, are no file's.
    plain = plain and value.isprintable() and len(value.encode()) <= _LONGEST_NAME
    if not plain or any(mark in value for mark in ("/", "\\", ":")):
        raise CheckpointError(
            f"{index}: shard {one_line(repr(value))} is not the plain name of a .safetensors file"
        )
    return str(value)


def _open(path: Path, stack: ExitStack) -> SafetensorsFile:
    file = SafetensorsFile(path)
    stack.callback(file.close)
    return file
