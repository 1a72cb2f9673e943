"""Reading and changing an ONNX graph, for all that rewrites one. Knows nothing of what a graph computes."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["add_constant", "input_of", "made_by"]


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
