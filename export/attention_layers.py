"""Where the attention of a stage graph that `graphs.layers` built lies, for what rewrites it for one engine.

What it does not know: what is put in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from ..runtime.errors import BltError

__all__ = ["as_written", "attention_layers"]

_SCOPE = "/self_attn/"


def attention_layers(graph: ir.Graph) -> list[list[ir.Node]]:
    """Nodes of each layer's attention between its two weight products, in the layers' order."""
    scopes: dict[str, list[ir.Node]] = {}
    for node in graph:
        scope, found, rest = str(node.name).partition(_SCOPE)
        if found and "/" not in rest and "." not in rest:
            scopes.setdefault(scope, []).append(node)
    return list(scopes.values())


@contextmanager
def as_written(file: str) -> Iterator[None]:
    """Around a rewrite that takes for granted what `graphs.layers` builds, of a graph that came from `file`.

    A bundle is untrusted: its graph may be anything. What the rewrite stumbles over becomes a BltError.
    """
    try:
        yield
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BltError(f"{file}: its attention is not what this version writes; export it again") from error
