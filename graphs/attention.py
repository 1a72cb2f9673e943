"""Rewriting a stage graph's attention into what one engine runs fastest.

The portable graph spells attention out in some thirty standard operators a layer, which any engine takes. It
keeps the cache and the new keys and values apart, with one softmax over both their scores, so that an engine
that runs it node by node never copies the cache. Two rewrites:

- `fuse_attention`, for ONNX Runtime. At one position a step, starting the operators takes as long as reading
  the weights of a small model, and reading the cache through general products takes longer than its bytes.
  `com.microsoft.GroupQueryAttention` rotates, appends to the cache in place, masks and mixes in one operator,
  over a cache whose positions lie in order:

      past.N.key, past.N.value [B, Hkv, C, head_dim]  the layer's cache; present.N.* are the same buffers
      past_length int32 [B]                           total_length - 1, which the operator calls seqlens_k
      total_length int32 []                           positions in the cache after this call

- `join_attention`, for TensorRT, which takes the portable graph for a dozen separate steps, and whose working
  memory grows by a copy of the cache with every layer. Keys and values that are joined first, one product,
  mask, softmax and product are attention to it: the memory of one layer is enough for all. Inputs, outputs,
  weights and masks stay as they are. Query heads that share a key head stay rows of one product, which
  TensorRT-RTX fuses; repeating keys for every query head, or a fifth axis, takes more memory.

What it does not know: files, weights, how a cache is kept (`runtime.cache`), what an engine makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..runtime.errors import BltError
from ..runtime.manifest import StageSpec
from .surgery import add_constant, input_of, made_by

__all__ = ["DOMAIN", "attention_node", "fuse_attention", "half_attention", "join_attention"]

DOMAIN = "com.microsoft"
"""ONNX Runtime's own operators."""

# The axis of positions in keys and values [B, Hkv, positions, head_dim].
_SLOTS = 2


@contextmanager
def _as_written(file: str) -> Iterator[None]:
    """Around a rewrite that takes for granted what `graphs.layers` builds, of a graph that came from `file`.

    A bundle is untrusted: its graph may be anything. What the rewrite stumbles over becomes a BltError.
    """
    try:
        yield
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BltError(f"{file}: its attention is not what this version writes; export it again") from error


def _attention_layers(graph: ir.Graph) -> list[list[ir.Node]]:
    """Nodes of each layer's attention between its two weight products, in the layers' order."""
    scopes: dict[str, list[ir.Node]] = {}
    for node in graph:
        scope, found, rest = str(node.name).partition("/self_attn/")
        if found and "/" not in rest and "." not in rest:
            scopes.setdefault(scope, []).append(node)
    return list(scopes.values())


# 1. ONNX Runtime's operator.


def attention_node(
    joined: ir.Value, operands: Sequence[ir.Value], *, heads: int, kv_heads: int, window: int, name: str
) -> ir.Node:
    """The fused operator over `joined` queries, keys and values [B, S, (heads + 2 * kv_heads) * head_dim].

    operands: past key and value, past_length, total_length, cos, sin, positions. window: -1 = none.
    """
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "do_rotary": 1,
        # Weights are stored so that the two of a pair lie in the two halves of a head (graphs.layers).
        "rotary_interleaved": 0,
        "local_window_size": window,
    }
    inputs = [joined, None, None, *operands]
    return ir.node("GroupQueryAttention", inputs, attributes, domain=DOMAIN, num_outputs=3, name=name)


def fuse_attention(model: ir.Model, spec: StageSpec, window_offset: int = 0) -> None:
    """Change a portable stage graph in place; `spec` is the stage's description in the manifest.

    window_offset: what the version that will run it counts more than the window.
    Raises BltError when the graph is not one that this version writes.
    """
    graph = model.graph
    with _as_written(spec.file):
        layers = _attention_layers(graph)
        if len(layers) != spec.layers:
            raise BltError(
                f"{spec.file}: {len(layers)} attention layers found, the manifest has {spec.layers}"
            )
        tables = _rotary_tables(graph, spec)
        lengths = [
            ir.val("past_length", ir.DataType.INT32, ["batch"]),
            ir.val("total_length", ir.DataType.INT32, []),
        ]
        inputs = {str(value.name): value for value in graph.inputs}
        presents: list[ir.Value] = []
        for index, nodes in enumerate(layers):
            past = [inputs[f"past.{index}.{kind}"] for kind in ("key", "value")]
            operands = [*past, *lengths, *tables, inputs["positions"]]
            presents += _fuse_layer(graph, nodes, spec, operands, window_offset)
        for value in list(graph.outputs):
            if value.name == "new_kv":
                graph.outputs.remove(value)
        graph.outputs.extend(presents)
        graph.inputs.remove(inputs["past_positions"])
        graph.inputs.extend(lengths)
        model.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)


def _fuse_layer(
    graph: ir.Graph, nodes: list[ir.Node], spec: StageSpec, operands: list[ir.Value], window_offset: int
) -> list[ir.Value]:
    """Put one operator in place of a layer's nodes; returns the layer's caches after the call."""
    first, last = nodes[0], nodes[-1]
    assert first.op_type == "Reshape"
    # Query heads, from the shape [0, 0, heads + 2 * kv_heads, head_dim] that the joined product is given.
    shape = [int(size) for size in _constant(first, 1)]
    heads = shape[2] - 2 * spec.kv_heads if len(shape) == 4 else 0
    if heads < 1 or shape[3] != spec.head_dim:
        raise BltError(f"{spec.file}: its heads are not those of the manifest; export it again")
    node = attention_node(
        input_of(first, 0),
        operands,
        heads=heads,
        kv_heads=spec.kv_heads,
        window=-1 if spec.window is None else spec.window + window_offset,
        name=str(last.name).rpartition("/")[0] + "/attention",
    )
    graph.insert_before(last, node)
    output, *presents = node.outputs
    output.name = f"{node.name}.output"
    last.outputs[0].replace_all_uses_with(output)
    for past, present in zip(operands[:2], presents, strict=True):
        present.name = str(past.name).replace("past.", "present.", 1)
        present.shape, present.type = past.shape, past.type
    return presents


