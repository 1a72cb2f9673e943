"""Write a random checkpoint of a released BLT's shape, for measuring size, memory and speed.

    python -m blt_edge.tools.models.random_checkpoint --shape blt-1b -o /tmp/blt-1b     # 9.3 GB, bfloat16
    python -m blt_edge.tools.models.random_checkpoint --shape blt-1b --layers-scale 0.1 -o /tmp/small

Sizes are those of the released checkpoints: 1B has 4.63 billion parameters, 66 % of them hash tables.

Weights are normal, cut at three deviations, with deviation 1/sqrt(inputs), and norms are one: activations
stay finite. All come from one block of 8 million draws, entered at a random place for each tensor, so writing
costs what the disk costs. Two things make patches come about as often as in a trained model, four bytes of
English each: both heads are drawn three times as wide, which spreads entropies over a nat or two, and the
patcher's embedding has deviation 4, so that its state is mostly the last byte (with a narrow one, random
attention drifts along the text, and entropies with it); the threshold then lies where a quarter of a sample's
entropies exceed it. The text that comes out is noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...export.checkpoint import open_checkpoint
from ...export.checkpoint_base import expected_tensors
from ...graphs.config import parse_config
from ...runtime.errors import BltError
from ...runtime.files import new_directory
from .numpy_patcher import patcher_entropies

_THRESHOLD = 1.335442066192627

# 1. Shapes.


def _part(layers: int, heads: int, head_dim: int, intermediate: int, positions: int) -> dict[str, Any]:
    return {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }


def _config(
    patcher: dict[str, Any],
    encoder: dict[str, Any],
    latent: dict[str, Any],
    decoder: dict[str, Any],
    *,
    k: int,
    window: int = 512,
    hash_vocab: int = 500_002,
) -> dict[str, Any]:
    shared = {"cross_attn_k": k, "hidden_size_global": latent["hidden_size"], "vocab_size": 260}
    wide = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    narrow = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": 260,
        "max_position_embeddings": latent["max_position_embeddings"],
        "cross_attn_k": k,
        "local_attention_window_len": window,
        "encoder_hash_byte_group_size": [3, 4, 5, 6, 7, 8],
        "encoder_hash_byte_group_vocab": hash_vocab,
        "encoder_hash_byte_group_nb_functions": 1,
        "patch_in_forward": True,
        "patching_mode": "entropy",
        "patch_size": 4,
        "patching_threshold": _THRESHOLD,
        "tie_word_embeddings": False,
        "patcher_config": {**patcher, **narrow, "sliding_window": window, "vocab_size": 260},
        "encoder_config": {**encoder, **shared, **wide, "cross_attn_all_layers": False},
        "decoder_config": {**decoder, **shared, **wide, "cross_attn_all_layers": True},
        "global_config": {**latent, **wide},
    }


SHAPES: Mapping[str, dict[str, Any]] = {
    "blt-1b": _config(
        patcher=_part(14, 12, 64, 2048, 8192),
        encoder=_part(1, 16, 64, 2816, 24576),
        latent=_part(25, 16, 128, 5632, 4096),
        decoder=_part(9, 16, 64, 2816, 24576),
        k=2,
    ),
    "blt-7b": _config(
        patcher=_part(14, 12, 64, 2048, 8192),
        encoder=_part(1, 20, 64, 3584, 24576),
        latent=_part(32, 32, 128, 11008, 4096),
        decoder=_part(6, 20, 64, 3584, 24576),
        k=4,
    ),
    "tiny": _config(
        patcher=_part(2, 4, 16, 96, 8192),
        encoder=_part(1, 4, 16, 96, 24576),
        latent=_part(2, 4, 32, 192, 4096),
        decoder=_part(2, 4, 16, 96, 24576),
        k=2,
        window=64,
        hash_vocab=1009,
    ),
}
"""Raw Hugging Face configs by name: the released models and a toy of their form."""

_INTERMEDIATE_STEP = 32


def scaled_config(
    shape: str, *, layers_scale: float = 1.0, width_scale: float = 1.0, hash_vocab: int | None = None
) -> dict[str, Any]:
    """A config of one of `SHAPES` with fewer (or more) layers and heads in every part, and other hash tables.

    Heads keep their size, so widths follow; nothing falls below one layer or one head. Raises ValueError
    for an unknown shape or a factor that is not positive.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r}: allowed are {', '.join(SHAPES)}")
    if not (0 < layers_scale < 1000 and 0 < width_scale < 1000):
        raise ValueError(f"scales must be above 0 and below 1000, got {layers_scale} and {width_scale}")
    config = copy.deepcopy(SHAPES[shape])
    for name in ("patcher_config", "encoder_config", "decoder_config", "global_config"):
        part = config[name]
        head_dim = part["hidden_size"] // part["num_attention_heads"]
        heads = max(1, round(part["num_attention_heads"] * width_scale))
        steps = max(1, round(part["intermediate_size"] * width_scale / _INTERMEDIATE_STEP))
        part["num_hidden_layers"] = max(1, round(part["num_hidden_layers"] * layers_scale))
        part["num_attention_heads"] = part["num_key_value_heads"] = heads
        part["hidden_size"] = heads * head_dim
        part["intermediate_size"] = steps * _INTERMEDIATE_STEP
    for name in ("encoder_config", "decoder_config"):
        config[name]["hidden_size_global"] = config["global_config"]["hidden_size"]
    if hash_vocab is not None:
        config["encoder_hash_byte_group_vocab"] = hash_vocab
    return config


