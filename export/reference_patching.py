"""Patch boundaries for the oracle, where transformers has no rule or a non-causal one.

Written from Meta's description once more, byte by byte and as plainly as possible, so that it can check the
runtime's incremental patching without sharing a line with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["causal_starts", "patching_mode", "transformers_patching"]

_OFFSET = 4
_THRESHOLD = 1.335442066192627


def patching_mode(config: Mapping[str, Any]) -> str:
    """The rule of a parsed `config.json`: "byte" where patching is switched off, else its `patching_mode`."""
    return str(config.get("patching_mode", "entropy")) if config.get("patch_in_forward", True) else "byte"


def transformers_patching(config: Mapping[str, Any]) -> bool:
    """Whether transformers by itself patches as a causal runtime must: plain entropy, or every byte a patch.

    Otherwise the lengths must be given to it: Meta's other rules are unknown to it, and with
    `max_patch_length` it loses the empty patch at the end of a text.
    """
    extras = ("monotonicity", "patching_threshold_add", "max_patch_length")
    mode = patching_mode(config)
    return mode == "byte" or (mode == "entropy" and not any(config.get(name) for name in extras))


def causal_starts(
    config: Mapping[str, Any], ids: Sequence[int], entropies: npt.NDArray[np.float32] | None
) -> list[int]:
    """Patch starts over positions 0..n, n = len(ids), so that the last one may lie just behind the text.

    `config` is a parsed `config.json`: `patching_mode`, `patching_threshold`, `patching_threshold_add`,
    `monotonicity`, `patch_size`, `max_patch_length` and `patch_in_forward` count. `entropies` [n] are needed
    in mode "entropy" only.
    """
    starts = [0]
    longest = config.get("max_patch_length") or math.inf
    for i in range(len(ids)):
        full = i + 1 - starts[-1] >= longest
        if i == 0 or full or _begins(config, i, ids, entropies):
            starts.append(i + 1)
    return starts


def _begins(
    config: Mapping[str, Any], i: int, ids: Sequence[int], entropies: npt.NDArray[np.float32] | None
) -> bool:
    """Whether position i + 1 >= 2 starts a patch, were patches as long as they like."""
    mode = patching_mode(config)
    if mode == "byte":
        return True
    if mode == "static":
        return bool(i % config.get("patch_size", 4) == 0)
    if mode == "space":
        return ids[i] < _OFFSET or (_space_like(ids[i]) and not _space_like(ids[i - 1]))
    if mode != "entropy" or entropies is None:
        raise ValueError(f"patching_mode {mode!r} with entropies {entropies}: no such rule")
    threshold = np.float32(config.get("patching_threshold", _THRESHOLD))
    add = config.get("patching_threshold_add")
    rise = entropies[i] - entropies[i - 1]
    if config.get("monotonicity"):
        return i == 1 or bool(rise > threshold)
    if add:
        return i == 1 or (i > 2 and bool(rise > np.float32(add) and entropies[i] > threshold))
    return bool(entropies[i] > threshold)


def _space_like(token: int) -> bool:
    byte = token - _OFFSET
    return byte < 0 or byte >= 0xC0 or (byte < 0x80 and not chr(byte).isalnum())
