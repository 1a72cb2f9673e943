"""Writing a sharded safetensors checkpoint piece by piece: headers are known before any weight is.

What a failure leaves behind: shards without an index and config, which nothing opens as a checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

__all__ = ["TENSOR_BYTES", "write_checkpoint_weights"]

TENSOR_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Element types that can be written -> bytes of an element."""

_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

Shape = tuple[int, ...]


def write_checkpoint_weights(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: str,
    blocks: Callable[[str, Shape], Iterable[bytes | memoryview]],
    shard_bytes: int,
) -> int:
    """Write `model.safetensors`, or shards of about `shard_bytes` and `model.safetensors.index.json`.

    `blocks(name, shape)` yields a tensor's bytes, little endian, in order. A tensor larger than `shard_bytes`
    gets a shard of its own. Returns the weights' size in bytes. Raises ValueError when a tensor's blocks
    don't add up to its shape.
    """
    item = TENSOR_BYTES[dtype]
    shards = _plan(shapes, item, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = "model.safetensors"
        file_name = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file_name, {name: shapes[name] for name in names}, dtype, blocks)
        weight_map.update(dict.fromkeys(names, file_name))
    total = sum(math.prod(shape) * item for shape in shapes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _plan(shapes: Mapping[str, Shape], item: int, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_shard(
    path: Path,
    shapes: Mapping[str, Shape],
    dtype: str,
    blocks: Callable[[str, Shape], Iterable[bytes | memoryview]],
) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * TENSOR_BYTES[dtype]
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            expected = file.tell() + math.prod(shape) * TENSOR_BYTES[dtype]
            for block in blocks(name, shape):
                _write_all(file.write, memoryview(block).cast("B"))
            if file.tell() != expected:
                raise ValueError(f"{name}: its blocks are {file.tell() - expected:+d} bytes off its shape")


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    while data:
        data = data[write(data) or 0 :]
