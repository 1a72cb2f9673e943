"""Write a random checkpoint of a released BLT's shape, for measuring size, memory and speed.

    python tools/random_checkpoint.py --shape blt-1b -o /tmp/blt-1b            # 9.3 GB, bfloat16, sharded
    python tools/random_checkpoint.py --shape blt-1b --layers-scale 0.1 --hash-vocab 5003 -o /tmp/small

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
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blt_edge.export.checkpoint import open_checkpoint
from blt_edge.export.tensors import expected_tensors
from blt_edge.graphs.config import parse_config
from blt_edge.runtime.errors import BltError
from blt_edge.tools.model_shapes import SHAPES, scaled_config
from blt_edge.tools.numpy_patcher import patcher_entropies
from blt_edge.tools.safetensors_writer import TENSOR_BYTES, write_checkpoint_weights
from numpy.typing import NDArray

__all__ = ["main", "write_random_checkpoint"]

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
    the folder has files, OSError when the disk has no room; what was written is removed then.
    """
    if dtype not in TENSOR_BYTES:
        raise ValueError(f"dtype {dtype!r}: allowed are {', '.join(TENSOR_BYTES)}")
    model = parse_config(config)
    shapes = expected_tensors(model)
    if model.tie_word_embeddings:
        del shapes["model.local_encoder.embed_tokens.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty; give a new folder")
    parameters = sum(math.prod(shape) for shape in shapes.values())
    needed = parameters * TENSOR_BYTES[dtype]
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    try:
        weights = _Weights(dtype, seed, min(_BLOCK, parameters))
        size = write_checkpoint_weights(folder, shapes, dtype, weights.blocks, shard_bytes)
        written = {**config, "dtype": dtype}
        _write_config(folder, written)
        if choose_threshold and model.patcher is not None:
            with open_checkpoint(folder) as checkpoint:
                entropies = patcher_entropies(checkpoint, model.patcher, _SAMPLE)
            _write_config(folder, {**written, "patching_threshold": _threshold(entropies)})
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        raise
    return size


class _Weights:
    """The bytes of random tensors, cut out of one block of draws that is scaled anew for each deviation."""

    def __init__(self, dtype: str, seed: int, draws: int) -> None:
        self._dtype = dtype
        self._rng = np.random.default_rng(seed)
        self._draws = self._rng.standard_normal(draws, dtype=np.float32).clip(-3, 3)
        self._encoded: dict[float, memoryview] = {}

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The tensor's bytes; deviation 1/sqrt(inputs), ones for a norm."""
        if len(shape) == 1:
            yield _bytes(_encode(np.ones(shape, np.float32), self._dtype))
            return
        deviation = _deviation(name, shape[1])
        block = self._block(deviation)
        item = TENSOR_BYTES[self._dtype]
        position = int(self._rng.integers(self._draws.size)) * item
        left = math.prod(shape) * item
        while left:
            part = block[position : position + left]
            yield part
            left -= len(part)
            position = 0

    def _block(self, deviation: float) -> memoryview:
        if deviation not in self._encoded:
            # one at a time: a model's parts come one after another and have few widths each
            self._encoded = {deviation: _bytes(_encode(self._draws * np.float32(deviation), self._dtype))}
        return self._encoded[deviation]


def _deviation(name: str, inputs: int) -> float:
    if name == "model.patcher.embed_tokens.weight":
        return _PATCHER_EMBEDDING
    return (_HEAD_GAIN if name.endswith("lm_head.weight") else 1.0) / math.sqrt(inputs)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a random BLT checkpoint of a released model's shape, tensor by tensor."
    )
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--dtype", choices=list(TENSOR_BYTES), default="bfloat16")
    parser.add_argument("--layers-scale", type=float, default=1.0, help="factor on each part's layers")
    parser.add_argument("--width-scale", type=float, default=1.0, help="factor on each part's heads")
    parser.add_argument("--hash-vocab", type=int, help="rows of a hash table, 500002 in the released models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=_size, default=2_000_000_000, help="for example 500MB (2GB)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 failed while writing, 2 wrong usage."""
    options = _parser().parse_args(arguments)
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
