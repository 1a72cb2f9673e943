"""What every checkpoint looks like from outside, whatever its layout, and which tensors a config asks for.

Tensors go by their Hugging Face names. Nothing is loaded ahead: a tensor, or some rows of it, is read when
asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..graphs.config import ModelConfig, TransformerConfig
from ..runtime.errors import BltError
from ..runtime.fields import MAX_JSON_BYTES, parse_json
from ..runtime.generation_spec import GenerationSpec

PARTS = ("patcher", "encoder", "latent", "decoder", "tables")
"""The parts of a bundle that hold weights: the four stages, and the byte and hash embedding tables."""
EMBEDDING = "model.local_encoder.embed_tokens.weight"
"""The byte embedding, [260, encoder width]."""
HASH_EMBEDDING = "model.encoder_hash_tok_embedding.weight"
"""The fused hash tables, [tables * hash vocab, encoder width]."""

_PER_PATCH = ("patch_embedding_projection.weight", "k_norm.weight", "k_proj.weight", "v_proj.weight")
_BLOCKS = 64
_BLOCK_BYTES = 4096

Shape = tuple[int, ...]


class CheckpointError(BltError):
    """The checkpoint is missing, damaged, incomplete, or not one that can be exported."""


class TensorFile(Protocol):
    """One file of tensors under its own names."""

    path: Path

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> Shape: ...
    def dtype(self, name: str) -> str:
        """float16, bfloat16 or float32; raises `CheckpointError` for any other stored type."""

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis as a new float32 array (a scalar has one row)."""

    def fingerprint(self, digest: Any) -> None:
        """Feed size, structure and sampled contents to a hashlib object."""

    def close(self) -> None:
        """Release the file; reading afterwards is an error."""


@dataclass(frozen=True)
class StoredTensor:
    """Where the rows of a checkpoint's tensor, or some of them, come from."""

    file: TensorFile
    name: str
    """The tensor's name in the file."""

    @property
    def shape(self) -> Shape:
        return self.file.shape(self.name)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.file.read(self.name, start, stop)


class Checkpoint:
    """A trained model's config and weights. A context manager; `close` releases its files.

    Not safe for use by several threads at once.
    """

    folder = Path()
    """Where its `config.json` lies, once it was opened by `open_checkpoint`."""

    generation = GenerationSpec()
    """How it is meant to generate, likewise."""

    def __init__(
        self, name: str, layout: str, config: dict[str, Any], tensors: Mapping[str, Sequence[StoredTensor]]
    ) -> None:
        self.name = name
        """What the user called it: a folder's name, a hub id, or `demo`."""
        self.layout = layout
        """`huggingface` or `meta`: the layout of the files. Names and config are Hugging Face's in both."""
        self.config = config
        """The raw config, in the form of transformers' `config.json`."""
        self._tensors = {key: tuple(parts) for key, parts in tensors.items()}
        files = {id(part.file): part.file for parts in self._tensors.values() for part in parts}
        self._files = sorted(files.values(), key=lambda file: str(file.path))

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors, tied ones under both names."""
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        """The tensor's shape; `CheckpointError` when there is none of that name."""
        shapes = [part.shape for part in self._parts(name)]
        if len(shapes) == 1:
            return shapes[0]
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise CheckpointError(
                f"{name}: its {len(shapes)} parts have different row sizes, {one_line(str(shapes))}"
            )
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def dtype(self, name: str) -> str:
        """The stored element type: float16, bfloat16 or float32; any other is refused by name."""
        kinds = {part.file.dtype(part.name) for part in self._parts(name)}
        return kinds.pop() if len(kinds) == 1 else "float32"

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The whole tensor as a new float32 array, whatever its stored type."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self._parts(name)[0].read(0, 1)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis as a new float32 array; only these are read.

        Raises ValueError when the range is not inside the tensor.
        """
        shape = self.shape(name)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"{name}: rows {start}:{stop} of a tensor of shape {shape}")
        found: list[NDArray[np.float32]] = []
        offset = 0
        for part in self._parts(name):
            count = part.shape[0]
            first, last = (min(max(row - offset, 0), count) for row in (start, stop))
            if first < last or (start == stop and not found):
                found.append(part.read(first, last))
            offset += count
        return found[0] if len(found) == 1 else np.concatenate(found)

    def sha256(self) -> str:
        """A fingerprint of the source, hex: cheap even for files of many gigabytes.

        Covers the config, and of each tensor file its name, size, header (names, types, shapes, offsets) and
        64 evenly spaced blocks of 4 KiB, first and last included. It tells checkpoints apart and finds
        truncation; a single changed byte elsewhere goes unnoticed.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self._files:
            digest.update(os.fsencode(file.path.name) + b"\0")
            file.fingerprint(digest)
        return digest.hexdigest()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _parts(self, name: str) -> tuple[StoredTensor, ...]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.name}: tensor {name} is missing")
        return self._tensors[name]


