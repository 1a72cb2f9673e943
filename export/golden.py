"""The golden file: what transformers computed of a text, so that a machine without torch can check an export.

A safetensors file of under 1.5 MB beside the checkpoint: the text, its patch boundaries, entropies, logits,
and a greedy continuation. It names the checkpoint by its fingerprint, so that one made from other weights is
refused. Reading needs safetensors and numpy only, and trusts nothing in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.errors import BltError, first_line, requirement
from ..runtime.files import write_whole
from ..runtime.paths import native_path
from .checkpoint import CheckpointError, open_checkpoint
from .huggingface import header_length
from .reference import Reference, ReferenceTrace, pick_margins

__all__ = ["GOLDEN_NAME", "GOLDEN_TEXT", "Golden", "GoldenError", "read_golden", "write_golden"]

Floats = npt.NDArray[np.float32]

GOLDEN_NAME = "golden.safetensors"
"""The file's name beside `config.json`."""

GOLDEN_TEXT = (
    "The lighthouse keeper wrote one line a day, and on most days the line was about the weather. "
    "\u201cFog again,\u201d he would write; or, when the wind had turned, \u201cClear to the north.\u201d "
    "Θάλασσα ήσυχη ως το πρωί. 灯台の光が、ゆっくりと回る。 Маяк светит всю ночь — до утра. समुद्र शांत है। 🌊⚓ "
    "On the 31st of March 1892 he wrote 4,127 words instead, and nobody in the town below knows why.\n\n"
    "def beam(angle: float) -> tuple[float, float]:\n"
    "    return math.cos(angle), math.sin(angle)  # x, y\n\n"
    "\tKeeper:  “Où est la clé?”  Über der Tür.\r\n"
    "Nothing was ever missing from the shelves afterwards, except the clock."
).encode()
"""About 700 bytes of English, other scripts, code and odd spacing: past a window of 128 five times over."""

_WRITE_AGAIN = "write it again with python -m blt_edge.tools.models.write_golden"
_FORMAT = "blt-edge golden 1"
_LARGEST_FILE = 64 << 20
_LONGEST_TEXT = 65536
_CLEAR_PICK = 1e-4
_CLEAR_BOUNDARY = 1e-5
_DTYPES = {
    "ids": np.int64,
    "patch_starts": np.int64,
    "entropies": np.float32,
    "logits": np.float32,
    "prompt": np.uint8,
    "greedy": np.uint8,
    "greedy_margins": np.float32,
}
_METADATA = {
    "format": re.compile(r"blt-edge golden \d{1,6}"),
    "checkpoint_sha256": re.compile(r"[0-9a-f]{64}"),
    "reference": re.compile(r"[\w .+-]{1,80}"),
    "threshold": re.compile(r"|-?[0-9]{1,20}(\.[0-9]{1,30})?(e[+-]?[0-9]{1,3})?"),
    "greedy_count": re.compile(r"\d{1,6}"),
}


class GoldenError(BltError):
    """The golden file is missing, damaged, or belongs to another checkpoint."""


@dataclass(frozen=True, eq=False)
class Golden:
    """The reference's results for one text of n bytes."""

    data: bytes
    """The text, without BOS."""
    patch_lengths: tuple[int, ...]
    """Lengths > 0 of the patches over BOS and the text; they sum to 1 + n."""
    entropies: Floats | None
    """[1 + n] in nats; None when the model's patching rule needs none."""
    logits: Floats
    """[1 + n, 260]; row i follows BOS and the first i bytes."""
    prompt: bytes
    """What the greedy text continues."""
    greedy: bytes
    """Greedy bytes, `greedy_count` of them or fewer where the model ends the text."""
    greedy_margins: Floats
    """[len(greedy)]: how far each picked logit was above the runner-up."""
    greedy_count: int
    """How many greedy bytes were asked for."""
    threshold: float | None
    """The entropy threshold of the checkpoint, where that alone decides the boundaries."""
    checkpoint_sha256: str
    """`Checkpoint.sha256` of the checkpoint, 64 hexadecimal digits."""
    name: str
    """What computed it, such as "transformers 5.23.0"."""

    def check_checkpoint(self, sha256: str) -> None:
        """Raise `GoldenError` unless the golden file was made from the checkpoint of this fingerprint."""
        if sha256 != self.checkpoint_sha256:
            raise GoldenError(
                f"{GOLDEN_NAME} was made from another checkpoint (sha256 {self.checkpoint_sha256[:12]}..., "
                f"this one has {sha256[:12]}...); {_WRITE_AGAIN}"
            )


