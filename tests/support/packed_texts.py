"""Inputs of several texts for a packed graph, made of those of each alone; and each one's outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .quantized import Session

__all__ = ["fused_feeds", "outputs_of", "packed_feeds", "run", "share_apart"]

Feeds = dict[str, np.ndarray]

# What a text has to itself; everything else lies behind one another.
OWN = re.compile(r"past\..*|past_.*|total_length|patch_values|new_kv|present\..*")


def packed_feeds(texts: Sequence[Feeds]) -> Feeds:
    """Inputs of a packed graph, of each text's for the graph for one."""
    feeds: Feeds = {"rows": np.array([text["positions"].shape[1] for text in texts])}
    for name in texts[0]:
        if OWN.fullmatch(name):
            feeds.update({f"row{row}.{name}": text[name] for row, text in enumerate(texts)})
        else:
            feeds[name] = np.concatenate([text[name] for text in texts], axis=1)
    return feeds


def outputs_of(outputs: Feeds, counts: Sequence[int]) -> list[Feeds]:
    """Each text's part of a packed graph's outputs, as the graph for one names them."""
    ends = np.cumsum(counts)
    texts: list[Feeds] = []
    for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
        own = {name.removeprefix(f"row{row}."): each for name, each in outputs.items()}
        texts.append(
            {
                name: each if OWN.fullmatch(name) and name != "patch_values" else each[:, end - count : end]
                for name, each in own.items()
                if not re.match(r"row\d+\.", name)
            }
        )
    return texts


def run(graph: Session, feeds: Feeds) -> Feeds:
    """Every output, by name."""
    names = [value.name for value in graph.get_outputs()]
    return dict(zip(names, graph.run(names, feeds), strict=True))


def fused_feeds(graph: Session, count: int, *, held: int, capacity: int, seed: int) -> Feeds:
    """One text's inputs for a graph with fused attention, `count` positions after `held` in its cache."""
    random = np.random.default_rng(seed)
    sizes = {"batch": 1, "bytes": count, "patches": count, "past": capacity, "patch_length": 4}
    bounds = {"byte_ids": (4, 260), "patch_lengths": (1, 5), "patch_index": (0, 5)}
    feeds: Feeds = {}
    for value in graph.get_inputs():
        shape = [sizes.get(axis, 5) if isinstance(axis, str) else axis for axis in value.shape]
        if value.type == "tensor(float)":
            feeds[value.name] = random.normal(size=shape).astype(np.float32)
        elif value.name in bounds:
            feeds[value.name] = random.integers(*bounds[value.name], shape)
    total = held + count
    lengths = {"past_length": np.array([total - 1], np.int32), "total_length": np.array(total, np.int32)}
    return {**feeds, **lengths, "positions": held + np.arange(count)[None]}


def share_apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference as a share of the scale; infinite for what is no number."""
    assert found.shape == wanted.shape
    share = float(np.abs(found - wanted).max(initial=0) / max(1.0, np.abs(wanted).max(initial=0)))
    return share if np.isfinite(share) else np.inf