def one_line(text: str) -> str:
    """Text out of an untrusted file, fit for one line of a message: printable, and at most 200 characters."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 4 MiB; `CheckpointError` with the path otherwise."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: over {MAX_JSON_BYTES} bytes, too large for a file of this kind")
    try:
        value = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); is it cut short? Fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def sample_blocks(path: Path, digest: Any) -> None:
    """Feed a file's size and up to 64 evenly spaced blocks of 4 KiB, first and last included, to a digest."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        last = max(size - _BLOCK_BYTES, 0)
        for offset in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
            file.seek(offset)
            digest.update(file.read(_BLOCK_BYTES))


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this config has -> its shape.

    Linear weights are [out, in]. A tied byte embedding is listed under both names.
    """
    k, vocab = config.cross_attn_k, config.vocab_size
    encoder, decoder, latent = config.encoder, config.decoder, config.global_stack
    result: dict[str, Shape] = {
        EMBEDDING: (vocab, encoder.width),
        HASH_EMBEDDING: (config.hash.tables * config.hash.vocab, encoder.width),
    }
    if config.patcher is not None:
        width = config.patcher.width
        result["model.patcher.embed_tokens.weight"] = (vocab, width)
        result.update(_stack("model.patcher", config.patcher))
        result["model.patcher.norm.weight"] = (width,)
        result["model.patcher.lm_head.weight"] = (vocab, width)
    result.update(_stack("model.local_encoder", encoder))
    result["model.local_encoder.patch_embedding_projection.weight"] = (k * encoder.width, encoder.width)
    result.update(_cross_attention("model.local_encoder", encoder, config.encoder_cross_all_layers))
    if config.token_projection:
        projection = "model.global_transformer.token_embedding_projection.weight"
        result[projection] = (latent.width, k * encoder.width)
    result.update(_stack("model.global_transformer", latent))
    result["model.local_decoder.patch_embedding_projection.weight"] = (k * decoder.width, latent.width)
    result.update(_cross_attention("model.local_decoder", decoder, config.decoder_cross_all_layers))
    result.update(_stack("model.local_decoder", decoder))
    result["model.local_decoder.norm.weight"] = (decoder.width,)
    result["lm_head.weight"] = (vocab, decoder.width)
    return result


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters of each of `PARTS`; a model without a patcher has none there.

    The pooling and what the decoder computes once per patch (its projection of the patch, keys and values)
    count as latent. Pooling layers that are stored but never count in the result are left out.
    """
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in expected_tensors(config).items():
        if (part := _part(name, config)) is not None:
            counts[part] += math.prod(shape)
    return counts


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compare names, shapes and types with the config before anything is written.

    Raises `CheckpointError` naming the first tensor that is missing, misshapen, of another type than float16,
    bfloat16 and float32, or unknown (a weight that the graphs would silently leave out).
    """
    expected = expected_tensors(config)
    found = set(checkpoint.names())
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.name}: tensor {missing[0]} is missing{more}; its config asks for it"
        )
    for name, shape in expected.items():
        got = checkpoint.shape(name)
        if got != shape:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name} has shape {list(got)}, its config asks for {list(shape)}"
            )
        checkpoint.dtype(name)
    # No reference implementation reads these either: rotary buffers and a decoder's embedding, which old
    # versions stored, and a patcher that the patching rule does not ask.
    unasked = "model.patcher." if config.patcher is None else ()
    for name in sorted(found - expected.keys() - {"model.local_decoder.embed_tokens.weight"}):
        if not name.endswith(".rotary_emb.inv_freq") and not name.startswith(unasked):
            raise CheckpointError(
                f"{checkpoint.name}: tensor {one_line(name)} is not part of the BLT that its config describes"
            )


def _stack(prefix: str, stack: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    width = stack.width
    for layer in range(stack.layers):
        base = f"{prefix}.layers.{layer}"
        yield f"{base}.input_layernorm.weight", (width,)
        yield from _projections(f"{base}.self_attn", stack)
        yield f"{base}.post_attention_layernorm.weight", (width,)
        yield f"{base}.mlp.gate_proj.weight", (stack.intermediate, width)
        yield f"{base}.mlp.up_proj.weight", (stack.intermediate, width)
        yield f"{base}.mlp.down_proj.weight", (width, stack.intermediate)


def _cross_attention(prefix: str, stack: TransformerConfig, all_layers: bool) -> Iterator[tuple[str, Shape]]:
    for layer in range(stack.layers if all_layers else 1):
        base = f"{prefix}.cross_attn_layers.{layer}"
        yield from _projections(base, stack)
        yield f"{base}.q_norm.weight", (stack.width,)
        yield f"{base}.k_norm.weight", (stack.width,)


def _projections(base: str, stack: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    kv_width = stack.kv_heads * stack.head_dim
    for name, rows in (("q", stack.width), ("k", kv_width), ("v", kv_width), ("o", stack.width)):
        yield f"{base}.{name}_proj.weight", (rows, stack.width)


def _part(name: str, config: ModelConfig) -> str | None:
    """The part of a bundle that a tensor goes to; None for one that does not affect the output."""
    if name in (EMBEDDING, HASH_EMBEDDING):
        return "tables"
    if name.startswith("model.patcher."):
        return "patcher"
    if name.startswith("model.global_transformer."):
        return "latent"
    if name.startswith("model.local_encoder."):
        if "cross_attn_layers" in name:
            last = config.encoder.layers - 1 if config.encoder_cross_all_layers else 0
            return "latent" if name.split(".")[3] == str(last) else None
        return "latent" if "patch_embedding_projection" in name else "encoder"
    crossing = "cross_attn_layers" in name or "patch_embedding_projection" in name
    return "latent" if crossing and name.endswith(_PER_PATCH) else "decoder"
