"""Rewriting a stage graph's attention into the form that TensorRT fuses into one kernel.

The portable graph keeps the cache and the new keys and values apart, with one softmax over both their scores,
so that an engine that runs it node by node never copies the cache. TensorRT takes that for a dozen separate
steps, and its working memory grows by a copy of the cache with every layer. Keys and values that are joined
first, one product, mask, softmax and product are attention to it: the memory of one layer is enough for all.

Inputs, outputs, weights and masks stay as they are. Query heads that share a key head stay rows of one
product, which TensorRT-RTX fuses; repeating keys for every query head, or a fifth axis, takes more memory.

What it does not know: files, and what TensorRT makes of it.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..runtime.specs import StageSpec
from .attention_layers import as_written, attention_layers

__all__ = ["half_attention", "join_attention"]

_SLOTS = 2
"""The axis of positions in keys and values [B, Hkv, positions, head_dim]."""


def join_attention(model: ir.Model, file: str, *, half: bool = False) -> int:
    """Change a portable stage graph in place; returns how many layers have attention.

    file: where the graph came from, for the error. half: both products read float16; the caches at the
    graph's border, masks and softmax stay float32. Raises BltError when the attention is not what this
    version writes.
    """
    with as_written(file):
        layers = attention_layers(model.graph)
        for nodes in layers:
            _join_layer(model.graph, nodes, half)
        RemoveUnusedNodesPass()(model)
        return len(layers)


def half_attention(spec: StageSpec) -> bool:
    """Whether a stage's attention reads float16: where its weights are rounded to as much, or further."""
    return spec.precision != "fp32"


def _join_layer(graph: ir.Graph, nodes: list[ir.Node], half: bool) -> None:
    (softmax,) = [node for node in nodes if node.op_type == "Softmax"]
    # 1. What is there, from the softmax up and down.
    masked = _maker(softmax, 0, "Add")
    joined = _maker(masked, 0, "Concat")
    past_scores, new_scores = (_maker(joined, place, "MatMul") for place in range(len(joined.inputs)))
    query = past_scores.inputs[0]
    assert query is not None
    assert new_scores.inputs[0] is query
    keys = [_transposed(scores) for scores in (past_scores, new_scores)]
    past_slice, new_slice = _users(softmax, "Slice")
    slots = past_slice.inputs[2]
    assert slots is new_slice.inputs[1]
    assert slots is not None
    shape = slots.producer()
    assert shape is not None
    assert shape.inputs[0] is keys[0]
    products = [_users(part, "MatMul") for part in (past_slice, new_slice)]
    values = [product.inputs[1] for (product,) in products]
    (mixed,) = _users(products[0][0], "Add")
    assert mixed is _users(products[1][0], "Add")[0]
    # 2. What takes its place.
    new = _Nodes(graph, masked, str(softmax.name).rpartition("/")[0])
    key = new.add("Concat", *keys, axis=_SLOTS)
    value = new.add("Concat", *values, axis=_SLOTS)
    if half:
        query, key, value = (new.add("Cast", part, to=ir.DataType.FLOAT16) for part in (query, key, value))
    scores = new.add("MatMul", query, new.add("Transpose", key, perm=[0, 1, 3, 2]))
    masked.replace_input_with(0, new.add("Cast", scores, to=ir.DataType.FLOAT) if half else scores)
    new = _Nodes(graph, mixed, new.scope)
    weights = softmax.outputs[0]
    if half:
        weights = new.add("Cast", weights, to=ir.DataType.FLOAT16)
    result = new.add("MatMul", weights, value)
    if half:
        result = new.add("Cast", result, to=ir.DataType.FLOAT)
    for user, place in list(mixed.outputs[0].uses()):
        user.replace_input_with(place, result)


class _Nodes:
    """Adds nodes to a graph in front of one of its own."""

    def __init__(self, graph: ir.Graph, before: ir.Node, scope: str) -> None:
        self._graph, self._before, self.scope = graph, before, scope

    def add(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Returns the node's only output; the node and it are called as the graph's own are."""
        assert None not in inputs
        number = len(self._graph)
        node = ir.node(operator, inputs, attributes, name=f"{self.scope}/{operator}_joined_{number}")
        output = node.outputs[0]
        output.name = f"v_{node.name}"
        self._graph.insert_before(self._before, node)
        return output


def _maker(node: ir.Node, place: int, operator: str) -> ir.Node:
    """The node that makes an input."""
    value = node.inputs[place]
    assert value is not None
    maker = value.producer()
    assert maker is not None
    assert maker.op_type == operator
    return maker


def _users(node: ir.Node, operator: str) -> list[ir.Node]:
    """The nodes that read a node's only output."""
    users = [user for user, _ in node.outputs[0].uses()]
    assert all(user.op_type == operator for user in users)
    return users


def _transposed(scores: ir.Node) -> ir.Value:
    """The keys of a product of queries and transposed keys."""
    transpose = _maker(scores, 1, "Transpose")
    assert list(transpose.attributes["perm"].as_ints()) == [0, 1, 3, 2]
    key = transpose.inputs[0]
    assert key is not None
    return key
