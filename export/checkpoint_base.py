"""What every checkpoint looks like from outside, whatever its layout: tensors under Hugging Face names,
streamed.

Nothing is loaded ahead: a tensor, or some rows of it, is read when asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import BltError

__all__ = ["Checkpoint", "CheckpointError", "Piece", "TensorFile", "one_line", "read_json", "sample_blocks"]

DTYPES = ("float16", "bfloat16", "float32")
"""Element types that a checkpoint may store."""

_MAX_JSON_BYTES = 64 << 20
_BLOCKS = 64
_BLOCK_BYTES = 4096


class CheckpointError(BltError):
    """The checkpoint is missing, damaged, incomplete, or not one that can be exported."""


class TensorFile(Protocol):
    """One file of tensors under its own names."""

    path: Path

    def names(self) -> Sequence[str]:
        """Names of the stored tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""

    def dtype(self, name: str) -> str:
        """One of `DTYPES`; raises `CheckpointError` for any other stored type."""

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis as a new float32 array (a scalar has one row)."""

    def fingerprint(self, digest: Any) -> None:
        """Feed size, structure and sampled contents to a hashlib object."""

    def close(self) -> None:
        """Release the file; reading afterwards is an error."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor: where the rows of a checkpoint's tensor, or some of them, come from."""

    file: TensorFile
    name: str
    """The tensor's name in the file."""


class Checkpoint:
    """A trained model's config and weights. A context manager; `close` releases its files.

    Not safe for use by several threads at once.
    """

    name: str
    """What the user called it: a folder's name, a hub id, or `demo`."""
    layout: str
    """`huggingface` or `meta`: the layout of the files. Names and config are Hugging Face's in both."""
    config: dict[str, Any]
    """The raw config, in the form of transformers' `config.json`."""

    def __init__(
        self, name: str, layout: str, config: dict[str, Any], tensors: Mapping[str, Sequence[Piece]]
    ) -> None:
        self.name = name
        self.layout = layout
        self.config = config
        self._tensors = {key: tuple(pieces) for key, pieces in tensors.items()}
        files = {id(p.file): p.file for pieces in self._tensors.values() for p in pieces}
        self._files = sorted(files.values(), key=lambda file: str(file.path))

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors, tied ones under both names."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; `CheckpointError` when there is none of that name."""
        pieces = self._pieces(name)
        shapes = [piece.file.shape(piece.name) for piece in pieces]
        if len(shapes) == 1:
            return shapes[0]
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise CheckpointError(
                f"{name}: its {len(shapes)} parts have different row sizes, {one_line(str(shapes))}"
            )
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def dtype(self, name: str) -> str:
        """The stored element type: float16, bfloat16 or float32; any other is refused by name."""
        kinds = {piece.file.dtype(piece.name) for piece in self._pieces(name)}
        return kinds.pop() if len(kinds) == 1 else "float32"

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The whole tensor as a new float32 array, whatever its stored type."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self._pieces(name)[0].file.read(name, 0, 1)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the first axis as a new float32 array; only these are read.

        Raises ValueError when the range is not inside the tensor.
        """
        shape = self.shape(name)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"{name}: rows {start}:{stop} of a tensor of shape {shape}")
        parts: list[NDArray[np.float32]] = []
        offset = 0
        for piece in self._pieces(name):
            count = piece.file.shape(piece.name)[0]
            low, high = max(start - offset, 0), min(stop - offset, count)
            if low < high or (start == stop and not parts):
                parts.append(piece.file.read(piece.name, min(low, count), max(high, min(low, count))))
            offset += count
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def sha256(self) -> str:
        """A fingerprint of the source, hex: cheap even for files of many gigabytes.

        Covers the config, and of each tensor file its name, size, header (names, types, shapes, offsets) and
        64 evenly spaced blocks of 4 KiB, first and last included. It tells checkpoints apart and finds
        truncation; a single changed byte elsewhere goes unnoticed.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self._files:
            digest.update(file.path.name.encode() + b"\0")
            file.fingerprint(digest)
        return digest.hexdigest()

    def close(self) -> None:
        """Release all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.name}: tensor {name} is missing")
        return self._tensors[name]


def one_line(text: str) -> str:
    """Text out of an untrusted file, fit for one line of a message: printable, and at most 200 characters."""
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def read_json(path: Path, limit: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; `CheckpointError` with the path otherwise."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path}: over {limit} bytes, too large for a file of this kind")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
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
