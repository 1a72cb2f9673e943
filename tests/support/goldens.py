"""The parity cases' golden files: what transformers computed of each, for platforms without torch.

A file holds, of the checkpoint's pass over `PARITY_TEXT`, every entropy and every patch length, and of each
stage's output a sample that judges every row: `sample` says which numbers. And a greedy text with its prompt.
It names its checkpoint by fingerprint, so that one of other weights is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blt_edge.export.checkpoint import open_checkpoint
from blt_edge.export.reference import Reference, ReferenceTrace, pick_margins
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from .random_models import PARITY_TEXT, RandomModel

__all__ = ["FOLDER", "OUTPUTS", "GreedySample", "ParityGolden", "read_golden", "sample", "write_golden"]

FOLDER = Path(__file__).parents[1] / "data" / "golden"
OUTPUTS = ("patcher_logits", "byte_states", "patch_values", "logits")
"""The stages' outputs, as `ReferenceTrace` and `BltModel.trace` call them."""

_FORMAT = "blt-edge parity golden 1"
_AGAIN = "write the files again where torch is installed: python tests/support/write_goldens.py"
_WHOLE_ROWS = 8
_STRIDE = 97  # a prime over no width's divisor: in time every column has its turn

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GreedySample:
    """A prompt whose greedy continuation no rounding can change."""

    prompt: bytes
    data: bytes


@dataclass(frozen=True, eq=False)
class ParityGolden:
    """One case's file."""

    reference: str
    """What computed it, such as "transformers 5.23.0"."""
    patch_lengths: tuple[int, ...]
    """As in `ReferenceTrace`: the last patch is open, the sum is len(PARITY_TEXT) + 2."""
    entropies: Floats | None
    """[1 + n] in nats; None under a rule that needs none."""
    samples: dict[str, Floats]
    """Of each of `OUTPUTS` that there is, its `sample`."""
    greedy: GreedySample


def sample(output: NDArray[Any]) -> Floats:
    """[rows, width] -> [m]: first, last and some evenly spread rows whole, and one value of every row.

    An error in a state shows in all of its row's values, so one finds it; which one wanders over the width.
    """
    count, width = output.shape
    ends = {0, 1, count - 2, count - 1} & set(range(count))
    whole = sorted(ends | set(np.linspace(0, count - 1, _WHOLE_ROWS - 2).astype(int).tolist()))
    index = np.arange(count)
    return np.concatenate([output[whole].ravel(), output[index, index * _STRIDE % width]])


def write_golden(model: RandomModel, checkpoint: Path, greedy_count: int) -> Path:
    """Run the checkpoint in transformers and write the case's file."""
    reference = Reference.load(checkpoint)
    greedy = _clear_greedy(reference, model, greedy_count)
    trace = reference.trace(PARITY_TEXT)
    tensors: dict[str, NDArray[Any]] = {
        "patch_lengths": np.array(trace.patch_lengths, np.uint16),
        "prompt": np.frombuffer(greedy.prompt, np.uint8),
        "greedy": np.frombuffer(greedy.data, np.uint8),
    }
    if trace.entropies is not None:
        tensors["entropies"] = trace.entropies
    tensors.update(_samples(trace))
    FOLDER.mkdir(parents=True, exist_ok=True)
    metadata = {"format": _FORMAT, "reference": reference.name, "made_from": _made_from(checkpoint)}
    save_file(tensors, _path(model), metadata)
    return _path(model)


def read_golden(model: RandomModel, checkpoint: Path) -> ParityGolden:
    """The case's file. Raises AssertionError with what to do when it is missing or of another checkpoint."""
    path = _path(model)
    assert path.is_file(), f"{path} is missing; {_AGAIN}"
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert metadata["format"] == _FORMAT, f"{path} has format {metadata['format']}; {_AGAIN}"
    assert metadata["made_from"] == _made_from(checkpoint), (
        f"{path} was made from other weights, another config or another text than this checkpoint; {_AGAIN}"
    )
    return ParityGolden(
        reference=metadata["reference"],
        patch_lengths=tuple(tensors["patch_lengths"].tolist()),
        entropies=tensors.get("entropies"),
        samples={name: tensors[name] for name in OUTPUTS if name in tensors},
        greedy=GreedySample(tensors["prompt"].tobytes(), tensors["greedy"].tobytes()),
    )


def _path(model: RandomModel) -> Path:
    return FOLDER / f"{model.name}.safetensors"


def _made_from(folder: Path) -> str:
    with open_checkpoint(folder) as checkpoint:
        return f"checkpoint {checkpoint.sha256()}, text {hashlib.sha256(PARITY_TEXT).hexdigest()}"


def _samples(trace: ReferenceTrace) -> dict[str, Floats]:
    outputs = {name: getattr(trace, name) for name in OUTPUTS}
    return {name: sample(output) for name, output in outputs.items() if output is not None}


def _clear_greedy(reference: Reference, model: RandomModel, count: int) -> GreedySample:
    """`count` greedy bytes after a stretch of the parity text, with every pick and every boundary clear.

    Prompts are tried until the picked logits lead by 1e-3, the entropies keep 1e-4 from the threshold and
    the bytes are not the same few over and over.
    """
    for start in range(0, 1200, 75):
        prompt = PARITY_TEXT[start : start + model.prompt_bytes]
        data = reference.greedy(prompt, count)
        trace = reference.trace(prompt + data)
        margin = float(pick_margins(trace.logits[len(prompt) : -1]).min())
        if reference.threshold is not None and trace.entropies is not None:
            margin = min(margin, 10 * float(np.abs(trace.entropies[1:] - reference.threshold).min()))
        if margin >= 1e-3 and len(data) == count and len(set(data)) >= 12:
            return GreedySample(prompt, data)
    raise AssertionError(f"{model.name}: no prompt gives a clear greedy text; choose another seed")
