"""Training rows of the demo model: a function of seed and step alone, so that a resumed run sees the same."""

from __future__ import annotations

import lzma
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BOS, OFFSET = 1, 4
SHARES = {"story": 0.92, "udhr": 0.04, "code": 0.04}
CODE_BYTES = 900_000


def source_code(limit: int = CODE_BYTES) -> bytes:
    """Python's own standard library: its top-level files by name, cut at `limit` bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for path in sorted(folder.glob("*.py"), key=lambda p: p.name):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def load(corpus: Path) -> dict[str, np.ndarray]:
    """The three sources as arrays of ids (byte + 4)."""
    with lzma.open(corpus / "storybook_train.txt.xz") as handle:
        story = handle.read()
    texts = {"story": story, "udhr": (corpus / "udhr_sample.txt").read_bytes(), "code": source_code()}
    return {name: np.frombuffer(text, np.uint8).astype(np.int16) + OFFSET for name, text in texts.items()}


def rows(
    sources: dict[str, np.ndarray], seed: tuple[int, int], count: int, length: int
) -> tuple[Tensor, Tensor]:
    """`count` rows of BOS and `length` ids from random places: inputs and targets, both [count, length]."""
    rng = np.random.default_rng(seed)
    names = list(SHARES)
    batch = np.full((count, length + 1), BOS, np.int64)
    for row in batch:
        source = sources[names[int(rng.choice(len(names), p=list(SHARES.values())))]]
        start = int(rng.integers(0, len(source) - length))
        row[1:] = source[start : start + length]
    ids = torch.from_numpy(batch)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