# 2. A checkpoint's weights in safetensors, piece by piece: headers are known before any weight is.

TENSOR_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Element types that can be written -> bytes of an element."""
_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

Shape = tuple[int, ...]
Blocks = Callable[[str, Shape], Iterable[bytes | memoryview]]
"""A tensor's name and shape -> its bytes, little endian, in order."""


def write_checkpoint_weights(
    folder: Path, shapes: Mapping[str, Shape], dtype: str, blocks: Blocks, shard_bytes: int
) -> int:
    """Write `model.safetensors`, or shards of about `shard_bytes` and `model.safetensors.index.json`.

    A tensor larger than `shard_bytes` gets a shard of its own. Returns the weights' size in bytes. Raises
    ValueError when a tensor's blocks don't add up to its shape. A failure leaves shards without an index,
    which nothing opens as a checkpoint.
    """
    sizes = {name: math.prod(shape) * TENSOR_BYTES[dtype] for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        weight_map |= dict.fromkeys(names, f"model{part}.safetensors")
        _write_shard(folder / weight_map[names[0]], {name: shapes[name] for name in names}, dtype, blocks)
    total = sum(sizes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write_shard(path: Path, shapes: Mapping[str, Shape], dtype: str, blocks: Blocks) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends, position = {}, 0
    for name, shape in shapes.items():
        end = ends[name] = position + math.prod(shape) * TENSOR_BYTES[dtype]
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        start = file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            for block in blocks(name, shape):
                file.write(block)
            off = file.tell() - start - ends[name]
            if off:
                raise ValueError(f"{name}: its blocks are {off:+d} bytes off its shape")


# 3. Random weights.

_BLOCK = 8_388_593  # a prime: no tensor's rows repeat at once
_HEAD_GAIN = 3.0
_PATCHER_EMBEDDING = 4.0
_BYTES_PER_PATCH = 4.1
_SAMPLE = (
    b"It was past noon when the boat came round the point, and by then the whole village stood on the "
    b"shingle to see who had come back. Some had brought blankets; an old man had brought a lantern, "
    b'though the sun was high, because he had carried it down on every such day for thirty years. "How '
    b'many?" somebody called. Nobody in the boat answered at once. They rowed slowly, as people do who '
    b"have rowed since the night before."
)


def write_random_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = 2_000_000_000,
    choose_threshold: bool = True,
) -> int:
    """Write `config.json` and random weights to the new or empty folder; returns the weights' size in bytes.

    Deterministic for a seed and dtype. Peak memory is some 300 MB whatever the model's size. With
    `choose_threshold`, a model that patches by entropy gets a threshold of its own in place of the config's.
    Raises ValueError for an unknown dtype, `ConfigError` for a config that is not sound, FileExistsError when
    the folder has files, WriteError when the disk has no room; nothing is left then.
    """
    if dtype not in TENSOR_BYTES:
        raise ValueError(f"dtype {dtype!r}: allowed are {', '.join(TENSOR_BYTES)}")
    model = parse_config(config)
    shapes = expected_tensors(model)
    if model.tie_word_embeddings:
        del shapes["model.local_encoder.embed_tokens.weight"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty; give a new folder")
    parameters = sum(math.prod(shape) for shape in shapes.values())
    needed = parameters * TENSOR_BYTES[dtype]
    with new_directory(folder, f"output {folder}", "checkpoint", needed=needed) as made:
        draws = _Draws(dtype, seed, min(_BLOCK, parameters))
        size = write_checkpoint_weights(made, shapes, dtype, draws.blocks, shard_bytes)
        written = {**config, "dtype": dtype}
        _write_config(made, written)
        if choose_threshold and model.patcher is not None:
            with open_checkpoint(made) as checkpoint:
                entropies = patcher_entropies(checkpoint, model.patcher, _SAMPLE)
            _write_config(made, {**written, "patching_threshold": _threshold(entropies)})
    return size


class _Draws:
    """The bytes of random tensors, cut out of one block of draws that is scaled anew for each deviation."""

    def __init__(self, dtype: str, seed: int, draws: int) -> None:
        self._dtype = dtype
        self._rng = np.random.default_rng(seed)
        self._draws = self._rng.standard_normal(draws, dtype=np.float32).clip(-3, 3)
        self._encoded: dict[float, memoryview] = {}

    def blocks(self, name: str, shape: Shape) -> Iterator[memoryview]:
        """The tensor's bytes; deviation 1/sqrt(inputs), ones for a norm."""
        if len(shape) == 1:
            yield _bytes(_encode(np.ones(shape, np.float32), self._dtype))
            return
        deviation = (_HEAD_GAIN if name.endswith("lm_head.weight") else 1.0) / math.sqrt(shape[1])
        if name == "model.patcher.embed_tokens.weight":
            deviation = _PATCHER_EMBEDDING
        if deviation not in self._encoded:
            # one at a time: a model's parts come one after another and have few widths each
            self._encoded = {deviation: _bytes(_encode(self._draws * np.float32(deviation), self._dtype))}
        block = self._encoded[deviation]
        item = TENSOR_BYTES[self._dtype]
        position = int(self._rng.integers(self._draws.size)) * item
        left = math.prod(shape) * item
        while left:
            part = block[position : position + left]
            yield part
            left -= len(part)
            position = 0


def _encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round to the stored type; bfloat16 as the upper halves of float32, nearest even."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "float16" else "<f4")


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _threshold(entropies: NDArray[np.float32]) -> float:
    """A value that one position in about four exceeds, midway between two entropies."""
    ordered = np.sort(entropies[1:].astype(np.float64))
    last_below = len(ordered) - 1 - round(len(ordered) / _BYTES_PER_PATCH)
    return float((ordered[last_below] + ordered[last_below + 1]) / 2)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 500MB or 2GB")
    return int(float(match[1]) * 10 ** {"": 0, "K": 3, "M": 6, "G": 9}[match[2].upper()])


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 failed while writing, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description="Write a random BLT checkpoint of a released model's shape, tensor by tensor."
    )
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), required=True)
    add("-o", "--output", type=Path, required=True, help="new or empty folder")
    add("--dtype", choices=list(TENSOR_BYTES), default="bfloat16")
    add("--layers-scale", type=float, default=1.0, help="factor on each part's layers")
    add("--width-scale", type=float, default=1.0, help="factor on each part's heads")
    add("--hash-vocab", type=int, help="rows of a hash table, 500002 in the released models")
    add("--seed", type=int, default=0)
    add("--shard-size", type=_size, default=2_000_000_000, help="for example 500MB (2GB)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        config = scaled_config(
            options.shape,
            layers_scale=options.layers_scale,
            width_scale=options.width_scale,
            hash_vocab=options.hash_vocab,
        )
        size = write_random_checkpoint(
            options.output, config, dtype=options.dtype, seed=options.seed, shard_bytes=options.shard_size
        )
    except (ValueError, FileExistsError, NotADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (BltError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    print(f"{options.output}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