def _rotary_tables(graph: ir.Graph, spec: StageSpec) -> list[ir.Value]:
    """cos and sin float32 [max_positions, head_dim / 2] as the portable graph computes them."""
    cosines = [node for node in graph if node.op_type == "Cos" and _is_rotary(node)]
    frequencies = [
        value.const_value
        for name, value in graph.initializers.items()
        if name.endswith("rotary_emb.inv_freq")
    ]
    if len(frequencies) != 1 or not cosines or frequencies[0] is None:
        raise BltError(f"{spec.file}: its rotary embedding is not what this version writes; export it again")
    # What cos and sin are multiplied with (yarn), 1 when nothing is.
    scales = [
        user for user in cosines[-1].outputs[0].consumers() if user.op_type == "Mul" and _is_rotary(user)
    ]
    scale = np.float32(_constant(scales[0], 1) if scales else 1.0)
    inverse = frequencies[0].numpy().astype(np.float32, copy=False)
    assert inverse.shape == (spec.head_dim // 2,)
    angles = np.arange(spec.max_positions, dtype=np.float32)[:, None] * inverse
    return [
        add_constant(graph, f"rotary.{name}", ir.tensor((function(angles) * scale).astype(np.float32)))
        for name, function in (("cos", np.cos), ("sin", np.sin))
    ]


def _is_rotary(node: ir.Node) -> bool:
    return "/rotary_emb/" in f"/{node.name}"


def _constant(node: ir.Node, place: int) -> Any:
    tensor = input_of(node, place).const_value
    assert tensor is not None
    return tensor.numpy()


# 2. What TensorRT fuses.


def half_attention(spec: StageSpec) -> bool:
    """Whether a stage's attention reads float16: where its weights are rounded to as much, or further."""
    return spec.precision != "fp32"


def join_attention(model: ir.Model, file: str, *, half: bool = False) -> int:
    """Change a portable stage graph in place; returns how many layers have attention.

    file: where the graph came from, for the error. half: both products read float16; the caches at the
    graph's border, masks and softmax stay float32. Raises BltError when the attention is not what this
    version writes.
    """
    with _as_written(file):
        layers = _attention_layers(model.graph)
        for nodes in layers:
            _join_layer(model.graph, nodes, half)
        RemoveUnusedNodesPass()(model)
        return len(layers)


def _join_layer(graph: ir.Graph, nodes: list[ir.Node], half: bool) -> None:
    (softmax,) = [node for node in nodes if node.op_type == "Softmax"]
    scope = str(softmax.name).rpartition("/")[0]

    def add(before: ir.Node, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """A new node's only output; the node and it are called as the graph's own are."""
        node = ir.node(operator, inputs, attributes, name=f"{scope}/{operator}_joined_{len(graph)}")
        node.outputs[0].name = f"v_{node.name}"
        graph.insert_before(before, node)
        return node.outputs[0]

    # 1. What is there, from the softmax up and down.
    masked = _maker(softmax, 0, "Add")
    joined = _maker(masked, 0, "Concat")
    past_scores, new_scores = (_maker(joined, place, "MatMul") for place in range(len(joined.inputs)))
    query = input_of(past_scores, 0)
    assert new_scores.inputs[0] is query
    transposed = [_maker(scores, 1, "Transpose") for scores in (past_scores, new_scores)]
    assert all(list(node.attributes["perm"].as_ints()) == [0, 1, 3, 2] for node in transposed)
    keys = [input_of(node, 0) for node in transposed]
    past_slice, new_slice = _users(softmax, "Slice")
    slots = input_of(past_slice, 2)
    assert slots is new_slice.inputs[1]
    shape = slots.producer()
    assert shape is not None
    assert shape.inputs[0] is keys[0]
    products = [_users(part, "MatMul") for part in (past_slice, new_slice)]
    values = [input_of(product, 1) for (product,) in products]
    (mixed,) = _users(products[0][0], "Add")
    assert mixed is _users(products[1][0], "Add")[0]
    # 2. What takes its place.
    key = add(masked, "Concat", *keys, axis=_SLOTS)
    value = add(masked, "Concat", *values, axis=_SLOTS)
    if half:
        query, key, value = (
            add(masked, "Cast", part, to=ir.DataType.FLOAT16) for part in (query, key, value)
        )
    scores = add(masked, "MatMul", query, add(masked, "Transpose", key, perm=[0, 1, 3, 2]))
    masked.replace_input_with(0, add(masked, "Cast", scores, to=ir.DataType.FLOAT) if half else scores)
    weights = softmax.outputs[0]
    if half:
        weights = add(mixed, "Cast", weights, to=ir.DataType.FLOAT16)
    result = add(mixed, "MatMul", weights, value)
    if half:
        result = add(mixed, "Cast", result, to=ir.DataType.FLOAT)
    mixed.outputs[0].replace_all_uses_with(result)


def _maker(node: ir.Node, place: int, operator: str) -> ir.Node:
    maker = made_by(input_of(node, place), operator)
    assert maker is not None
    return maker


def _users(node: ir.Node, operator: str) -> list[ir.Node]:
    users = [user for user, _ in node.outputs[0].uses()]
    assert all(user.op_type == operator for user in users)
    return users
