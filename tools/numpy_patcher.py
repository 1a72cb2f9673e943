"""The patcher's entropies in plain numpy, one layer's weights in memory at a time.

For choosing a threshold for a checkpoint just written, without torch and without loading it. Independent of
the graphs.
"""

from __future__ import annotations

import numpy as np
from blt_edge.export.checkpoint import Checkpoint
from blt_edge.graphs.config import TransformerConfig
from blt_edge.runtime.vocabulary import encode
from blt_edge.tools.numpy_layers import Weights, entropies_of, norm, transformer
from numpy.typing import NDArray

__all__ = ["patcher_entropies"]


def patcher_entropies(checkpoint: Checkpoint, patcher: TransformerConfig, data: bytes) -> NDArray[np.float32]:
    """Entropies float32 [1 + len(data)], nats: row i follows BOS and the first i bytes."""
    weights = Weights(checkpoint)
    states = weights.of("model.patcher.embed_tokens")[encode(data)]
    states = transformer(states, patcher, weights, "model.patcher")
    states = norm(states, weights.of("model.patcher.norm"), patcher.norm_eps)
    return entropies_of(weights.linear("model.patcher.lm_head", states)).astype(np.float32)
