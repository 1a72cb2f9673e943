"""The demo model's texts: rows to train on, and what transformers makes of a text, for evaluation.

A training row is a function of seed and step alone, so that a resumed run sees the same. Evaluation and
sampling run transformers' own float32 forward pass: no code shared with training.
"""

from __future__ import annotations

import lzma
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

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


# Evaluation.


def windows(text: bytes, context: int) -> Iterator[Tensor]:
    """Non-overlapping windows of at most `context` ids, each BOS and the next bytes of the text: [1, n]."""
    for start in range(0, len(text), context - 1):
        yield torch.tensor([[BOS, *(byte + OFFSET for byte in text[start : start + context - 1])]])


@torch.no_grad()
def entropies(model: Any, text: bytes, context: int) -> list[Tensor]:
    """The patcher's entropy at every position of every window."""
    return [model.model.patcher(ids)[0][0] for ids in windows(text, context)]


def threshold_for(found: list[Tensor], bytes_per_patch: float) -> float:
    """The threshold for patches of that mean length; positions 0 and 1 of a window always start one."""
    inner = torch.cat([row[1:-1] for row in found])
    total = sum(len(row) for row in found)
    wanted = round(total / bytes_per_patch) - 2 * len(found)
    ordered = inner.sort(descending=True).values
    return float((ordered[wanted - 1] + ordered[wanted]) / 2)


@torch.no_grad()
def bits_per_byte(model: Any, text: bytes, context: int) -> dict[str, float]:
    """Mean bits of a byte over all 260 classes, and the mean patch length, each window's BOS counted in."""
    nats, patches, ids_seen = 0.0, 0, 0
    threshold = model.config.patching_threshold
    for ids in windows(text, context):
        logits = model(ids, use_cache=False).logits[0, :-1]
        nats += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        entropy = model.model.patcher(ids)[0][0]
        patches += min(2, ids.shape[1]) + int((entropy[1:-1] > threshold).sum())
        ids_seen += ids.shape[1]
    return {"bits_per_byte": nats / math.log(2) / len(text), "bytes_per_patch": ids_seen / patches}


@torch.no_grad()
def sample(model: Any, prompt: bytes, length: int, temperature: float, seed: int) -> str:
    """`prompt` and `length` sampled bytes, everything recomputed for each byte."""
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS, *(byte + OFFSET for byte in prompt)]
    for _ in range(length):
        logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
        logits[:OFFSET] = -math.inf
        ids.append(
            int(torch.multinomial(functional.softmax(logits / temperature, -1), 1, generator=generator))
        )
    return bytes(i - OFFSET for i in ids[1:]).decode("utf-8", "replace")
