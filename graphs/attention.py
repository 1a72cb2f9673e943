"""Where the attention of a stage graph that `graphs.layers` built lies, for what rewrites it for one engine.

What it does not know: what is put in its place.

Rewriting a stage graph's attention into ONNX Runtime's fused operator, for forms built for one device.

The portable graph spells attention out in some thirty standard operators a layer, which any engine takes. At
one position a step, starting them takes as long as reading the weights of a small model, and reading the
cache through general products takes longer than its bytes. `com.microsoft.GroupQueryAttention` rotates,
appends to the cache in place, masks and mixes in one operator, over a cache whose positions lie in order:

    past.N.key, past.N.value [B, Hkv, C, head_dim]  the layer's cache; present.N.* are the same buffers
    past_length int32 [B]                           total_length - 1, which the operator calls seqlens_k
    total_length int32 []                           positions in the cache after this call

What it does not know: files, weights, how a cache is kept (`runtime.cache`).

Rewriting a stage graph's attention into the form that TensorRT fuses into one kernel.

The portable graph keeps the cache and the new keys and values apart, with one softmax over both their scores,
so that an engine that runs it node by node never copies the cache. TensorRT takes that for a dozen separate
steps, and its working memory grows by a copy of the cache with every layer. Keys and values that are joined
first, one product, mask, softmax and product are attention to it: the memory of one layer is enough for all.

Inputs, outputs, weights and masks stay as they are. Query heads that share a key head stay rows of one
product, which TensorRT-RTX fuses; repeating keys for every query head, or a fifth axis, takes more memory.

What it does not know: files, and what TensorRT makes of it.
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

__all__ = [
    "DOMAIN",
    "as_written",
    "attention_layers",
    "attention_node",
    "fuse_attention",
    "half_attention",
    "join_attention",
]

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


DOMAIN = "com.microsoft"
"""ONNX Runtime's own operators."""


def fuse_attention(model: ir.Model, spec: StageSpec, window_offset: int = 0) -> None:
    """Change a portable stage graph in place; `spec` is the stage's description in the manifest.

    window_offset: `operator_probes.window_offset` of the version that will run it.
    Raises BltError when the graph is not one that this version writes.
    """
    with as_written(spec.file):
        _fuse(model, spec, window_offset)


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


def _fuse(model: ir.Model, spec: StageSpec, window_offset: int) -> None:
    graph = model.graph
    layers = attention_layers(graph)
    if len(layers) != spec.layers:
        raise BltError(f"{spec.file}: {len(layers)} attention layers found, the manifest has {spec.layers}")
    cos, sin = _rotary_tables(graph, spec)
    lengths = [
        ir.Value(name="past_length", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT32)),
        ir.Value(name="total_length", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32)),
    ]
    inputs = {str(value.name): value for value in graph.inputs}
    presents: list[ir.Value] = []
    for index, nodes in enumerate(layers):
        past = [inputs[f"past.{index}.{kind}"] for kind in ("key", "value")]
        operands = [*past, *lengths, cos, sin, inputs["positions"]]
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
    joined, mixed = first.inputs[0], last.outputs[0]
    assert joined is not None
    node = attention_node(
        joined,
        operands,
        heads=_heads(first, spec),
        kv_heads=spec.kv_heads,
        window=-1 if spec.window is None else spec.window + window_offset,
        name=str(last.name).rpartition("/")[0] + "/attention",
    )
    graph.insert_before(last, node)
    output, *presents = node.outputs
    output.name = f"{node.name}.output"
    for user, place in list(mixed.uses()):
        user.replace_input_with(place, output)
    for past, present in zip(operands[:2], presents, strict=True):
        present.name = str(past.name).replace("past.", "present.", 1)
        present.shape, present.type = past.shape, past.type
    return presents


def _heads(reshape: ir.Node, spec: StageSpec) -> int:
    """Query heads, from the shape [0, 0, heads + 2 * kv_heads, head_dim] that the joined product is given."""
    shape = reshape.inputs[1]
    assert reshape.op_type == "Reshape"
    assert shape is not None
    assert shape.const_value is not None
    rows = [int(size) for size in shape.const_value.numpy()]
    heads = rows[2] - 2 * spec.kv_heads if len(rows) == 4 else 0
    if heads < 1 or rows[3] != spec.head_dim:
        raise BltError(f"{spec.file}: its heads are not those of the manifest; export it again")
    return heads


def _rotary_tables(graph: ir.Graph, spec: StageSpec) -> tuple[ir.Value, ir.Value]:
    """cos and sin float32 [max_positions, head_dim / 2] as the portable graph computes them."""
    named = {node.op_type: node for node in graph if "/rotary_emb/" in f"/{node.name}"}
    frequencies = [
        value for name, value in graph.initializers.items() if name.endswith("rotary_emb.inv_freq")
    ]
    if len(frequencies) != 1 or "Cos" not in named or frequencies[0].const_value is None:
        raise BltError(f"{spec.file}: its rotary embedding is not what this version writes; export it again")
    scale = np.float32(_rotary_scale(named["Cos"]))
    inverse = frequencies[0].const_value.numpy().astype(np.float32, copy=False)
    assert inverse.shape == (spec.head_dim // 2,)
    angles = np.arange(spec.max_positions, dtype=np.float32)[:, None] * inverse
    tables = []
    for name, values in (("cos", np.cos(angles) * scale), ("sin", np.sin(angles) * scale)):
        tensor = ir.tensor(values.astype(np.float32), name=f"rotary.{name}")
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        tables.append(value)
    return tables[0], tables[1]


def _rotary_scale(cosine: ir.Node) -> float:
    """What cos and sin are multiplied with (yarn), 1 when nothing is."""
    for user, _ in cosine.outputs[0].uses():
        if "/rotary_emb/" in f"/{user.name}" and user.op_type == "Mul":
            other = user.inputs[1]
            assert other is not None
            assert other.const_value is not None
            return float(other.const_value.numpy())
    return 1.0


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