def write_golden(
    folder: str | Path,
    output: str | Path | None = None,
    greedy_count: int = 200,
    *,
    reference: Reference | None = None,
) -> Path:
    """Run the checkpoint in `folder` in transformers and write its golden file, whole or not at all.

    `output` None puts `golden.safetensors` into the folder. `reference` None loads the checkpoint; another
    one of the same checkpoint is asked instead. Text and prompt are chosen such that no pick and
    no boundary is within rounding of another. Raises `ReferenceModelError`, `CheckpointError` or OSError.
    """
    from safetensors.numpy import save

    with open_checkpoint(Path(folder)) as checkpoint:
        sha256 = checkpoint.sha256()
    reference = reference or Reference.load(folder)
    trace = _clear_trace(reference)
    prompt, greedy, margins = _clear_greedy(reference, trace.data, greedy_count)
    lengths = np.array(reference.patch_lengths(trace.data), np.int64)
    tensors: dict[str, npt.NDArray[Any]] = {
        "ids": trace.ids,
        "patch_starts": np.cumsum(lengths) - lengths,
        "logits": trace.logits,
        "prompt": np.frombuffer(prompt, np.uint8),
        "greedy": np.frombuffer(greedy, np.uint8),
        "greedy_margins": margins,
    }
    if trace.entropies is not None:
        tensors["entropies"] = trace.entropies
    metadata = {
        "format": _FORMAT,
        "checkpoint_sha256": sha256,
        "reference": reference.name,
        "threshold": "" if reference.threshold is None else repr(reference.threshold),
        "greedy_count": str(greedy_count),
    }
    path = Path(folder) / GOLDEN_NAME if output is None else Path(output)
    payload = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata)
    write_whole(path, lambda temporary: temporary.write_bytes(payload))
    return path


def read_golden(path: str | Path) -> Golden:
    """Read and check a golden file. Raises `GoldenError` in one line when it is missing or not sound."""
    tensors, metadata = _load(path := Path(path))
    if fault := _fault(tensors, metadata):
        raise GoldenError(f"{path}: {fault}; {_WRITE_AGAIN}")
    ids = tensors["ids"]
    return Golden(
        data=(ids[1:] - 4).astype(np.uint8).tobytes(),
        patch_lengths=tuple(int(length) for length in np.diff([*tensors["patch_starts"], len(ids)])),
        entropies=tensors.get("entropies"),
        logits=tensors["logits"],
        prompt=tensors["prompt"].tobytes(),
        greedy=tensors["greedy"].tobytes(),
        greedy_margins=tensors["greedy_margins"],
        greedy_count=int(metadata["greedy_count"]),
        threshold=float(metadata["threshold"]) if metadata["threshold"] else None,
        checkpoint_sha256=metadata["checkpoint_sha256"],
        name=metadata["reference"],
    )


# 1. Writing: a text and a prompt on which two correct implementations cannot disagree.


