"""Reading and changing an ONNX graph, for all that rewrites one. Knows nothing of what a graph computes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

__all__ = ["add_constant", "input_of", "made_by", "weights_from"]


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
