"""Rewriting a stage graph's attention into ONNX Runtime's fused operator, for forms built for one device.

The portable graph spells attention out in some thirty standard operators a layer, which any engine takes. At
one position a step, starting them takes as long as reading the weights of a small model, and reading the
cache through general products takes longer than its bytes. `com.microsoft.GroupQueryAttention` rotates,
appends to the cache in place, masks and mixes in one operator, over a cache whose positions lie in order:

    past.N.key, past.N.value [B, Hkv, C, head_dim]  the layer's cache; present.N.* are the same buffers
    past_length int32 [B]                           total_length - 1, which the operator calls seqlens_k
    total_length int32 []                           positions in the cache after this call

What it does not know: files, weights, how a cache is kept (`runtime.cache`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..runtime.errors import BltError
from ..runtime.specs import StageSpec
from .attention_layers import as_written, attention_layers

__all__ = ["DOMAIN", "attention_node", "fuse_attention"]

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