def _clear_trace(reference: Reference) -> ReferenceTrace:
    text = GOLDEN_TEXT[: reference.max_positions - 1]
    for start in range(0, min(64, len(text) // 2), 8):
        trace = reference.trace(text[start:])
        if _boundary_margin(reference, trace) >= _CLEAR_BOUNDARY:
            break
    return trace


def _clear_greedy(reference: Reference, text: bytes, count: int) -> tuple[bytes, bytes, Floats]:
    found: list[tuple[float, bytes, bytes, Floats]] = []
    for length in (64, 96, 150, 31):
        prompt = text[: min(length, max(0, reference.max_positions - 1 - count))]
        greedy = reference.greedy(prompt, count)
        trace = reference.trace(prompt + greedy)
        margins = pick_margins(trace.logits[len(prompt) : len(prompt) + len(greedy)])
        boundary = _boundary_margin(reference, trace) / _CLEAR_BOUNDARY
        clear = min(boundary, float(margins.min(initial=np.inf)) / _CLEAR_PICK)
        found.append((clear, prompt, greedy, margins))
        if clear >= 1:
            break
    return max(found, key=lambda sample: sample[0])[1:]


def _boundary_margin(reference: Reference, trace: ReferenceTrace) -> float:
    if reference.threshold is None or trace.entropies is None:
        return np.inf
    return float(np.abs(trace.entropies[1:] - reference.threshold).min(initial=np.inf))


# 2. Reading with suspicion.


def _load(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise GoldenError(
            f"reading a golden file needs safetensors: pip install {requirement('export')}"
        ) from error
    if not path.is_file():
        raise GoldenError(f"{path}: no such file; write it with python -m blt_edge.tools.models.write_golden")
    if path.stat().st_size > _LARGEST_FILE:
        raise GoldenError(f"{path}: over {_LARGEST_FILE} bytes, a golden file is smaller")
    try:
        with path.open("rb") as header:
            header_length(header, path)
        with native_path(path) as name, safe_open(name, "numpy") as file:
            # Looked at before any tensor is read: a name of another file, or a type numpy lacks, ends here.
            if not set(file.keys()) <= _DTYPES.keys():
                raise GoldenError(f"{path}: holds other tensors than a golden file; is it a model?")
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except CheckpointError as error:  # which names the file
        raise GoldenError(f"{error}; or {_WRITE_AGAIN}") from error
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise GoldenError(f"{path}: can't be read: {first_line(error)}; {_WRITE_AGAIN}") from error


def _fault(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> str | None:
    """What is wrong with a file's contents; None when all is as it should be."""
    for name, pattern in _METADATA.items():
        if not pattern.fullmatch(metadata.get(name, "\n")):
            return f"its metadata {name} is {metadata.get(name)!r:.60}"
    if metadata["format"] != _FORMAT:
        return f"its format is {metadata['format']!r}, this version reads {_FORMAT!r}"
    for name, dtype in _DTYPES.items():
        if name not in tensors:
            if name != "entropies":
                return f"tensor {name} is missing"
        elif tensors[name].dtype != dtype or tensors[name].ndim != 1 + (name == "logits"):
            return f"tensor {name} is {tensors[name].dtype} with {tensors[name].ndim} axes"
        elif tensors[name].dtype == np.float32 and not np.isfinite(tensors[name]).all():
            return f"tensor {name} has values that are not finite"
    # What its parts say of each other.
    ids, starts = tensors["ids"], tensors["patch_starts"]
    count = len(ids)
    bytes_only = count == 1 or (count and 4 <= ids[1:].min() <= ids.max() < 260)
    if not 1 <= count <= _LONGEST_TEXT or ids[0] != 1 or not bytes_only:
        return "its ids are not BOS and bytes"
    if not len(starts) or starts[0] != 0 or starts[-1] >= count or (np.diff(starts) <= 0).any():
        return f"its patch starts do not rise from 0 to under {count}"
    for name, shape in {"logits": (count, 260), "entropies": (count,)}.items():
        if name in tensors and tensors[name].shape != shape:
            return f"its {name} have shape {tensors[name].shape}, expected {shape}"
    greedy, margins = len(tensors["greedy"]), len(tensors["greedy_margins"])
    greedy_count = int(metadata["greedy_count"])
    if greedy > greedy_count or greedy != margins:
        return f"it has {greedy} greedy bytes of {greedy_count} and {margins} margins"
    return None
