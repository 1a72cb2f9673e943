"""Evaluation and sampling with transformers' own float32 forward pass: no code shared with training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .demo_data import BOS, OFFSET


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
