"""Reading and changing an ONNX graph, for all that rewrites one. Knows nothing of what a graph computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from ..runtime.errors import BltError, BundleError

__all__ = ["add_constant", "foreign_graph", "input_of", "made_by", "weights_from"]

# What onnx_ir finds odd it says with the graph's own names, which a terminal may obey.
logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)


@contextmanager
def foreign_graph(name: object) -> Iterator[None]:
    """Around reading and rewriting a graph that nobody vouches for, and no more: whatever fails there raises
    BundleError, and nothing is printed. name: what the graph is called.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BltError, MemoryError):
        raise
    except Exception as error:  # there is no end of ways to be wrong
        raise BundleError(
            f"{name} is not a graph that blt-edge wrote ({type(error).__name__}); copy the bundle again or "
            "export the checkpoint again"
        ) from error


def input_of(node: ir.Node, place: int) -> ir.Value:
    """A node's input, which must be there."""
    value = node.inputs[place]
    assert value is not None
    return value


def made_by(value: ir.Value, operator: str) -> ir.Node | None:
    """The node that makes a value, if it is one of this operator."""
    node = value.producer()
    return node if node is not None and node.op_type == operator else None


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of the graph."""
    value = ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value


def weights_from(model: ir.Model, data: Path) -> Path:
    """Let a model's external weights lie where `data` lies, which may be a link; the directory of that file.

    ONNX Runtime refuses weights that a link takes out of their directory.
    """
    real = data.resolve()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if real.name != data.name and isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                real.name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name or "",
                base_dir=real.parent,
            )
    return real.parent if real.name != data.name else data.parent
